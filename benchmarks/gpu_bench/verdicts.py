"""What is aimed at, and whether it is met."""

from typing import Any

from gpu_bench.shapes import LLAMA_7B, Shape

PPO_EPOCHS = (1, 2, 4)
"""The last one is the default of --num_ppo_epochs."""


def memory_case(shape: Shape, method: str, placement: str, cap_gb: int) -> str:
    """Returns the name of a measurement of memory."""
    return f"{shape.name}, {method}, {placement}, {cap_gb} GB"


def ppo_case(epochs: int) -> str:
    """Returns the name of a comparison with PPO."""
    return f"ppo, {epochs} epoch{'s' * (epochs > 1)}"


def targets(parts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what was aimed at, what was measured and whether it is met; None for what was not measured."""
    compared = parts.get("compare", {})
    engine, decoded = _best(parts.get("decode", {}), "fraction_of_roofline", of=f"{LLAMA_7B.name}, 64 rows")
    model, trained = _best(parts.get("train", {}), "mfu")
    return [
        _fits_80_gb(parts.get("memory", {})),
        _bound(f"decoding, of what the memory's bandwidth allows without prefill (best: {engine})", 0.5, decoded),
        _bound(f"model FLOP utilisation of the update (best: {model})", 0.45, trained),
        *(
            _bound(f"step time, {ppo_case(epochs)} / ReMax", 2.0, compared.get(ppo_case(epochs), {}).get("ratio"))
            for epochs in PPO_EPOCHS
        ),
        _bound(
            "step time, ReMax / REINFORCE, a function as reward",
            1.15,
            compared.get("reinforce", {}).get("ratio"),
            at_most=True,
        ),
    ]


def _best(results: dict[str, Any], value: str, of: str = "") -> tuple[str, float | None]:
    """Returns the case with the largest value, and the value."""
    found = {name: own[value] for name, own in results.items() if name.startswith(of) and value in own}
    best = max(found, key=lambda name: found[name], default="none was measured")
    return best, found.get(best)


def _bound(name: str, bound: float, measured: float | None, *, at_most: bool = False) -> dict[str, Any]:
    met = None if measured is None else measured <= bound if at_most else measured >= bound
    return {"name": name, "target": f"{'at most' if at_most else 'at least'} {bound}", "measured": measured, "met": met}


def _fits_80_gb(results: dict[str, Any]) -> dict[str, Any]:
    """Met where there is a placement of reference and reward model that lets ReMax fit and not PPO."""
    measured: dict[str, dict[str, Any]] = {}
    for placement in ("resident", "offload"):
        own = {m: results.get(memory_case(LLAMA_7B, m, placement, 80), {}) for m in ("remax", "ppo")}
        if all("fits" in result for result in own.values()):
            measured[placement] = {m: {k: r.get(k) for k in ("fits", "margin_bytes")} for m, r in own.items()}
    return {
        "name": "Llama-2-7B, all weights trained, the optimiser's states on the GPU, 80 GB",
        "target": "ReMax fits, PPO with the same optimiser and placement does not",
        "measured": measured or None,
        "met": any(m["remax"]["fits"] and not m["ppo"]["fits"] for m in measured.values()) if measured else None,
    }

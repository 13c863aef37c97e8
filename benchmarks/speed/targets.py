"""What was aimed at, beside what was measured. A target that is missed says so."""

from typing import Any

LINEAR = 0.15
"""How far an exponent may be from 1 to count as linear."""


def targets(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the targets of those parts that were run."""
    return [
        *_competitors(parts.get("competitors", {})),
        *_baseline(parts.get("baseline", {})),
        *_floor(parts.get("floor", {})),
        *_scaling(parts.get("scaling", {})),
    ]


def target(
    name: str, measured: float, *, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    """Returns one target with what was measured."""
    bounds = {"at least": at_least, "at most": at_most}
    words = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
    met = (at_least is None or measured >= at_least) and (at_most is None or measured <= at_most)
    return {"name": name, "target": " and ".join(words), "measured": measured, "met": met}


def _competitors(cases: dict[str, Any]) -> list[dict[str, Any]]:
    own = []
    ratios = {name: case["ratios"] for name, case in cases.items()}
    for case, other, times in (
        ("tinystories-260k, fixed", "trl rloo", 2.5),
        ("tinystories-260k, fixed", "trl grpo", 2.0),
        ("tinystories-260k, ragged", "trl rloo", 4.0),
    ):
        if case in ratios:
            own.append(target(f"{case}: time per prompt, {other} / ReMax", ratios[case][other]["time"], at_least=times))
    for case, others in ratios.items():
        if case == "llama-50m, fixed":
            own += [
                target(f"{case}: time ratio / FLOP ratio, {name}", ratio["time_of_flops"], at_least=0.9)
                for name, ratio in others.items()
            ]
    fixed, ragged = ratios.get("llama-50m, fixed"), ratios.get("llama-50m, ragged")
    if fixed and ragged:
        own += [
            target(f"llama-50m: time ratio with ragged / with fixed lengths, {name}", value, at_least=1.0)
            for name, value in ((name, ragged[name]["time"] / fixed[name]["time"]) for name in fixed)
        ]
    for case, others in ratios.items():
        own += [
            target(f"{case}: peak live tensor bytes, ReMax / {name}", 1 / ratio["live_bytes"], at_most=1.0)
            for name, ratio in others.items()
        ]
    return own


def _baseline(cases: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        target(f"{name}: time of a step, ReMax / REINFORCE", case["price"]["with KL"], at_most=1.25)
        for name, case in cases.items()
    ]


def _floor(cases: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        target(f"{name}: time of a step / its floor", case["step_of_floor"], at_most=1.2)
        for name, case in cases.items()
    ]


def _scaling(curves: dict[str, Any]) -> list[dict[str, Any]]:
    own = [
        target(f"exponent of time over {name}", curves[name]["time_exponent"], at_least=1 - LINEAR, at_most=1 + LINEAR)
        for name in ("batch", "completion length")
        if name in curves
    ]
    if "vocabulary" in curves:
        beyond = {point["x"]: point["beyond_bytes"] for point in curves["vocabulary"]["points"]}
        growth = beyond[131_072] / beyond[32_768] - 1
        name = "memory beyond weights, gradients and optimiser state: growth from a vocabulary of 32k to 128k"
        own.append(target(name, growth, at_most=0.15))
    return own

"""The tables of docs/scaling.md: memory, network and least time of a step on many GPUs, by formula.

    python -m benchmarks.scaling_on_paper

writes benchmarks/results/scaling_on_paper.json and the tables between the markers of docs/scaling.md. Nothing is
measured: memory is what `remax plan` predicts, the network what remax.plan.network counts, and seconds are those of
benchmarks/roofline.py at published peaks.
"""

import re
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.roofline import ADAMW_BYTES, ETHERNET, FLOPS, INFINIBAND, step_seconds

from remax.config import PlanConfig
from remax.config.plan import Sharding
from remax.plan.device import KEPT_FREE, WORKSPACE_BYTES
from remax.plan.network import Passes, received, transfers
from remax.plan.networks import Network, measure_networks, networks_of_configs, read_config
from remax.plan.phases import Device, Workload, predict
from remax.plan.report import gib
from remax.plan.sharding import Split
from remax.recording import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/scaling_on_paper.json", ROOT / "docs/scaling.md"
CONFIGS = {"7B": "llama-2-7b", "14B": "qwen2.5-14b", "70B": "llama-3.1-70b"}
SETTINGS: dict[str, Any] = {"bf16": True, "gradient_checkpointing": True, "max_completion_length": 512}
LENGTH = SETTINGS["max_completion_length"]
"""Of the prompts, too."""
CARD = 80 * 2**30
PROMPTS = 8
"""Per GPU, where their number does not matter: one micro-batch."""
SHARDINGS: tuple[Sharding, ...] = ("ddp", "zero2", "zero3", "fsdp2")
BATCH = 256
"""Prompts of a step, where GPUs share out a given step."""
SERVER = {"7B": 0, "14B": 0, "70B": 8}
"""GPUs of a vLLM server; 0 where every process decodes for itself."""


@cache
def networks_of(model: str) -> dict[str, Network]:
    """Returns policy, reference and reward model, all of one published shape."""
    config = read_config(str(ROOT / f"benchmarks/configs/{CONFIGS[model]}.json"), flag="--model")
    args = settings(PROMPTS)
    return measure_networks(networks_of_configs(config, config, args), args)


def settings(batch_size: int, micro_batch_tokens: int = PROMPTS * 2 * LENGTH) -> PlanConfig:
    """Returns the settings of a run, see SETTINGS."""
    return PlanConfig(batch_size=batch_size, micro_batch_tokens=micro_batch_tokens, **SETTINGS)


def peaks(model: str, args: PlanConfig, work: Workload, split: Split) -> dict[str, int]:
    """Returns the peak bytes of one GPU by phase."""
    device, networks = Device("cuda", WORKSPACE_BYTES), networks_of(model)
    return {name: peak.total for name, peak in predict(networks, args, work, device, split).items()}


def fits(size: int) -> bool:
    """Whether a card has room for it and for what is kept free."""
    return size <= CARD * (1 - KEPT_FREE)


# What is computed -----------------------------------------------------------------------------------------------------


def memory() -> list[dict[str, Any]]:
    """Returns the peaks by phase of one GPU, over sizes, ways to split and numbers of GPUs."""
    return [
        {"model": model, "sharding": sharding, "gpus": gpus, "peak": own, "fits": fits(max(own.values()))}
        | {"fits_without_rollout": fits(max(size for phase, size in own.items() if phase != "rollout"))}
        for model in CONFIGS
        for sharding in ("fsdp2", "zero3")
        for gpus in (8, 16, 32, 64)
        for own in [peaks(model, settings(PROMPTS * gpus), Workload(PROMPTS, LENGTH, LENGTH), Split(sharding, gpus))]
    ]


def network(gpus: int = 64) -> list[dict[str, Any]]:
    """Returns what one GPU receives in a step, over sizes and ways to split; and of every further micro-batch."""
    found = []
    for model in CONFIGS:
        for sharding in SHARDINGS:
            split, work = Split(sharding, gpus), Workload(PROMPTS, LENGTH, LENGTH)
            moved = transfers(networks_of(model), settings(PROMPTS * gpus), work, split)
            halves = settings(PROMPTS * gpus, PROMPTS * LENGTH)
            again = [own for own in transfers(networks_of(model), halves, work, split) if own.phase == "update"]
            update = received([own for own in moved if own.phase == "update"])
            objects = {"completions", "rewards", "log-probabilities", "metrics"}
            found.append(
                {
                    "model": model,
                    "sharding": sharding,
                    "gpus": gpus,
                    "objects": received([own for own in moved if own.what in objects]),
                    "rollout": _weights(moved, "rollout"),
                    "reward": _weights(moved, "reward"),
                    "reference": _weights(moved, "reference"),
                    "update": _weights(moved, "update"),
                    "micro_batch": received(again) - update,
                    "seconds": {own.name: received(moved) / own.link(gpus) for own in (INFINIBAND, ETHERNET)},
                }
            )
    return found


def _weights(moved: list[Any], phase: str) -> int:
    return received([own for own in moved if own.phase == phase and ", " in own.what])


def same_step() -> list[dict[str, Any]]:
    """Returns the seconds of one given step over the number of GPUs that share it."""
    return [_timed(model, gpus, BATCH, cluster=INFINIBAND) for model in CONFIGS for gpus in (8, 16, 32, 64, 128, 256)]


def same_share() -> list[dict[str, Any]]:
    """Returns the seconds of a step whose prompts grow with the number of GPUs, on a fast and on a slow network."""
    return [
        _timed("7B", gpus, PROMPTS * gpus, cluster=cluster)
        for cluster in (INFINIBAND, ETHERNET)
        for gpus in (8, 16, 64, 256, 1024)
    ]


def _timed(model: str, gpus: int, batch_size: int, *, cluster: Any) -> dict[str, Any]:
    work, split = Workload(-(-batch_size // gpus), LENGTH, LENGTH), Split("fsdp2", gpus)
    tokens = min(16384, work.prompts * 2 * LENGTH)
    args, server = settings(batch_size, tokens), SERVER[model]
    seconds = step_seconds(networks_of(model), args, work, split, cluster, server=server)
    own = peaks(model, args, work, split)
    return {
        "model": model,
        "cluster": cluster.name,
        "gpus": gpus,
        "server_gpus": server,
        "batch_size": batch_size,
        "micro_batch_tokens": tokens,
        "micro_batches": Passes.of(args, work, gpus).update,
        "fits": fits(max(size for phase, size in own.items() if phase != "rollout" or not server)),
        "seconds": asdict(seconds),
        "step": seconds.step,
    }


def limits() -> list[dict[str, Any]]:
    """Returns what more GPUs do not change, by size: whole weights, and the least time that reading them takes."""
    found = []
    for model in CONFIGS:
        own = networks_of(model)["policy"]
        read = 2 * (own.counts.linear + own.counts.head)
        cached = 4 * own.widths.layers * own.widths.keys * 1.5 * LENGTH  # Of a row, in the middle of its completion.
        whole = Split("fsdp2", 8).whole(own, settings(PROMPTS))[0].bytes
        found.append(
            {"model": model, "whole": whole, "floor": LENGTH * read / INFINIBAND.memory, "equal_rows": read / cached}
        )
    return found


def hiding() -> list[dict[str, Any]]:
    """Returns how many tokens a micro-batch needs for its arithmetic to take as long as its traffic, by network.

    Per weight: FSDP2 moves 2 bytes three times; a token takes 8 operations with gradient checkpointing, 6 without.
    """
    links = {"NVLink, within a node": INFINIBAND.inside, INFINIBAND.name: INFINIBAND.link(16)}
    links[ETHERNET.name] = ETHERNET.link(16)
    return [
        {"network": name, "link": link, "checkpointing": 6 * FLOPS / 8 / link, "plain": 6 * FLOPS / 6 / link}
        for name, link in links.items()
    ]


def compute() -> dict[str, Any]:
    """Returns everything that the tables show."""
    return {
        "measured": False,
        "settings": SETTINGS | {"prompt_length": LENGTH, "card_bytes": CARD},
        "assumed": [asdict(INFINIBAND), asdict(ETHERNET), {"adamw_bytes": ADAMW_BYTES}],
        "parameters": {model: networks_of(model)["policy"].counts.parameters for model in CONFIGS},
        "memory": memory(),
        "network": network(),
        "same_step": same_step(),
        "same_share": same_share(),
        "limits": limits(),
        "hiding": hiding(),
    }


# How it is shown ------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Returns the tables by the names of their markers."""
    return {
        "memory": _memory_table(found["memory"]),
        "network": _network_table(found["network"]),
        "same step": _step_table(found["same_step"]),
        "limits": _limits_table(found["limits"]),
        "hiding": _hiding_table(found["hiding"]),
        "same share": _share_table(found["same_share"]),
    }


def _table(titles: list[str], rows: list[list[str]], *, words: int = 1) -> str:
    """Returns a table whose first columns are words and whose others are numbers."""
    line = "|".join("---" if number < words else "---:" for number in range(len(titles)))
    return "\n".join([f"| {' | '.join(titles)} |", f"|{line}|", *(f"| {' | '.join(row)} |" for row in rows)])


def _memory_table(found: list[dict[str, Any]]) -> str:
    phases = ("rollout", "reward", "reference", "update")
    rows: dict[tuple[str, ...], list[str]] = {}
    for own in found:
        verdict = "yes" if own["fits"] else "all but the rollout" if own["fits_without_rollout"] else "no"
        numbers = [str(own["gpus"]), *(gib(own["peak"][phase]) for phase in phases), verdict]
        rows.setdefault((own["model"], *numbers), []).append(own["sharding"])
    lines = [[model, ", ".join(splits), *numbers] for (model, *numbers), splits in rows.items()]
    return _table(["model", "split", "GPUs", *phases, "fits 80 GB"], lines, words=2)


def _network_table(found: list[dict[str, Any]]) -> str:
    columns = ("rollout", "reward", "reference", "update", "micro_batch", "objects")
    rows = [
        [own["model"], own["sharding"], *(gib(own[name]) if own[name] else "0" for name in columns)]
        + [_digits(seconds) for seconds in own["seconds"].values()]
        for own in found
    ]
    titles = ["model", "split", "rollout", "reward", "reference", "update", "each further micro-batch", "objects"]
    return _table([*titles, "s, InfiniBand", "s, Ethernet"], rows, words=2)


def _step_table(found: list[dict[str, Any]]) -> str:
    first = {own["model"]: own for own in reversed(found)}
    titles = ["model", "GPUs", "prompts each", "weights for the rollout", "prompts", "decoding", "reward", "reference"]
    titles += ["update", "optimiser", "network", "step", "of ideal"]
    rows = []
    for own in found:
        start = first[own["model"]]
        total = own["gpus"] + own["server_gpus"]
        ideal = start["step"] * (start["gpus"] + start["server_gpus"]) / total
        gpus = f"{own['gpus']} + {own['server_gpus']}" if own["server_gpus"] else str(own["gpus"])
        shown = [own["model"], gpus, str(own["batch_size"] // own["gpus"])]
        shown += [_digits(own["seconds"][name]) for name in own["seconds"]]
        rows.append([*shown, _digits(own["step"]), f"{ideal / own['step']:.0%}"])
    return _table(titles, rows)


def _share_table(found: list[dict[str, Any]]) -> str:
    rows = []
    for own in found:
        waiting = own["seconds"]["network"] + own["seconds"]["gathering"]
        numbers = [str(own["gpus"]), f"{own['batch_size']:,}", _digits(waiting), _digits(own["step"])]
        rows.append([own["cluster"], *numbers, f"{own['batch_size'] / own['step']:,.0f}"])
    return _table(["network", "GPUs", "batch_size", "waiting for the network", "step", "samples a second"], rows)


def _limits_table(found: list[dict[str, Any]]) -> str:
    rows = [[own["model"], gib(own["whole"]), _digits(own["floor"]), f"{own['equal_rows']:.0f}"] for own in found]
    titles = [
        "model",
        "whole weights, GiB",
        "decoding at least, s",
        "rows whose caches are read as long as the weights",
    ]
    return _table(titles, rows)


def _hiding_table(found: list[dict[str, Any]]) -> str:
    rows = []
    for own in found:
        tokens = [f"{round(own[name], -2):,.0f}" for name in ("checkpointing", "plain")]
        rows.append([own["network"], f"{own['link'] / 1e9:g}", *tokens])
    return _table(["network", "GB/s", "tokens, with --gradient_checkpointing", "tokens, without"], rows)


def _digits(seconds: float) -> str:
    """Returns seconds with about two digits."""
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2f}"


def filled(page: str, shown: dict[str, str]) -> str:
    """Returns a page with its tables in place: those between `<!-- table: NAME -->` and `<!-- end -->`."""

    def table(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n\n{shown[found[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- table: ([a-z ]+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def main() -> None:
    """Writes results and tables."""
    found = compute()
    write_json(RESULTS, found)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables(found)), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Competitors in turn, A B C, A B C, ...: a machine that slows down for a while slows all of them."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.cases import Setting
from benchmarks.speed.competitors import settings, train
from benchmarks.speed.process import Worker


def compete(setting: Setting, names: Sequence[str], logs: Path) -> dict[str, Any]:
    """Returns what a step of each competitor takes, and the ratios to the first one.

    Everyone first takes one step to warm up and one that is watched; the steps after those are timed.
    """
    case = setting.case
    workers = {name: Worker(name, train, (name, setting), logs / f"{case.name} {name}.log") for name in names}
    try:
        for worker in workers.values():
            worker.step()
        watched = {name: worker.step("watch") for name, worker in workers.items()}
        check_lengths({name: report["lengths"] for name, report in watched.items()}, case.num_prompts)
        timed: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(case.rounds):
            for name, worker in workers.items():
                timed[name].append(worker.step())
    finally:
        for worker in workers.values():
            worker.stop()
    competitors = {
        name: summary(watched[name], timed[name], case.num_prompts) | {"settings": settings(name, setting)}
        for name in names
    }
    return {
        "weights": "trained" if setting.trained else "random",
        "prompts": case.num_prompts,
        "max_completion_length": case.max_completion_length,
        "completion_lengths": watched[names[0]]["lengths"],
        "competitors": competitors,
        "ratios": {name: compare(competitors[names[0]], competitors[name]) for name in names[1:]},
    }


def summary(watched: dict[str, Any], timed: Sequence[dict[str, Any]], num_prompts: int) -> dict[str, Any]:
    """Returns the figures of one competitor: medians, and the peaks over its steps."""
    seconds = [report["seconds"] for report in timed]
    return {
        "seconds": seconds,
        "seconds_per_prompt": statistics.median(seconds) / num_prompts,
        "flops": watched["flops"],
        "live_bytes": watched["live_bytes"],
        "static_bytes": watched["static_bytes"],
        "resident_bytes": max(report["resident_bytes"] for report in timed),
    }


def compare(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns how many times of ours another takes: time as the median of the ratios within a round."""
    by_round = ratios(other["seconds"], ours["seconds"])
    time = statistics.median(by_round)
    flops = other["flops"] / ours["flops"]
    return {
        "time": time,
        "time_by_round": by_round,
        "flops": flops,
        "time_of_flops": time / flops,
        "live_bytes": other["live_bytes"] / ours["live_bytes"],
        "resident_bytes": other["resident_bytes"] / ours["resident_bytes"],
    }


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Returns the ratios within the rounds."""
    return [n / d for n, d in zip(numerators, denominators, strict=True)]


def check_lengths(lengths: dict[str, list[int]], num_prompts: int) -> None:
    """Makes sure that all who decode two rows per prompt decoded the same lengths."""
    full = {name: own for name, own in lengths.items() if len(own) == 2 * num_prompts}
    first = next(iter(full.values()))
    for name, own in full.items():
        assert own == first, f"{name} decoded other lengths than {next(iter(full))}"

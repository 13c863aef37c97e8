"""What the finished runs of a comparison say, in one dictionary and in results.json."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from remax.compare import statistics
from remax.compare.records import Record, Run, number, read_comparison, read_initial_samples, read_runs
from remax.compare.statistics import Estimate, Floats, LengthControl
from remax.recording import write_json

Runs = Mapping[str, Sequence[Run]]
T = TypeVar("T")

REWARDS = ("reward", "gold")
"""The reward that is trained on and the one that is not; the second may be absent."""

EVALUATED = ("reward", "reward/greedy", "gold", "gold/greedy", "kl", "length", "clipped_ratio", "entropy")
SPENT = ("steps", "prompts", "tokens", "seconds", "parameters")
PHASES = ("rollout", "reward", "reference", "update")
CONTROLLED = "length_controlled"

PAIRED = (*REWARDS, *(f"{name}/{CONTROLLED}" for name in REWARDS))
"""The metrics in which every method is compared with the first."""

FEW_SEEDS = 6
"""With fewer, all paired differences have the same sign in more than 5% of comparisons of equals."""


def collect(folder: Path) -> dict[str, Any]:
    """Returns the results of a comparison and writes them to results.json in its folder.

    They hold everything of comparison.json and, by method and metric, the mean and the interquartile mean over seeds
    with 95% intervals; every method against the first; and the slopes of the length-controlled rewards. What is unknown
    is null.

    Raises:
        UserError: the folder holds no comparison, or a file in it is damaged.
    """
    comparison = read_comparison(folder)
    runs = read_runs(folder, comparison)
    initial = read_initial_samples(folder)
    controls = {name: _control(runs, initial, name) for name in REWARDS}
    hyperparameters = comparison.get("hyperparameters") or {}
    methods = {
        label: {
            "settings": settings,
            "hyperparameters": hyperparameters.get(label),
            "seeds": [run.seed for run in runs[label]],
            "metrics": dict(_metrics(label, runs[label], controls)),
        }
        for label, settings in comparison["methods"].items()
    }
    results: dict[str, Any] = {
        **comparison,
        "methods": methods,
        "missing": [
            {"label": label, "seed": seed}
            for label, finished in runs.items()
            for seed in comparison["seeds"]
            if seed not in [run.seed for run in finished]
        ],
        "initial": {"num_samples": len(initial)}
        | {name: _none(_mean(initial, name)) for name in ("reward", "gold", "length")},
        "length_control": {
            name: None if control is None else {"slope": _written(control.slope), "varies": control.varies}
            for name, control in controls.items()
        },
        "pairwise": _pairwise(methods),
    }
    results["notes"] = list(_notes(results))
    write_json(folder / "results.json", results)
    written: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return written


def _metrics(
    label: str, runs: Sequence[Run], controls: Mapping[str, LengthControl | None]
) -> Iterator[tuple[str, Record]]:
    for name in EVALUATED:
        yield name, _over_seeds(runs, lambda run, name: _last(run.evaluations, name), name)
    for name, control in controls.items():
        yield f"{name}/{CONTROLLED}", _controlled_summary(label, runs, name, control)
    for name in ("time/step", *(f"time/{phase}" for phase in PHASES)):
        yield name, _over_seeds(runs, lambda run, name: _median(run.steps, name), name)
    for phase in PHASES:
        yield f"memory/{phase}", _over_seeds(runs, lambda run, phase: _peak(run.steps, [phase]), phase)
    yield "memory/peak", _over_seeds(runs, lambda run, phases: _peak(run.steps, phases), PHASES)
    for name in SPENT:
        yield name, _over_seeds(runs, lambda run, name: number(run.summary.get(name)), name)


def _over_seeds(runs: Sequence[Run], measure: Callable[[Run, T], float], what: T) -> Record:
    return _summary(np.array([measure(run, what) for run in runs], dtype=np.float64))


def _summary(values: Floats) -> Record:
    """Returns a metric over seeds: mean and interquartile mean of the values there are, and the values themselves."""
    present = values[~np.isnan(values)]
    if not len(present):
        nothing = {"mean": None, "mean_interval": None, "iqm": None, "iqm_interval": None}
        return {**nothing, "values": [None] * len(values)}
    return _written_summary(statistics.mean(present), statistics.interquartile_mean(present), values)


def _written_summary(mean: Estimate, middle: Estimate, values: Floats) -> Record:
    return {
        "mean": mean.value,
        "mean_interval": mean.interval,
        "iqm": middle.value,
        "iqm_interval": middle.interval,
        "values": [_none(value) for value in values],
    }


def _control(runs: Runs, initial: Sequence[Record], reward: str) -> LengthControl | None:
    """Returns the length-controlled rewards at the mean length before training; None if that or the reward is unknown.

    Every method is there that has a run with samples; every run without is left out.
    """
    reference_length = _mean(initial, "length")
    samples = {label: [rows for run in finished if len(rows := _rows(run, reward))] for label, finished in runs.items()}
    samples = {label: runs_rows for label, runs_rows in samples.items() if runs_rows}
    if math.isnan(reference_length) or not samples:
        return None
    return statistics.length_controlled(samples, reference_length)


def _rows(run: Run, reward: str) -> Floats:
    """Returns (length, reward) of a run's samples that have both."""
    rows = np.array([[number(s.get("length")), number(s.get(reward))] for s in run.samples]).reshape(-1, 2)
    present: Floats = rows[~np.isnan(rows).any(axis=1)]
    return present


def _controlled_summary(label: str, runs: Sequence[Run], reward: str, control: LengthControl | None) -> Record:
    values = np.full(len(runs), np.nan)
    if control is None or label not in control.means:
        return _summary(values)
    values[[len(_rows(run, reward)) > 0 for run in runs]] = control.values[label]
    return _written_summary(control.means[label], control.interquartile_means[label], values)


def _pairwise(methods: Mapping[str, Record]) -> list[Record]:
    """Returns how every later method differs from the first: method minus first, and P(method > first)."""
    first, *others = methods
    return [
        {
            "label": label,
            "against": first,
            "metrics": {name: _pair(methods[label], methods[first], name) for name in PAIRED},
        }
        for label in others
    ]


def _pair(method: Record, baseline: Record, name: str) -> Record | None:
    """Returns the comparison of two methods in one metric; None if either has no value.

    The difference is over the seeds that both have. That of length-controlled rewards takes the slope as given.
    """
    ours, theirs = (
        {seed: v for seed, v in zip(m["seeds"], m["metrics"][name]["values"], strict=True) if v is not None}
        for m in (method, baseline)
    )
    if not ours or not theirs:
        return None
    seeds = [seed for seed in ours if seed in theirs]
    difference = None
    if seeds:
        paired = statistics.paired_difference(
            np.array([ours[seed] for seed in seeds]), np.array([theirs[seed] for seed in seeds])
        )
        difference = {**_written(paired), "seeds": seeds}
    chance = statistics.probability_of_improvement(np.array([*ours.values()]), np.array([*theirs.values()]))
    return {"difference": difference, "probability_of_improvement": _written(chance)}


def _notes(results: Mapping[str, Any]) -> Iterator[str]:
    """Says what the reader must know before believing the figures."""
    methods = results["methods"]
    if results["missing"]:
        names = ", ".join(f"{run['label']} seed {run['seed']}" for run in results["missing"])
        yield f"Not finished and left out: {names}."
    counts = [len(method["seeds"]) for method in methods.values() if method["seeds"]]
    fewest = min(counts, default=0)
    if fewest == 1:
        yield "A method with one seed has no interval: nothing can be said about the spread between seeds."
    elif 1 < fewest < FEW_SEEDS:
        yield (
            f"Intervals over {fewest} seeds tend to be too narrow: for two equal methods, all {fewest} paired "
            f"differences have the same sign with probability {2 ** (1 - fewest):.0%}."
        )
    if not any(method["metrics"]["gold"]["mean"] is not None for method in methods.values()):
        yield "There is no gold reward: whether a higher learned reward is a better policy remains open."
    if fewest and results["length_control"]["reward"] is None:
        yield "Length-controlled rewards are missing: they need the lengths before training and the final samples."
    elif fewest and not results["length_control"]["reward"]["varies"]:
        yield "Lengths do not vary within any method: the slope is 0 and length control changes nothing."
    yield from _unequal_spending(results["budget"], methods)


def _unequal_spending(budget: Mapping[str, Any], methods: Mapping[str, Record]) -> Iterator[str]:
    unit, amount = budget["unit"], budget["amount"]
    for label, method in methods.items():
        spent = method["metrics"][unit]["mean"]
        if spent is not None and abs(spent / amount - 1) > 0.05:
            yield f"{label} spent {spent:,.0f} of a budget of {amount:,.0f} {unit}: the methods are not on a par."


def _last(records: Sequence[Record], name: str) -> float:
    return number(records[-1].get(name)) if records else math.nan


def _present(records: Sequence[Record], name: str) -> Floats:
    values = np.array([number(record.get(name)) for record in records], dtype=np.float64)
    present: Floats = values[~np.isnan(values)]
    return present


def _mean(records: Sequence[Record], name: str) -> float:
    values = _present(records, name)
    return float(values.mean()) if len(values) else math.nan


def _median(steps: Sequence[Record], name: str) -> float:
    """Returns the median over steps: the first steps and a busy machine's pauses do not count."""
    values = _present(steps, name)
    return float(np.median(values)) if len(values) else math.nan


def _peak(steps: Sequence[Record], phases: Sequence[str]) -> float:
    values = [value for phase in phases for value in _present(steps, f"memory/{phase}")]
    return float(max(values, default=math.nan))


def _written(estimate: Estimate) -> Record:
    return {"value": estimate.value, "interval": estimate.interval}


def _none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)

"""Reading what the runs of a comparison left in its folder."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remax.errors import UserError

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One finished run."""

    seed: int
    summary: Record
    """run.json."""
    steps: list[Record]
    """metrics.jsonl: the training steps."""
    evaluations: list[Record]
    """evaluations.jsonl: the held-out evaluations, from before training to the end."""
    samples: list[Record]
    """final_samples.jsonl: one per held-out prompt."""


def read_comparison(folder: Path) -> Record:
    """Returns comparison.json: what is compared, under which budget, on which machine.

    Raises:
        UserError: the folder holds no comparison.
    """
    path = folder / "comparison.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no comparison (no comparison.json): set the folder of `remax compare`.")
    return _parse(path.read_text(encoding="utf-8"), str(path))


def read_runs(folder: Path, comparison: Mapping[str, Any]) -> dict[str, list[Run]]:
    """Returns the finished runs by method, both in the order of comparison.json.

    Raises:
        UserError: a file of a finished run is damaged.
    """
    return {
        label: [run for seed in comparison["seeds"] if (run := _read_run(folder, label, seed)) is not None]
        for label in comparison["methods"]
    }


def read_initial_samples(folder: Path) -> list[Record]:
    """Returns the samples of the policy before training; none if they were not drawn yet."""
    return _read_lines(folder / "initial_samples.jsonl")


def _read_run(folder: Path, label: str, seed: int) -> Run | None:
    home = folder / "runs" / label / f"seed{seed}"
    path = home / "run.json"
    if not path.is_file():
        return None
    summary = _parse(path.read_text(encoding="utf-8"), str(path))
    if not summary.get("finished"):
        return None
    evaluations = sorted(_read_lines(home / "evaluations.jsonl"), key=lambda record: number(record.get("step")))
    steps, samples = _read_lines(home / "metrics.jsonl"), _read_lines(home / "final_samples.jsonl")
    return Run(seed, summary, steps, evaluations, samples)


def _read_lines(path: Path) -> list[Record]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would also split at U+2028 inside a text
    return [_parse(line, f"{path}, line {row + 1}") for row, line in enumerate(lines) if line.strip()]


def _parse(text: str, place: str) -> Record:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is damaged ({error}): delete that run's folder and compare again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{place} is damaged (no JSON object): delete that run's folder and compare again.")
    return value


def number(value: Any) -> float:
    """Returns a recorded value as a number; NaN if it is missing, null or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan

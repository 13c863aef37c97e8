"""Reading what a training has left in its folder so far; it may be going on."""

import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from remax.compare.records import number
from remax.errors import UserError
from remax.provenance import read_starts
from remax.untrusted import shown

Floats = NDArray[np.float64]
Record = dict[str, Any]

LONGEST_LABEL = 60
SCALARS = ("step", "prompt_index", "sample_index", "reward", "greedy_reward", "length")
"""What is kept in memory of every completion; its texts stay in the file."""
EVALUATED = {"reward": "reward", "greedy_reward": "reward/greedy", "gold_reward": "gold"}
"""What the columns of a training completion are called among the values of an evaluation."""


@dataclass(frozen=True)
class Completions:
    """The completions of a run: numbers by column, [rows] each, and where the texts are."""

    path: Path
    offsets: list[int] = field(default_factory=list)
    columns: Mapping[str, Floats] = field(default_factory=dict)
    """NaN where a row has no such value."""

    def __len__(self) -> int:
        return len(self.offsets)

    def column(self, name: str) -> Floats:
        """Returns a column, [rows]."""
        return self.columns.get(name, np.full(len(self), np.nan))

    def read(self, rows: Iterable[int]) -> Iterator[Record]:
        """Returns whole records."""
        with self.path.open("rb") as file:
            for row in rows:
                file.seek(self.offsets[row])
                yield json.loads(file.readline())


@dataclass(frozen=True)
class Run:
    """One training."""

    path: Path
    label: str
    steps: list[Record]
    """metrics.jsonl."""
    evaluations: list[Record]
    """eval.jsonl by step, without the "eval/" of its names."""
    alarms: list[Record]
    completions: Completions
    """Of the training steps."""
    held_out: Completions
    """Of the evaluations; its columns are also those of eval.jsonl, prompt by prompt."""
    config: Record
    starts: list[Record]
    """Of provenance.json: how it was started, and gone on with."""
    ended: bool
    """Whether it has written its model."""

    @property
    def step(self) -> int:
        """The last step."""
        return max((int(record["step"]) for record in (*self.steps, *self.evaluations)), default=0)

    @property
    def functions(self) -> list[str]:
        """The names of its rewards."""
        keys = [key for record in self.steps[-1:] for key in record]
        means = [key for key in keys if key.startswith("rewards/") and key.endswith("/mean")]
        return [key.removeprefix("rewards/").removesuffix("/mean") for key in means]

    def column(self, name: str) -> tuple[Floats, Floats]:
        """Returns the steps that measured something, and what: [points] each."""
        return _column(self.steps, name)

    def evaluated(self, name: str) -> tuple[Floats, Floats]:
        """Returns the steps whose evaluation measured something, and its mean: [points] each."""
        return _column(self.evaluations, name)

    def by_prompt(self, name: str, step: float) -> dict[int, float]:
        """Returns what an evaluation measured of each prompt that has it; nothing where only means were kept."""
        chosen = self.held_out.column("step") == step
        prompts, values = self.held_out.column("prompt_index")[chosen], self.held_out.column(name)[chosen]
        return {int(p): float(v) for p, v in zip(prompts, values, strict=True) if math.isfinite(p) and math.isfinite(v)}


def _column(records: Sequence[Record], name: str) -> tuple[Floats, Floats]:
    rows = np.array([[number(r.get("step")), number(r.get(name))] for r in records]).reshape(-1, 2)
    rows = rows[~np.isnan(rows).any(axis=1)]
    return rows[:, 0], rows[:, 1]


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Returns the runs with names that tell them apart.

    Raises:
        UserError: a folder holds no run of `remax train`, is named twice, or holds a line that cannot be read.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"--runs is {' '.join(folders)}: one folder is named twice; set different ones.")
    return [_read_run(path, shown(label, LONGEST_LABEL)) for path, label in zip(paths, labels(paths), strict=True)]


def labels(paths: Sequence[Path]) -> list[str]:
    """Returns the last part of each path, with as many of those before it as tell all of them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different folders have different paths")


def _read_run(path: Path, label: str) -> Run:
    if not path.is_dir():
        raise UserError(f"--runs has {path}: there is no such folder; set the --output_dir of a `remax train`.")
    steps = [record for _, record in _lines(path / "metrics.jsonl")]
    evaluations = {number(r.get("step")): r for _, r in _lines(path / "eval.jsonl")}
    if not steps and not evaluations:
        raise UserError(
            f"--runs has {path}: it holds no run, or one that has not done its first step; set the --output_dir of a "
            "`remax train`."
        )
    if steps and not any("reward" in record for record in steps):
        raise UserError(
            f"--runs has {path}: it holds a run without rewards, perhaps of `remax sft` or `remax dpo`, of which there "
            "is no report; set the --output_dir of a `remax train`."
        )
    for name, records in (("metrics.jsonl", steps), ("eval.jsonl", evaluations.values())):
        if any(math.isnan(number(record.get("step"))) for record in records):
            raise UserError(f"--runs has {path}: {name} has a line without a step; it is damaged: delete that line.")
    return Run(
        path=path,
        label=label,
        steps=sorted(steps, key=lambda record: float(record["step"])),
        evaluations=[_plain_names(evaluations[step]) for step in sorted(evaluations)],
        alarms=[record for _, record in _lines(path / "alarms.jsonl")],
        completions=_scan(path / "completions.jsonl"),
        held_out=_latest(_scan(path / "eval_completions.jsonl")),
        config=_config(path / "config.yaml"),
        starts=read_starts(path),
        ended=(path / "model").exists(),
    )


def _plain_names(evaluation: Record) -> Record:
    return {name.removeprefix("eval/"): value for name, value in evaluation.items()}


def _lines(path: Path) -> Iterator[tuple[int, Record]]:
    """Returns the objects of a file of lines, with the byte where each begins.

    A last line without its end is being written just now: it is left out if it cannot be read.

    Raises:
        UserError: another line cannot be read.
    """
    if not path.is_file():
        return
    offset = 0
    try:
        with path.open("rb") as file:
            for index, line in enumerate(file):
                record = _parse(line)
                if record is not None:
                    yield offset, record
                elif line.endswith(b"\n") and line.strip():
                    raise UserError(
                        f"--runs has {path.parent}: line {index + 1} of {path.name} is no JSON object, so the file is "
                        "damaged; delete that line."
                    )
                offset += len(line)
    except OSError as error:
        raise UserError(f"--runs has {path.parent}: {path.name} cannot be read ({error.strerror}).") from None


def _parse(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _scan(path: Path) -> Completions:
    offsets: list[int] = []
    columns: dict[str, array[float]] = {}
    for row, (offset, record) in enumerate(_lines(path)):
        values = record.get("values")
        measured = dict(values) if isinstance(values, dict) else {}
        own = {name: record.get(name) for name in SCALARS}
        own |= {name: measured[value] for name, value in EVALUATED.items() if value in measured}
        offsets.append(offset)
        for name, value in (measured | own).items():
            column = columns.setdefault(name, array("d"))
            column.extend([math.nan] * (row - len(column)))
            column.append(number(value))
    return Completions(path, offsets, {name: _filled(column, len(offsets)) for name, column in columns.items()})


def _filled(column: "array[float]", rows: int) -> Floats:
    column.extend([math.nan] * (rows - len(column)))
    return np.array(column, dtype=np.float64)


def _latest(completions: Completions) -> Completions:
    """Returns the last row of every prompt and step: a run that went on from a checkpoint may have drawn it again."""
    keys = zip(completions.column("step").tolist(), completions.column("prompt_index").tolist(), strict=True)
    rows = sorted({key: row for row, key in enumerate(keys)}.values())
    columns = {name: values[rows] for name, values in completions.columns.items()}
    return Completions(completions.path, [completions.offsets[row] for row in rows], columns)


def _config(path: Path) -> Record:
    """Returns the settings; none if they cannot be read, for the figures are worth a page without them."""
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            return {}  # A few lines with aliases can spell a value of any size.
        content = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return {str(name): value for name, value in content.items()} if isinstance(content, dict) else {}

"""How time and memory of ReMax's step grow with batch, completion length, vocabulary and parameters."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.speed.cases import Case, Shape, write
from benchmarks.speed.competitors import our_trainer
from benchmarks.speed.floor import timed
from benchmarks.speed.memory import BesideGradients, static_bytes, watch
from benchmarks.speed.process import content_reward

from remax.trainer import ReMaxTrainer

BASE = Case("base", Shape(256, 768, 4, 4, 2048), 16, 16, 48)
WIDE = Case("wide", Shape(128, 384, 4, 2, 32_768), 32, 16, 48, micro_batch_tokens=1024, rounds=1)
"""Two micro-batches, each of which fills a chunk of the head at every one of the vocabularies."""


@dataclass(frozen=True)
class Point:
    """One point of a curve."""

    x: int
    case: Case


def curves(quick: bool = False) -> dict[str, list[Point]]:
    """Returns the points of each curve."""
    if quick:
        toy = Case("toy", Shape(32, 64, 1, 2, 64), 2, 4, 4, rounds=1)
        return {"batch": [Point(n, replace(toy, num_prompts=n)) for n in (2, 4)]}
    return {
        "batch": [Point(n, replace(BASE, num_prompts=n)) for n in (8, 16, 32, 64)],
        "completion length": [Point(n, replace(BASE, max_completion_length=n)) for n in (24, 48, 96, 192)],
        "vocabulary": [
            Point(n, _with_shape(WIDE, f"vocabulary {n}", vocab_size=n)) for n in (32_768, 131_072, 262_144)
        ],
        "parameters": [
            Point(_parameters(case.shape), case)
            for case in (
                _with_shape(BASE, f"hidden {h}", hidden_size=h, intermediate_size=3 * h, layers=n, heads=h // 64)
                for h, n in ((128, 4), (256, 4), (384, 6), (512, 8))
            )
        ],
    }


def measure(points: Sequence[Point], folder: Path) -> dict[str, Any]:
    """Returns the points of a curve with their medians and its exponents; the points take turns."""
    trainers = [_trainer(point, folder) for point in points]
    numbers = {id(trainer): 0 for trainer in trainers}

    def step(trainer: ReMaxTrainer) -> None:
        numbers[id(trainer)] += 1
        trainer.step(trainer.order.batch(1), numbers[id(trainer)])

    rows: list[dict[str, Any]] = []
    for point, trainer in zip(points, trainers, strict=True):
        step(trainer)
        report: dict[str, Any] = {}
        with BesideGradients(trainer.policy.optimizer) as beside, watch(report, beside.live):
            step(trainer)
        made = report["live_bytes"] - report["static_bytes"]
        rows.append(
            {
                "x": point.x,
                "seconds": [],
                "flops": report["flops"],
                "live_bytes": static_bytes(trainer) + made,
                "beyond_bytes": beside.peak,
            }
        )
    for _ in range(points[0].case.rounds):
        for row, trainer in zip(rows, trainers, strict=True):
            row["seconds"].append(timed(partial(step, trainer))[1])
    xs = [row["x"] for row in rows]
    medians = [statistics.median(row["seconds"]) for row in rows]
    return {
        "points": rows,
        "time_exponent": exponent(xs, medians),
        "memory_exponent": exponent(xs, [row["live_bytes"] for row in rows]),
    }


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Returns the slope of log y over log x by least squares."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def _trainer(point: Point, folder: Path) -> ReMaxTrainer:
    return our_trainer(write(point.case, folder), content_reward)


def _with_shape(case: Case, name: str, **shape: Any) -> Case:
    return replace(case, model=name, shape=replace(case.shape, **shape))


def _parameters(shape: Shape) -> int:
    """Returns the weights of the matrices, embeddings included."""
    attention = 4 * shape.hidden_size**2
    return shape.layers * (attention + 3 * shape.hidden_size * shape.intermediate_size) + (
        2 * shape.vocab_size * shape.hidden_size
    )

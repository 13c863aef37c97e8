"""The shapes of which charts are made, and what a line becomes before it is drawn: smooth, with few points."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from remax.report.reading import Floats

MOST_POINTS = 400
"""Of a line: more than a screen shows."""
SMOOTHED_FROM = 40
"""Steps; shorter runs are drawn as they are."""
WINDOWS = 25
"""A running mean goes over this fraction of the steps."""


@dataclass(frozen=True)
class Line:
    """A line of a panel; style is how it is drawn, the same for what is the same in all runs."""

    run: int
    name: str
    style: int
    x: Floats
    y: Floats
    faint: tuple[Floats, Floats] | None = None
    """The single steps behind a running mean."""
    band: tuple[Floats, Floats] | None = None
    """Low and high."""
    marked: bool = False
    steps: Floats | None = None
    """Where x is something else, the steps of the points."""


@dataclass(frozen=True)
class Heat:
    """A histogram by step: shares [rows, columns] between edges."""

    run: int
    x_edges: Floats
    y_edges: Floats
    shares: Floats


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    label: str
    lines: tuple[Line, ...] = ()
    heat: Heat | None = None
    stacked: bool = False
    logarithmic: bool = False
    from_zero: bool = False
    title: str = ""


@dataclass(frozen=True)
class Chart:
    """One picture with its title and how to read it."""

    key: str
    title: str
    reading: str
    panels: tuple[Panel, ...]
    x_label: str = "step"
    by_phase: bool = False
    """Whether colours tell phases and not runs."""
    metrics: tuple[str, ...] = field(default=())
    """Whose alarms are marked."""

    @property
    def names(self) -> list[tuple[str, int]]:
        """The names of its lines, each with its style, once."""
        return list(dict.fromkeys((line.name, line.style) for panel in self.panels for line in panel.lines))


def smoothed(line: Line) -> Line:
    """Returns a line of training steps as it is drawn: its running mean, with the single steps behind it."""
    width = window(len(line.x))
    if width == 1:
        return line
    faint = (thinned(line.x), thinned(line.y))
    return replace(line, x=faint[0], y=thinned(running_mean(line.y, width)), faint=faint)


def window(num_steps: int) -> int:
    """Returns over how many steps the running mean of so many goes; an odd number."""
    return 1 if num_steps < SMOOTHED_FROM else max(3, 2 * (num_steps // WINDOWS // 2) + 1)


def running_mean(values: Floats, width: int) -> Floats:
    """Returns the mean over width values around each; at both ends over as many as there are on the shorter side."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    half = np.minimum(np.minimum(index, len(values) - 1 - index), width // 2)
    result: Floats = (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)
    return result


def thinned(values: Floats, of_block: Callable[[Floats], float] = np.mean) -> Floats:
    """Returns at most so many values as are drawn: each stands for a block of neighbours."""
    size = math.ceil(len(values) / MOST_POINTS)
    return np.array([of_block(values[start : start + size]) for start in range(0, len(values), size)])

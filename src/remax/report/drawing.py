"""From a chart's data to an SVG that follows the page's theme, and the numbers that its crosshair reads out.

Colours are drawn as placeholders and then become the page's CSS variables: one picture serves light and dark.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from remax.markup import safe
from remax.report.shapes import Chart, Heat, Line, Panel

NUM_COLOURS = 8
PLACEHOLDERS = {"#a0b0c0": "var(--ink)", "#a0b0c1": "var(--soft)", "#a0b0c2": "var(--line)", "#a0b0c3": "var(--warn)"}
INK, SOFT, GRID, WARN = PLACEHOLDERS
COLOURS = [f"#c0a0{index:02x}" for index in range(NUM_COLOURS)]
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)))
WIDTH, PANEL, GAP, TITLE = 310, 138, 12, 15
LEFT, RIGHT, TOP, BOTTOM = 50, 6, 13, 32
"""Points, which are the units of the SVG's viewBox: a chart, its panels, and the margins for labels."""
LEVELS = 8
"""Shades of a histogram."""
ACROSS, UP = np.array([0, 1, 1, 0, 0]), np.array([0, 0, 1, 1, 0])
"""The corners of a cell, and the first one again."""


class Alarm(NamedTuple):
    """An alarm as the charts mark it."""

    run: int
    metric: str
    step: float


@dataclass(frozen=True)
class Drawing:
    """A chart as the page takes it."""

    svg: str
    readout: dict[str, Any]
    """What the crosshair shows: the axes' places in the viewBox, and the points of each line."""


def draw(charts: Sequence[Chart], num_runs: int, alarms: Sequence[Alarm] = ()) -> dict[str, Drawing]:
    """Returns the drawings by key; alarms are marked in the charts of their metric."""
    with _manners() as plt:
        return {chart.key: _draw(plt, chart, num_runs, alarms) for chart in charts}


def style_of(chart: Chart, line: Line, num_runs: int) -> tuple[int, int]:
    """Returns colour and dash of a line: phases have their own colours, else runs have, else what is measured."""
    if chart.by_phase:
        return line.style, line.style if not any(panel.stacked for panel in chart.panels) else 0
    return (line.run if num_runs > 1 else line.style) % NUM_COLOURS, line.style % len(DASHES)


def marked_in(chart: Chart, alarms: Sequence[Alarm]) -> list[Alarm]:
    """Returns the alarms of what the chart shows."""
    return [alarm for alarm in alarms if alarm.metric in chart.metrics]


@contextmanager
def _manners() -> Iterator[Any]:
    """Loads matplotlib, which draws into files only, and gives it our manners while it is used."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    manners = {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.size": 9.5,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": SOFT,
        "axes.labelcolor": SOFT,
        "axes.titlecolor": SOFT,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.labelsize": 9.5,
        "text.color": SOFT,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "axes.formatter.limits": (-3, 4),
        "axes.formatter.use_mathtext": False,
        "path.simplify_threshold": 0.4,
    }
    with matplotlib.rc_context(manners):
        yield plt


def _draw(plt: Any, chart: Chart, num_runs: int, alarms: Sequence[Alarm]) -> Drawing:
    titled = any(panel.title for panel in chart.panels)
    gap = GAP + TITLE * titled
    height = TOP + TITLE * titled + PANEL * len(chart.panels) + gap * (len(chart.panels) - 1) + BOTTOM
    # Measuring what labels need would take longer than all the drawing: they have a margin of their own.
    margins = {"left": LEFT / WIDTH, "right": 1 - RIGHT / WIDTH, "bottom": BOTTOM / height, "hspace": gap / PANEL}
    margins["top"] = 1 - (TOP + TITLE * titled) / height
    with plt.rc_context({"svg.hashsalt": chart.key}):
        figure, axes = plt.subplots(
            len(chart.panels),
            1,
            figsize=(WIDTH / 72, height / 72),
            squeeze=False,
            sharex=True,
            sharey=chart.by_phase,
            gridspec_kw=margins,
        )
        for axis, panel in zip(axes[:, 0], chart.panels, strict=True):
            _draw_panel(axis, chart, panel, num_runs)
            for alarm in marked_in(chart, alarms):
                colour = COLOURS[alarm.run] if num_runs > 1 else WARN
                mark = axis.axvline(alarm.step, color=colour, linewidth=1.2, linestyle=(0, (1, 1.5)))
                mark.set_gid(f"run{alarm.run}")
        axes[-1, 0].set_xlabel(chart.x_label)
        places = [_place(axis, height) for axis in axes[:, 0]]
        svg = _svg(figure, chart)
        plt.close(figure)
    return Drawing(svg, _readout(chart, places, num_runs))


def _draw_panel(axis: Any, chart: Chart, panel: Panel, num_runs: int) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if panel.title:
        axis.set_title(panel.title)
    axis.set_ylabel(panel.label)
    axis.yaxis.set_label_coords(-(LEFT - 8) / (WIDTH - LEFT - RIGHT), 0.5)
    if panel.stacked:
        _draw_stack(axis, chart, panel, num_runs)
    elif panel.heat is not None:
        _draw_heat(axis, panel.heat, num_runs)
    for line in () if panel.stacked else panel.lines:
        _draw_line(axis, chart, line, num_runs)
    if panel.logarithmic:
        axis.set_yscale("log")
    elif panel.from_zero or panel.stacked:
        _, top = axis.get_ylim()
        axis.set_ylim(0.0 if panel.stacked else -0.02 * top, top)  # A line at 0 stays visible.
    if not panel.logarithmic:
        axis.yaxis.set_major_locator(MaxNLocator(5))
    by_step = chart.x_label == "step"
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=by_step))
    if by_step:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_line(axis: Any, chart: Chart, line: Line, num_runs: int) -> None:
    colour, dash = style_of(chart, line, num_runs)
    look = {"color": COLOURS[colour], "linestyle": DASHES[dash], "linewidth": 1.7}
    if line.band is not None:
        band = axis.fill_between(line.x, *line.band, color=COLOURS[colour], alpha=0.16, linewidth=0)
        band.set_gid(f"run{line.run}")
    if line.faint is not None:
        (faint,) = axis.plot(*line.faint, color=COLOURS[colour], alpha=0.3, linewidth=0.8)
        faint.set_gid(f"run{line.run}")
    alone = len(line.x) == 1
    (drawn,) = axis.plot(line.x, line.y, **look, marker="o" if line.marked or alone else None, markersize=3)
    drawn.set_gid(f"run{line.run}")
    if line.steps is not None:
        (end,) = axis.plot(line.x[-1:], line.y[-1:], color=COLOURS[colour], marker="o", markersize=7)
        end.set_gid(f"run{line.run}")


def _draw_stack(axis: Any, chart: Chart, panel: Panel, num_runs: int) -> None:
    bottom = np.zeros(len(panel.lines[0].y))
    for line in panel.lines:
        colour, _ = style_of(chart, line, num_runs)
        if len(line.x) == 1:
            axis.bar(line.x, line.y, 0.8, bottom=bottom, color=COLOURS[colour], alpha=0.75)
        else:
            axis.fill_between(line.x, bottom, bottom + line.y, color=COLOURS[colour], alpha=0.75, linewidth=0)
        bottom = bottom + line.y


def _draw_heat(axis: Any, heat: Heat, num_runs: int) -> None:
    """Draws the cells of each shade as one path."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    strongest = heat.shares.max()
    levels = np.ceil(LEVELS * np.sqrt(heat.shares / strongest))
    for level in range(1, LEVELS + 1):
        cells = [
            Outline(np.column_stack([heat.x_edges[column + ACROSS], heat.y_edges[row + UP]]), closed=True)
            for row, column in zip(*np.nonzero(levels == level), strict=True)
        ]
        if cells:
            outline = Outline.make_compound_path(*cells)
            colour = COLOURS[heat.run % NUM_COLOURS if num_runs > 1 else 0]
            axis.add_patch(PathPatch(outline, facecolor=colour, alpha=level / LEVELS, linewidth=0))
    axis.set_xlim(heat.x_edges[0], heat.x_edges[-1])
    axis.set_ylim(heat.y_edges[0], heat.y_edges[-1])
    axis.grid(visible=False)


def _place(axis: Any, height: float) -> dict[str, Any]:
    """Returns where the axes are in the viewBox, whose y goes down, and the limits of their values."""
    box = axis.get_position()
    return {
        "box": [_short(v) for v in (box.x0 * WIDTH, (1 - box.y1) * height, box.x1 * WIDTH, (1 - box.y0) * height)],
        "x": [_short(v) for v in axis.get_xlim()],
        "y": [_short(v) for v in axis.get_ylim()],
    }


def _svg(figure: Any, chart: Chart) -> str:
    """Returns the picture as an element of a page: without what a file has, without styles of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="(run\d+)">', r'<g class="\1">', text)
    text = re.sub(r'<g id="(?!run)[A-Za-z0-9.]+_\d+">', "<g>", text)
    text = re.sub(r"font-family: [^;\"]+; ", "", text)
    text = re.sub(r"\n\s*", "\n", text)
    for placeholder, variable in _variables().items():
        text = text.replace(placeholder, variable)
    described = f'role="img" aria-label="{safe(_described(chart))}"'
    return re.sub(r'^<svg [^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" {described}>', text)


def _variables() -> dict[str, str]:
    return PLACEHOLDERS | {colour: f"var(--c{index})" for index, colour in enumerate(COLOURS)}


def _described(chart: Chart) -> str:
    """Returns the chart in words, for those who hear the page."""
    parts = [
        f"{panel.title or panel.label}, {line.name}: from {line.y[0]:.3g} to {line.y[-1]:.3g}"
        for panel in chart.panels
        for line in panel.lines
    ]
    return f"{chart.title}. {'; '.join(parts)}" if parts else chart.title


def _readout(chart: Chart, places: Sequence[dict[str, Any]], num_runs: int) -> dict[str, Any]:
    panels = []
    for place, panel in zip(places, chart.panels, strict=True):
        lines = []
        for line in panel.lines:
            colour, _ = style_of(chart, line, num_runs)
            points = {"x": _points(line.x), "y": _points(line.y)}
            if line.steps is not None:
                points["steps"] = _points(line.steps)
            lines.append({"run": line.run, "name": line.name, "colour": colour, **points})
        panels.append({**place, "label": panel.title or panel.label, "lines": lines})
    return {"path": any(line.steps is not None for panel in chart.panels for line in panel.lines), "panels": panels}


def _points(values: Any) -> list[float]:
    return [_short(value) for value in values]


def _short(value: float) -> float:
    """Returns a number with the digits that a reader needs."""
    short = float(f"{value:.5g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short

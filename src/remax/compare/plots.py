"""The pictures of a comparison: what was gained for what, how the policies changed, and what a step costs."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from remax.compare import statistics
from remax.compare.records import Run, number, read_runs
from remax.compare.results import PHASES
from remax.compare.statistics import Floats
from remax.compare.tables import decimals_for, number_text
from remax.untrusted import printable

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers tell apart; yellow is left out, which white paper swallows."""

MARKERS = "osD^vPX"
MARK_EVERY = 0.15
"""Of the panel's diagonal, along the line."""

STYLES = ("-", "--", ":", "-.")
REWARD_TITLES = {"reward": "learned reward", "gold": "gold reward"}
SPENT_TITLES = {"step": "training steps", "tokens": "generated tokens", "seconds": "training seconds"}
POLICY_TITLES = {
    "length": "length, tokens",
    "entropy": "entropy, nats per token",
    "kl": "KL to the initial policy,\nnats per sequence",
}
SHADES = (1.0, 0.66, 0.42, 0.24, 0.1)
"""How strong the method's colour is in the bars of rollout, reward, reference, update and the rest."""

Look = Mapping[str, Any]


def plot(folder: Path, results: Mapping[str, Any]) -> dict[str, Path]:
    """Draws the pictures into the folder "plots" and returns their paths by name: rewards, policy, cost.

    A picture for which there is nothing to show is left out.
    """
    runs = {label: finished for label, finished in read_runs(folder, results).items() if finished}
    looks = _looks(results["methods"])
    drawings: dict[str, Callable[[], Any]] = {
        "rewards": lambda: _draw_rewards(runs, looks),
        "policy": lambda: _draw_policy(runs, looks),
        "cost": lambda: _draw_cost(results, looks),
    }
    home = folder / "plots"
    home.mkdir(exist_ok=True)
    paths = {}
    with _drawing() as plt:
        for name, draw in drawings.items():
            (home / f"{name}.png").unlink(missing_ok=True)  # of an earlier, different state of the comparison
            figure = draw()
            if figure is not None:
                paths[name] = home / f"{name}.png"
                figure.savefig(paths[name])
                plt.close(figure)
    return paths


@contextmanager
def _drawing() -> Iterator[Any]:
    """Loads matplotlib, which draws into files only, and gives it our manners while it is used."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    manners = {
        "text.parse_math": False,  # a label is free text, and "$" is none of our formulas
        "font.size": 10,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.25,
        "savefig.dpi": 150,
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context(manners), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield plt


def _looks(labels: Sequence[str]) -> dict[str, Look]:
    """Returns how each method is drawn: the same in every picture; beyond seven, the style of the line changes."""
    return {
        label: {
            "color": PALETTE[index % len(PALETTE)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": STYLES[index // len(PALETTE) % len(STYLES)],
        }
        for index, label in enumerate(labels)
    }


def short_name(label: str) -> str:
    """Returns a label that fits beside an axis."""
    text = " ".join(printable(label).split())
    return text if len(text) <= 28 else text[:27] + "\N{HORIZONTAL ELLIPSIS}"


def aligned(runs: Sequence[Run], x_name: str, y_name: str) -> tuple[Floats, Floats]:
    """Returns the evaluations' y of all seeds at common x: [points], [seeds, points].

    The points are all x of any seed within the range that all seeds cover; between its own evaluations a seed is
    interpolated linearly. Seeds without values are left out.
    """
    curves = [curve for run in runs if len(curve := _curve(run, x_name, y_name))]
    if not curves:
        return np.empty(0), np.empty((0, 0))
    start, end = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    points = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    points = points[(points >= start) & (points <= end)]
    return points, np.array([np.interp(points, curve[:, 0], curve[:, 1]) for curve in curves])


def _curve(run: Run, x_name: str, y_name: str) -> Floats:
    """Returns the (x, y) of a run's evaluations that have both, x strictly increasing."""
    rows = np.array([[number(e.get(x_name)), number(e.get(y_name))] for e in run.evaluations]).reshape(-1, 2)
    rows = rows[~np.isnan(rows).any(axis=1)]
    curve: Floats = rows[np.unique(rows[:, 0], return_index=True)[1]] if len(rows) else rows
    return curve


def _draw_rewards(runs: Mapping[str, Sequence[Run]], looks: Mapping[str, Look]) -> Any:
    import matplotlib.pyplot as plt

    rewards = [name for name in REWARD_TITLES if _any_value(runs, name)]
    if not rewards:
        return None
    figure, axes = plt.subplots(
        len(rewards), 4, figsize=(12, 0.7 + 2.7 * len(rewards)), squeeze=False, sharey="row", sharex="col"
    )
    for row, name in zip(axes, rewards, strict=True):
        for axis, x_name in zip(row, SPENT_TITLES, strict=False):
            for label, finished in runs.items():
                _draw_band(axis, *aligned(finished, x_name, name), looks[label])
        for label, finished in runs.items():
            _draw_path(row[3], finished, name, looks[label])
        row[0].set_ylabel(f"{REWARD_TITLES[name]},\nheld-out mean")
    for axis, title in zip(axes[-1], (*SPENT_TITLES.values(), "KL to the initial policy, nats"), strict=True):
        axis.set_xlabel(title)
        _plain_numbers(axis)
    _legend(figure, runs, looks)
    return figure


def _draw_policy(runs: Mapping[str, Sequence[Run]], looks: Mapping[str, Look]) -> Any:
    import matplotlib.pyplot as plt

    shown = [name for name in POLICY_TITLES if _any_value(runs, name)]
    if not shown:
        return None
    figure, axes = plt.subplots(1, len(shown), figsize=(12, 3.6), squeeze=False)
    for axis, name in zip(axes[0], shown, strict=True):
        for label, finished in runs.items():
            _draw_band(axis, *aligned(finished, "step", name), looks[label])
        axis.set(xlabel=SPENT_TITLES["step"], ylabel=POLICY_TITLES[name])
        _plain_numbers(axis)
    _legend(figure, runs, looks)
    return figure


def _draw_band(axis: Any, points: Floats, values: Floats, look: Look) -> None:
    """Draws the mean over seeds and, where there are several, the band of its 95% bootstrap interval."""
    if not len(points):
        return
    estimates = [statistics.mean(column) for column in values.T]
    axis.plot(points, [e.value for e in estimates], **look, markersize=4, markevery=MARK_EVERY, linewidth=1.6)
    intervals = [e.interval for e in estimates if e.interval is not None]
    if intervals:
        low, high = zip(*intervals, strict=True)
        axis.fill_between(points, low, high, color=look["color"], alpha=0.16, linewidth=0)


def _draw_path(axis: Any, runs: Sequence[Run], name: str, look: Look) -> None:
    """Draws the path of (mean KL, mean reward) over the common steps; the cross at its end holds both intervals.

    KL may fall again, so it cannot be an axis to interpolate on.
    """
    paired = [run for run in runs if len(_curve(run, "step", "kl")) and len(_curve(run, "step", name))]
    (kl_steps, kls), (steps, rewards) = aligned(paired, "step", "kl"), aligned(paired, "step", name)
    common = np.intersect1d(kl_steps, steps)
    if not len(common):
        return
    kls, rewards = kls[:, np.isin(kl_steps, common)], rewards[:, np.isin(steps, common)]
    axis.plot(kls.mean(0), rewards.mean(0), **look, markersize=4, markevery=MARK_EVERY, linewidth=1.6)
    x, y = statistics.mean(kls[:, -1]), statistics.mean(rewards[:, -1])
    for estimate, draw in ((x, axis.hlines), (y, axis.vlines)):
        if estimate.interval is not None:
            draw(y.value if estimate is x else x.value, *estimate.interval, color=look["color"], linewidth=2.4)


def _draw_cost(results: Mapping[str, Any], looks: Mapping[str, Look]) -> Any:
    import matplotlib.pyplot as plt

    metrics = {label: method["metrics"] for label, method in results["methods"].items() if method["seeds"]}
    times = {label: _phase_times(of) for label, of in metrics.items()}
    memories = {label: [(of[f"memory/{p}"]["mean"] or 0.0) / 2**30 for p in PHASES] for label, of in metrics.items()}
    panels = [
        (title, bars, stacked)
        for title, bars, stacked in (
            ("seconds per step, median", times, True),
            ("peak memory, GiB", memories, False),
        )
        if any(any(values) for values in bars.values())
    ]
    if not panels:
        return None
    size = (12, 1.5 + 0.62 * len(metrics))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
    for axis, (title, bars, stacked) in zip(axes[0], panels, strict=True):
        _draw_bars(axis, bars, looks, stacked=stacked)
        axis.set_xlabel(title)
        axis.grid(visible=False, axis="y")
        axis.margins(x=0.12)
    axes[0, 0].set_yticks(range(len(metrics)), [short_name(label) for label in metrics])
    axes[0, 0].invert_yaxis()
    names = [*PHASES, "rest"] if any(values[-1] for values in times.values()) else PHASES
    patches = [plt.Rectangle((0, 0), 1, 1, color=_tint("#333333", shade)) for shade in SHADES]
    figure.legend(patches[: len(names)], names, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def _phase_times(metrics: Mapping[str, Any]) -> list[float]:
    """Returns the seconds of the phases and the rest of the step, which is shown from 1% of the step on."""
    phases = [metrics[f"time/{phase}"]["mean"] or 0.0 for phase in PHASES]
    whole = metrics["time/step"]["mean"] or 0.0
    rest = whole - sum(phases)
    return [*phases, rest if rest > 0.01 * whole else 0.0]


def _draw_bars(axis: Any, bars: Mapping[str, Sequence[float]], looks: Mapping[str, Look], *, stacked: bool) -> None:
    """Draws a row per method with a bar per phase: end to end for what adds up, below each other for what does not."""
    largest = max(sum(values) if stacked else max(values) for values in bars.values())
    decimals = decimals_for([largest])
    thickness = 0.66 if stacked else 0.76 / len(PHASES)
    for row, (label, values) in enumerate(bars.items()):
        left = 0.0
        for phase, (value, shade) in enumerate(zip(values, SHADES, strict=False)):
            height = row if stacked else row + (phase - (len(PHASES) - 1) / 2) * thickness
            color = _tint(looks[label]["color"], shade)
            axis.barh(height, value, thickness, left=left, color=color, edgecolor="white", linewidth=0.6)
            if not stacked and value:
                axis.text(value, height, f" {number_text(value, decimals)}", va="center_baseline", fontsize=8)
            if stacked and value > 0.08 * largest:
                place = {"ha": "center", "va": "center_baseline", "fontsize": 8.5, "color": _ink(color)}
                axis.text(left + value / 2, height, number_text(value, decimals), **place)
            left += value if stacked else 0.0
        if stacked:
            axis.text(left, row, f" {number_text(left, decimals)}", va="center_baseline", fontweight="bold")


def _ink(color: tuple[float, float, float]) -> str:
    """Returns what can be read on a colour."""
    red, green, blue = color
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _tint(color: str, shade: float) -> tuple[float, float, float]:
    """Returns the colour mixed with white; unlike transparency, it hides the grid."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - shade * (1 - part) for part in to_rgb(color))
    return red, green, blue


def _legend(figure: Any, labels: Sequence[str] | Mapping[str, Any], looks: Mapping[str, Look]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], **looks[label], markersize=5, linewidth=2) for label in labels]
    columns = min(len(lines), 3 if any(len(label) > 16 for label in labels) else 6)
    # Filled in afterwards: a legend leaves out what is called "_something".
    legend = figure.legend(lines, ["-"] * len(lines), loc="outside upper center", ncols=columns, frameon=False)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(short_name(label))


def _plain_numbers(axis: Any) -> None:
    """Writes 200 k for 200000."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))


def _any_value(runs: Mapping[str, Sequence[Run]], name: str) -> bool:
    return any(len(_curve(run, "step", name)) for finished in runs.values() for run in finished)

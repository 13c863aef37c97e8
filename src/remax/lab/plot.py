"""lab.png: noise and cost of all methods beside each other, and where in the model the variance is."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999", "#8c564b")
"""Okabe and Ito's colours, which colour-blind readers tell apart, and two more; the marks differ besides."""
MARKERS = "osD^vPXp*"
MANNERS = {
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
}
MOST_LAYER_NAMES = 10
SECTION_LIFT = 0.16
"""How far apart the marks of the two sections are, in rows."""


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draws the experiment: relative variance, tokens to SNR 1, and the variance of each layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sections, settings = results["sections"], results["settings"]
    labels = list(sections[0]["methods"])
    with matplotlib.rc_context(MANNERS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = plt.figure(figsize=(10, 4.6 + 0.42 * len(labels)))
        grid = figure.add_gridspec(2, 2, height_ratios=(0.9 + 0.42 * len(labels), 3.0))
        left = figure.add_subplot(grid[0, 0])
        right = figure.add_subplot(grid[0, 1], sharey=left)
        _draw_estimates(left, sections, labels, "relative_variance")
        left.set_xlabel("relative variance (1/SNR)")
        _draw_estimates(right, sections, labels, "tokens_to_snr_1")
        right.set_xlabel("tokens to SNR 1, sampled and greedy")
        right.tick_params(labelleft=False)
        _draw_layers(figure.add_subplot(grid[1, :]), sections, labels)
        figure.suptitle(
            f"{settings['num_gradients']} gradients of {settings['batch_size']} prompts at "
            f"{_plain(Path(settings['model']).name)}: less is better; bars are 95% intervals",
            fontsize=11,
        )
        if len(sections) > 1:
            figure.legend(*_section_marks(sections), loc="outside lower center", ncols=len(sections), frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_estimates(axes: Any, sections: Sequence[Mapping[str, Any]], labels: Sequence[str], name: str) -> None:
    """Draws one estimate of all methods with its interval; an interval without upper end ends in an arrow."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    estimates = [section["methods"][label][name] for section in sections for label in labels]
    known = [number for e in estimates for number in (e["value"], *e["interval"]) if number]
    right, span = max(known, default=1.0) * 1.5, max(known, default=1.0) / min(known, default=1.0)
    for shift, section in enumerate(sections):
        for row, label in enumerate(labels):
            estimate = section["methods"][label][name]
            (low, high), value = estimate["interval"], estimate["value"]
            y = row + (2 * shift - len(sections) + 1) * SECTION_LIFT
            color = PALETTE[row % len(PALETTE)]
            if low is not None:
                axes.plot([low, high or right], [y, y], color=color, linewidth=2, alpha=0.6)
            if high is None:
                axes.plot([right], [y], ">", color=color, markersize=5, clip_on=False)
            if value is not None:
                axes.plot([value], [y], **_marks(row, shift), markersize=7)
    axes.set_xscale("log")
    axes.set_xlim(right=right)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if span > 100 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(False, axis="y")


def _draw_layers(axes: Any, sections: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Draws the variance of each layer, for the methods whose variances compare."""
    shown = [label for label in labels if sections[0]["methods"][label]["same_expectation"]] or labels[:1]
    for shift, section in enumerate(sections):
        for label in shown:
            by_layer = section["methods"][label]["variance_by_layer"]
            values = [estimate["value"] or float("nan") for estimate in by_layer.values()]
            style = {"linestyle": "--" if shift else "-", "label": None if shift else label}
            axes.plot(
                range(len(by_layer)),
                values,
                **_marks(labels.index(label), shift),
                **style,
                markersize=9 - 4 * (1 - shift),
            )
    names = list(sections[0]["methods"][shown[0]]["variance_by_layer"])
    every = -(-len(names) // MOST_LAYER_NAMES)
    axes.set_xticks(range(0, len(names), every), [_plain(name) for name in names[::every]], rotation=20)
    axes.set_yscale("log")
    axes.set_ylabel("variance of a gradient\n(reward² per weight²)")
    axes.set_xlabel("layer")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="same expected\ngradient")


def _plain(text: str) -> str:
    """Returns free text so that a "$" in it begins no formula."""
    return text.replace("$", r"\$")


def _marks(row: int, shift: int) -> dict[str, Any]:
    """Returns how the marks of a method look: filled without offset, hollow with it."""
    color = PALETTE[row % len(PALETTE)]
    return {
        "color": color,
        "marker": MARKERS[row % len(MARKERS)],
        "markerfacecolor": "none" if shift else color,
        "markeredgewidth": 1.5,
    }


def _section_marks(sections: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[str]]:
    """Returns what tells the sections apart, for a legend."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color="#555555", marker="o", markerfacecolor=face, linestyle=style)
        for face, style in (("#555555", "-"), ("white", "--"))
    ]
    offset = sections[1]["reward_offset"]
    return handles, ["rewards as they are", f"rewards shifted by N(0, {offset:g} sd) per prompt"]

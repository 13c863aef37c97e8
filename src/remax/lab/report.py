"""The outcome of an experiment as lab.json and as tables; lab.png is drawn by plot.py."""

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from remax.lab.measurement import Figures, Measurement
from remax.lab.statistics import Estimate

NOTHING = "\N{EN DASH}"
UNITS = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
TABLE_WIDTH = 160
NOTES_WIDTH = 120
VERSIONS = ("remax-rlhf", "torch", "transformers", "numpy")
FOOTNOTES = (
    "Below the figures are 95% bootstrap intervals. Comparable between all methods are the relative variance (1/SNR: "
    "the variance over the squared length of the expected gradient), the cosine (to the mean of the other gradients) "
    "and tokens to SNR 1 (tokens whose gradients average to as much signal as noise).",
    "Variance (trace of the covariance) and variance x tokens (at any common budget of tokens, lower is better) depend "
    "on the gradient's scale: they compare methods with the same expected gradient, those that have an agreement.",
    "With an offset, ppo's value model is still the one from before: in a training it would learn the offsets in time.",
    "Agreement: distance of the mean gradient from that of the first such method in standard errors, about 1 where "
    "the expectations are the same; p: how often chance alone takes them as far apart.",
)


def as_json(measurement: Measurement, settings: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
    """Returns all that was measured, with settings and versions; what is not finite is None."""
    results = {
        "settings": dict(settings),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
        "seconds": seconds,
        "num_weights": measurement.num_weights,
        "reward": {"mean": measurement.reward_mean, "std": measurement.reward_std},
        "sections": [
            {
                "reward_offset": section.reward_offset,
                "methods": {label: _figures(figures) for label, figures in section.methods.items()},
            }
            for section in measurement.sections
        ],
    }
    finite: dict[str, Any] = _finite(results)
    return finite


def _figures(figures: Figures) -> dict[str, Any]:
    return {
        **{name: _estimate(estimate) for name, estimate in figures.estimates.items()},
        "variance_by_layer": {name: _estimate(estimate) for name, estimate in figures.by_layer.items()},
        "cosines": figures.cosines.tolist(),
        "agreement": figures.agreement and figures.agreement._asdict(),
        "same_expectation": figures.same_expectation,
        "num_generations": figures.num_generations,
        "same_gradients": figures.same_gradients,
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "interval": list(estimate.interval)}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Writes lab.json."""
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "lab.json").write_text(text + "\n", encoding="utf-8")


def print_tables(results: Mapping[str, Any]) -> None:
    """Prints a table for each section, and how to read them."""
    console = Console(width=TABLE_WIDTH)
    for section in results["sections"]:
        console.print(_table(results, section))
    for note in FOOTNOTES:
        console.print(Text(note, style="dim"), width=NOTES_WIDTH)


def _table(results: Mapping[str, Any], section: Mapping[str, Any]) -> Table:
    methods, settings, offset = section["methods"], results["settings"], section["reward_offset"]
    first = next(iter(methods))
    title = f"{settings['num_gradients']} gradients of {settings['batch_size']} prompts each, "
    title += f"rewards shifted by N(0, {offset:g} sd) per prompt" if offset else "rewards as they are"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    headings = [
        *("method\nsamples", "tokens\n+ greedy", "no\nsignal", "cosine", "relative\nvariance", "tokens to\nSNR 1"),
        *("variance", f"variance\n/ {first}", "variance\nx tokens", "agreement"),
    ]
    if offset:
        headings.append("variance\n/ no offset")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right", no_wrap=True)
    for label, figures in methods.items():
        comparable = figures["same_expectation"] and methods[first]["same_expectation"]
        cells = [
            _two_lines(label, f"{figures['num_generations']} per prompt"),
            _two_lines(number(figures["sampled_tokens"]["value"]), _greedy(figures)),
            Text(_or_nothing(figures["no_signal"]["value"], "{:.0%}")),
            Text(_or_nothing(figures["cosine"]["value"], "{:.2f}")),
            *(_with_interval(figures[name]) for name in ("relative_variance", "tokens_to_snr_1", "variance")),
            _with_interval(figures["variance_ratio"]) if comparable and label != first else Text(NOTHING),
            Text(number(figures["variance_x_tokens"]["value"])),
            _agreement(figures),
        ]
        if offset:
            cells.append(Text("unmoved") if figures["same_gradients"] else _with_interval(figures["offset_ratio"]))
        table.add_row(*cells)
    return table


def _two_lines(above: str, below: str) -> Text:
    return Text(above).append(f"\n{below}", style="dim")


def _greedy(figures: Mapping[str, Any]) -> str:
    greedy = figures["greedy_tokens"]["value"]
    return f"+ {number(greedy)}" if greedy else ""


def _or_nothing(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def _with_interval(estimate: Mapping[str, Any]) -> Text:
    low, high = estimate["interval"]
    return _two_lines(number(estimate["value"]), f"{number(low)}{NOTHING}{number(high)}")


def _agreement(figures: Mapping[str, Any]) -> Text:
    if figures["agreement"] is None:
        return Text("(first)" if figures["same_expectation"] else NOTHING)
    return _two_lines(number(figures["agreement"]["distance"]), f"p {figures['agreement']['p_value']:.2f}")


def number(value: float | None) -> str:
    """Returns three significant digits, large numbers in thousands (k), millions (M) and so on; None was not finite."""
    if value is None:
        return "\N{INFINITY}"
    size = abs(value)
    if value and not 1e-3 <= size < 1e12:
        return f"{value:.1e}"
    scale, unit = next(((scale, unit) for least, scale, unit in UNITS if size >= least), (1.0, ""))
    return f"{value / scale:.0f}{unit}" if size / scale >= 100 else f"{value / scale:.3g}{unit}"

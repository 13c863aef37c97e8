"""How the demo shows what it found: a table, stories side by side, and curves."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from remax.demo.stories import gold_score
from remax.untrusted import printable

UNITS = {
    "gold score": "of 3, by the hidden reader",
    "kind stories": "share with a gold score above 1",
    "learned reward": "by the reward model",
    "KL": "nats per story, to the model before",
    "length": "tokens",
}
NUM_SHOWN = 5


@dataclass(frozen=True)
class Measurement:
    """The figures of one policy on the held-out openings."""

    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """95% bootstrap intervals of the means."""
    completions: list[str]
    """One sample per opening."""


def print_results(prompts: Sequence[str], before: Measurement, after: Measurement) -> None:
    """Prints the figures before and after, and some stories of both for the same openings."""
    console = Console()
    figures = Table(title=f"{len(prompts)} held-out openings, mean and 95% interval", title_justify="left")
    for title in ("", "before", "after", "unit"):
        figures.add_column(title)
    for name, unit in UNITS.items():
        cells = [_figure(m.means[name], *m.intervals[name]) for m in (before, after)]
        figures.add_row(name, *cells, unit)
    console.print(figures)

    stories = Table(title="The same openings before and after", title_justify="left", show_lines=True)
    for title in ("opening", "before", "after"):
        stories.add_column(title, ratio=1)
    for prompt, *continuations in list(zip(prompts, before.completions, after.completions, strict=True))[:NUM_SHOWN]:
        texts = [Text(f"{printable(text.strip())} [{gold_score(prompt, text):+.1f}]") for text in continuations]
        stories.add_row(Text(printable(prompt)), *texts)
    console.print(stories)


def _figure(mean: float, low: float, high: float) -> str:
    mean, low, high = (round(value, 2) + 0.0 for value in (mean, low, high))  # no "-0.00"
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def plot_curves(run: Path, path: Path) -> None:
    """Draws gold score, learned reward, KL and length over the steps of a ReMax run and saves them as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [m["step"] for m in metrics]
    gold: dict[int, list[float]] = {step: [] for step in steps}
    for line in (run / "completions.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        gold[record["step"]].append(gold_score(record["prompt"], record["completion"]))

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), constrained_layout=True)
    axes[0].plot(steps, [sum(gold[step]) / len(gold[step]) for step in steps], color="#2a7f62")
    axes[0].set(title="gold score (never trained on)", ylim=(-3, 3))
    axes[1].plot(steps, [m["reward"] for m in metrics], label="sampled", color="#3465a4")
    axes[1].plot(steps, [m["reward/greedy"] for m in metrics], label="greedy baseline", color="#e08e0b", linewidth=1)
    axes[1].set(title="learned reward")
    axes[1].legend(frameon=False)
    axes[2].plot(steps, [m["kl"] for m in metrics], color="#a03c5a")
    axes[2].set(title="KL to the model before, nats")
    axes[3].plot(steps, [m["completions/mean_length"] for m in metrics], color="#555555")
    axes[3].set(title="length, tokens", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("ReMax step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)

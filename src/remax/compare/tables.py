"""The results of a comparison as a table, for the terminal and for Markdown, and in one sentence."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from remax.compare.results import CONTROLLED, FEW_SEEDS
from remax.markup import NOTHING
from remax.untrusted import printable

TABLE_WIDTH = 120
GIB = 2**30


@dataclass(frozen=True)
class Column:
    """A metric as a column of the table."""

    metric: str
    title: str
    unit: str = ""
    with_interval: bool = False
    scale: float = 1.0
    """What a value is multiplied with before it is shown."""


COLUMNS = (
    Column("reward", "learned reward", with_interval=True),
    Column("gold", "gold reward", with_interval=True),
    Column(f"reward/{CONTROLLED}", "learned, same length"),
    Column(f"gold/{CONTROLLED}", "gold, same length"),
    Column("kl", "KL", "nats"),
    Column("length", "length", "tokens"),
    Column("entropy", "entropy", "nats"),
    Column("time/step", "time", "s/step"),
    Column("memory/peak", "memory", "GiB", scale=1 / GIB),
)


def shown_columns(results: Mapping[str, Any], columns: Iterable[Column] = COLUMNS) -> list[Column]:
    """Returns the columns for which at least one method has a value."""
    methods = results["methods"].values()
    return [c for c in columns if any(method["metrics"][c.metric]["mean"] is not None for method in methods)]


def cells(results: Mapping[str, Any], column: Column) -> list[tuple[str, str | None]]:
    """Returns, method by method, the mean and its interval as texts; None where the column shows no interval.

    All figures of a column have the same number of decimals.
    """
    metrics = [method["metrics"][column.metric] for method in results["methods"].values()]
    shown = [m["mean"] for m in metrics] + [v for m in metrics for v in m["mean_interval"] or []]
    decimals = decimals_for([value * column.scale for value in shown if value is not None])
    texts: list[tuple[str, str | None]] = []
    for metric in metrics:
        value, interval = (_scaled(metric[name], column.scale) for name in ("mean", "mean_interval"))
        mean = number_text(value, decimals)
        texts.append((mean, interval_text(interval, decimals) if column.with_interval else None))
    return texts


def _scaled(value: Any, scale: float) -> Any:
    if value is None:
        return None
    return [item * scale for item in value] if isinstance(value, list) else value * scale


def decimals_for(values: Iterable[float]) -> int:
    """Returns how many decimals give the largest of these values three to four significant digits."""
    largest = max((abs(value) for value in values), default=0.0)
    return max(0, 3 - math.floor(math.log10(largest)) - 1) if largest >= 1 else 3


def number_text(value: float | None, decimals: int) -> str:
    """Returns a number as text, never "-0.00"; a dash where there is none."""
    return NOTHING if value is None else f"{round(value, decimals) + 0.0:,.{decimals}f}"


def interval_text(interval: Sequence[float] | None, decimals: int) -> str:
    """Returns an interval as text; a dash where there is none."""
    return NOTHING if interval is None else " to ".join(number_text(value, decimals) for value in interval)


def print_table(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints one row per method, the notes and the headline.

    The table is up to 120 characters wide whatever standard output is, so that nothing is cut in a file.
    """
    console = console or Console(width=max(Console().width, TABLE_WIDTH))
    table = Table(box=None, padding=(0, 2, 0, 0), title=_title(results), title_justify="left", title_style="bold")
    table.add_column("method", overflow="fold", max_width=18)
    columns = shown_columns(results)
    for column in columns:
        title = column.title.replace(", ", ",\n") + (f"\n{column.unit}" if column.unit else "")
        table.add_column(title, justify="right", no_wrap=True)
    shown = [cells(results, column) for column in columns]
    for row, (label, method) in enumerate(results["methods"].items()):
        texts = ["\n".join(part for part in column[row] if part is not None) for column in shown]
        table.add_row(Text(f"{printable(label)}\n{_seeds(method)}"), *texts)
    console.print(table)
    console.print(Text(f"\n{about(results)}"))
    for note in results["notes"]:
        console.print(Text(printable(note)), style="yellow")
    console.print(Text(f"\n{printable(headline(results))}", style="bold"))


def markdown_table(results: Mapping[str, Any]) -> str:
    """Returns the table in Markdown, one row per method."""
    columns = shown_columns(results)
    heads = ["method", "seeds", "own settings", *(c.title + (f", {c.unit}" if c.unit else "") for c in columns)]
    shown = [cells(results, column) for column in columns]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row, (label, method) in enumerate(results["methods"].items()):
        own = NOTHING if method["hyperparameters"] is None else str(len(method["hyperparameters"]))
        figures = [beside(*column[row]) for column in shown]
        lines.append([_plain(label), str(len(method["seeds"])), own, *figures])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{about(results)}\n"


def beside(mean: str, interval: str | None) -> str:
    """Returns a cell as one line."""
    return mean if interval in (None, NOTHING) else f"{mean} ({interval})"


def _plain(label: str) -> str:
    """Returns a label as Markdown that shows it as it is, within one cell."""
    text = " ".join(printable(label).split())
    return "".join(f"\\{c}" if c in "\\|`*_[]<>&$~#!" else c for c in text)


def _seeds(method: Mapping[str, Any]) -> str:
    count = len(method["seeds"])
    return f"{count} seed" if count == 1 else f"{count} seeds"


def _title(results: Mapping[str, Any]) -> str:
    count = len(results["methods"])
    return f"{count} method{'s' * (count != 1)} after {budget_text(results)} each, on held-out prompts"


def budget_text(results: Mapping[str, Any]) -> str:
    """Returns the budget, such as "3,200 prompts"."""
    return f"{results['budget']['amount']:,.0f} {results['budget']['unit']}"


def about(results: Mapping[str, Any]) -> str:
    """Returns the sentences that say what the figures of the table are."""
    text = (
        "Mean over seeds with its 95% bootstrap interval; KL per sequence, entropy per token; "
        "time: median over steps; memory: peak."
    )
    initial, control = results["initial"], results["length_control"]["reward"]
    if control is not None:
        text += (
            f" Same length: as if all completions had the {initial['length']:.1f} tokens from before training; one "
            f"token more goes with {control['slope']['value']:+.2g} learned reward"
        )
        gold = results["length_control"]["gold"]
        text += "." if gold is None else f" and {gold['slope']['value']:+.2g} gold reward."
    known = {"reward": "learned reward", "gold": "gold reward"}
    before = [f"{name} {number_text(initial[key], 3)}" for key, name in known.items() if initial[key] is not None]
    return text + (f" Before training: {', '.join(before)}." if before else "")


def headline(results: Mapping[str, Any]) -> str:
    """Returns the outcome in one sentence: which method has the highest mean, and what separates it from the first.

    By the gold reward where there is one, else by the learned reward.
    """
    methods = results["methods"]
    name, title = next(
        ((n, t) for n, t in (("gold", "gold reward"), ("reward", "learned reward")) if _means(methods, n)), ("", "")
    )
    means = _means(methods, name)
    if not means:
        return "No run is finished yet."
    best = max(means, key=lambda label: means[label])
    metric = methods[best]["metrics"][name]
    decimals = decimals_for(means.values())
    num_runs, num_missing = len(methods) * len(results["seeds"]), len(results["missing"])
    sentence = f"With {num_runs - num_missing} of {num_runs} runs finished, after" if num_missing else "After"
    sentence += f" {budget_text(results)}, {best} reaches a {title} of {number_text(metric['mean'], decimals)}"
    if metric["mean_interval"] is not None:
        sentence += f" ({interval_text(metric['mean_interval'], decimals)})"
    if len(means) == 1:
        before = results["initial"][name]
        return sentence + ("." if before is None else f", from {number_text(before, decimals)} before training.")
    sentence += f", the highest of {len(means)} methods"
    return sentence + _separation(results, name, means, best, decimals) + "."


def _means(methods: Mapping[str, Any], name: str) -> dict[str, float]:
    means = {label: method["metrics"][name]["mean"] for label, method in methods.items()} if name else {}
    return {label: value for label, value in means.items() if value is not None}


def _separation(results: Mapping[str, Any], name: str, means: Mapping[str, float], best: str, decimals: int) -> str:
    """Returns how far the best is from the first method or, if it is the first, from the runner-up."""
    first = next(iter(results["methods"]))
    if first not in means:
        return ""
    other = best if best != first else max((label for label in means if label != first), key=lambda label: means[label])
    rival = first if best != first else other
    pair = next(pair for pair in results["pairwise"] if pair["label"] == other)["metrics"][name]
    if pair is None or pair["difference"] is None:
        return f"; {rival} and {best} share no seed"
    difference = pair["difference"]
    sign = 1 if best != first else -1
    sentence = f"; the difference to {rival} is {number_text(sign * difference['value'], decimals)}"
    if difference["interval"] is None:
        return sentence + ", from one seed, which cannot tell it from chance"
    interval = sorted(sign * value for value in difference["interval"])
    sentence += f" ({interval_text(interval, decimals)})"
    if interval[0] <= 0 <= interval[1]:
        return sentence + ", within the spread of the seeds"
    if len(difference["seeds"]) < FEW_SEEDS:
        return sentence + f", beyond the spread of the seeds, but {len(difference['seeds'])} seeds are few"
    return sentence + ", beyond the spread of the seeds"

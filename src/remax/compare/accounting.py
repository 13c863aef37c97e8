"""`remax compare --accounting`: what a step of every method costs, measured beside what is predicted.

measure.py takes the steps, predict.py has the formulas; here are the totals, the tables and the files.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from remax.compare.measure import measure_run
from remax.compare.spec import Run
from remax.compare.tables import TABLE_WIDTH, decimals_for, number_text
from remax.config import CompareInputs
from remax.errors import UserError
from remax.recording import write_json
from remax.untrusted import printable

MIB = 2**20
GIGA = 10**9
PHASES = ("rollout", "reward", "reference", "update")
EPOCHS = (1, 2, 4, 8)
"""Of PPO, for which the operations of a step are told."""

Pair = tuple[float | None, float | None]
"""What was measured and what was predicted; None where there is no such thing."""


@dataclass(frozen=True)
class Column:
    """A figure of all methods."""

    title: str
    """Two lines."""
    pairs: list[Pair]


def account(
    inputs: CompareInputs, runs: Sequence[Run], folder: Path, context: Any, description: Mapping[str, Any]
) -> dict[str, Any]:
    """Measures every method in a process of its own; prints, writes accounting.json and .md, and returns the first.

    Only the first seed is taken. Nothing is trained but the two steps that are measured, and no model is written.

    Raises:
        UserError: something cannot be used, or a process was killed.
    """
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.label, run)
    (folder / "accounting").mkdir(parents=True, exist_ok=True)
    methods: dict[str, Any] = {}
    for number, (label, run) in enumerate(first.items(), start=1):
        print(f"accounting {number}/{len(first)}: {printable(label)}", flush=True)
        methods[label] = _measured(context, inputs, run, folder / "accounting" / f"{label}.log")
    accounting = {**description, "settings": description["methods"], "methods": with_totals(methods)}
    write_json(folder / "accounting.json", accounting)
    (folder / "accounting.md").write_text(markdown(accounting), encoding="utf-8")
    print_tables(accounting)
    return accounting


def _measured(context: Any, inputs: CompareInputs, run: Run, log: Path) -> dict[str, Any]:
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(measure_run, inputs, run, log).result()
    except (BrokenProcessPool, torch.OutOfMemoryError):
        raise UserError(
            f"the accounting of {run.label}: its memory did not suffice, or its process was killed; see {log}, free "
            "memory or set a smaller --settings micro_batch_tokens."
        ) from None


def with_totals(methods: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the methods' measurements with totals, and each one's ratios to the first method."""
    completed: dict[str, Any] = {}
    for label, own in methods.items():
        static = {k: sum(entry[k] for entry in own["static"].values()) for k in ("measured", "predicted")}
        equal = {kind: _equal_size(own, kind) for kind in ("measured", "predicted")}
        equal["theory"] = own["equal_size_theory"]
        completed[label] = {
            **{key: value for key, value in own.items() if key != "equal_size_theory"},
            "static_total": static,
            "static_per_parameter": {k: value / own["parameters"]["policy"] for k, value in static.items()},
            "equal_size": equal,
        }
        first = next(iter(completed.values()))
        completed[label]["ratios"] = {
            "static": _ratios(static, first["static_total"]),
            "equal_size": _ratios(equal, first["equal_size"]),
            "flops": _ratios(own["flops"]["total"], first["flops"]["total"]),
        }
        if epochs := own["flops"].get("epochs"):
            completed[label]["flops"]["by_epochs"] = {n: epochs["once"] + n * epochs["each"] for n in EPOCHS}
    return completed


def _equal_size(own: Mapping[str, Any], kind: str) -> float:
    """Returns static bytes per parameter if all networks had the same size: each network's by its own parameters."""
    return float(sum(pair[kind] / own["parameters"][name.split("/")[1]] for name, pair in own["static"].items()))


def _ratios(own: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, float | None]:
    return {kind: own[kind] / first[kind] if own[kind] and first[kind] else None for kind in own}


# Tables ---------------------------------------------------------------------------------------------------------------


def columns(methods: Mapping[str, Any]) -> dict[str, list[Column]]:
    """Returns the tables by title."""
    values = list(methods.values())

    def column(title: str, function: Any, scale: float = 1.0) -> Column:
        return Column(title, [_scaled(function(own), scale) for own in values])

    def static(kind: str, networks: tuple[str, ...] = ()) -> Any:
        return lambda own: _sum(
            pair
            for name, pair in own["static"].items()
            if name.split("/")[0] == kind and (not networks or name.split("/")[1].split("_")[0] in networks)
        )

    def phase(phase: str, name: str) -> Any:
        return lambda own: own["phases"][phase][name]

    memory = [
        column("policy\nweights", static("weights", ("policy",)), MIB),
        column("reference\nweights", static("weights", ("reference",)), MIB),
        column("reward\nweights", static("weights", ("reward",)), MIB),
        column("value\nweights", static("weights", ("value",)), MIB),
        column("gradients\n", static("gradients"), MIB),
        column("optimiser\n", static("optimiser"), MIB),
        column("total\n", lambda own: own["static_total"], MIB),
        column("bytes per\nparameter", lambda own: own["static_per_parameter"]),
        column("if all are\none size", lambda own: own["equal_size"]),
        column("its\nratio", lambda own: own["ratios"]["equal_size"]),
    ]
    phases = [
        column("rollout\nKV cache", phase("rollout", "kv_cache"), MIB),
        column("\nlogits", phase("rollout", "logits"), MIB),
        column("\ntensors", phase("rollout", "made"), MIB),
        column("\npeak", phase("rollout", "peak"), MIB),
        column("reward\nactivations", phase("reward", "activations"), MIB),
        column("\npeak", phase("reward", "peak"), MIB),
        column("reference\nlogits", phase("reference", "logits"), MIB),
        column("\npeak", phase("reference", "peak"), MIB),
        column("update\nactivations", phase("update", "activations"), MIB),
        column("\nlogits", phase("update", "logits"), MIB),
        column("\ntensors", phase("update", "made"), MIB),
        column("\npeak", phase("update", "peak"), MIB),
    ]
    operations = [
        *(column(f"{name}\nGFLOP", lambda own, name=name: own["flops"][name], GIGA) for name in PHASES),
        column("total\nGFLOP", lambda own: own["flops"]["total"], GIGA),
        column("its\nratio", lambda own: own["ratios"]["flops"]),
        column("tokens\ndrawn", lambda own: own["step"]["tokens"]),
        column("settings\nadded", lambda own: len(own["hyperparameters"])),
    ]
    return {
        "Static memory, MiB": memory,
        "Memory by phase, MiB": phases,
        "Floating-point operations of one step": operations,
    }


def _sum(pairs: Any) -> dict[str, float] | None:
    found = list(pairs)
    return {kind: sum(pair[kind] for pair in found) for kind in ("measured", "predicted")} if found else None


def _scaled(value: Any, scale: float) -> Pair:
    if isinstance(value, Mapping):
        predicted = value["theory"] if "theory" in value else value["predicted"]
        measured, predicted = value["measured"], predicted
        return (None if measured is None else measured / scale, None if predicted is None else predicted / scale)
    return (None if value is None else value / scale, None)


def notes(methods: Mapping[str, Any]) -> list[str]:
    """Returns the sentences that say what the figures are."""
    on_gpu = any(own["device"] == "cuda" for own in methods.values())
    peak = "allocated on the GPU, weights included" if on_gpu else "resident memory of the process, libraries included"
    lines = [
        "First figure: measured; second: predicted by formula. Ratios are to the first method. If all are one size: "
        "static bytes per parameter as if all of a method's networks had the same size, beside theory: 16 per network "
        "that is trained and 2 (in float32: 4) per frozen one.",
        "Logits: of one decoding step, and of one chunk of the update's head. Tensors: all that a phase makes, at "
        f"their peak. Peak: {peak}.",
    ]
    first, *others = methods
    for label in others:
        own, theirs = methods[first]["equal_size"], methods[label]["equal_size"]
        if own["theory"] and theirs["theory"] and own["theory"] != theirs["theory"]:
            lines.append(
                f"{first} takes {own['measured'] / theirs['measured']:.1%} of the static memory of {label} if all "
                f"networks are one size; by theory {own['theory']:g}/{theirs['theory']:g} = "
                f"{own['theory'] / theirs['theory']:.1%}."
            )
    for label, own in methods.items():
        gradients = sum(pair["measured"] for name, pair in own["static"].items() if name.startswith("gradients"))
        spared = gradients - own["gradients_at_once"]
        if spared > 0:
            lines.append(
                f"{label}: the networks are updated one after the other, so their gradients are never there together; "
                f"at once there are {spared / MIB:,.1f} MiB less than the total."
            )
        if "by_epochs" in own["flops"]:
            epochs = own["flops"]["epochs"]
            shown = ", ".join(f"{value / GIGA:,.1f} with {n}" for n, value in own["flops"]["by_epochs"].items())
            lines.append(
                f"{label}: GFLOP = {epochs['once'] / GIGA:,.1f} + {epochs['each'] / GIGA:,.1f} x epochs: {shown} "
                f"(set: {epochs['set']})."
            )
    return lines


def print_tables(accounting: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the tables, up to 120 characters wide, and what they show."""
    console = console or Console(width=max(Console().width, TABLE_WIDTH))
    methods = accounting["methods"]
    for title, own in columns(methods).items():
        table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left", title_style="bold")
        table.add_column("method", overflow="fold", max_width=16)
        for column in own:
            table.add_column(column.title, justify="right", no_wrap=True)
        texts = [_texts(column) for column in own]
        for row, label in enumerate(methods):
            table.add_row(Text(printable(label)), *("\n".join(column[row]) for column in texts))
        console.print(table)
        console.print()
    for line in notes(methods):
        console.print(Text(printable(line)))


def markdown(accounting: Mapping[str, Any]) -> str:
    """Returns the tables and notes in Markdown; what is predicted stands in brackets."""
    methods = accounting["methods"]
    parts: list[str] = []
    for title, own in columns(methods).items():
        heads = ["method", *_full_titles(own)]
        lines = [heads, ["---", *["---:"] * len(own)]]
        texts = [_texts(column) for column in own]
        for row, label in enumerate(methods):
            name = " ".join(printable(label).split()).replace("|", "\\|")
            cells = [column[row][0] + (f" ({column[row][1]})" if len(column[row]) > 1 else "") for column in texts]
            lines.append([name, *cells])
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join([*parts, *(printable(line) for line in notes(methods))]) + "\n"


def _full_titles(own: Sequence[Column]) -> list[str]:
    """Returns the titles as one line each; an empty first line repeats the one before."""
    group, titles = "", []
    for column in own:
        head, _, rest = column.title.partition("\n")
        group = head or group
        titles.append(f"{group} {rest}".strip())
    return titles


def _texts(column: Column) -> list[list[str]]:
    """Returns the figures of each method as texts, all with the same number of decimals."""
    decimals = decimals_for([abs(value) for pair in column.pairs for value in pair if value is not None])
    if all(value is None or value == int(value) for pair in column.pairs for value in pair):
        decimals = 0
    texts = []
    for measured, predicted in column.pairs:
        texts.append([number_text(measured, decimals)])
        if predicted is not None:
            texts[-1].append(number_text(predicted, decimals))
    return texts

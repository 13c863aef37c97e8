"""The report of a comparison: one HTML file that needs nothing else and says everything."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from remax.compare.tables import (
    Column,
    about,
    budget_text,
    cells,
    decimals_for,
    headline,
    interval_text,
    number_text,
    shown_columns,
)
from remax.markup import NOTHING, document, folded, pairs, safe, setting, table

CAPTIONS = {
    "rewards": (
        "What was gained for what",
        "Read a column from top to bottom: a learned reward that rises while the gold reward below it does not is "
        "over-optimised; bands, and the crosses at the ends of the KL curves, are 95% intervals over seeds.",
    ),
    "policy": (
        "How the policies changed",
        "A reward gained by longer completions, or at the cost of the entropy, shows here as a curve that leaves the "
        "others.",
    ),
    "cost": (
        "What a step costs",
        "The length of a bar is the time of a median step on the hardware below, from the strongest tint (rollout) to "
        "the faintest; memory is the peak within a phase and does not add up.",
    ),
}

PAIRED_TITLES = {
    "gold": "gold reward",
    "reward": "learned reward",
    "gold/length_controlled": "gold, same length",
    "reward/length_controlled": "learned, same length",
}

SPENT = (
    Column("steps", "steps"),
    Column("prompts", "prompts"),
    Column("tokens", "generated tokens"),
    Column("seconds", "training seconds"),
    Column("parameters", "policy parameters"),
)

STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #5c6570; --line: #dfe3e8; --paper: #fff; --card: #f6f7f9;
  --accent: #0060a0; --warn: #8a5300 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a2abb5; --line: #343b44; --paper: #14171b;
  --card: #1d2228; --accent: #6db8ee; --warn: #f0b45b } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 1240px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: clamp(1.25rem, 3.2vw, 1.8rem); line-height: 1.3; margin: .2rem 0 1rem; max-width: 60rem }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .4rem }
p { max-width: 60rem; margin: .4rem 0 }
.kicker, .soft { color: var(--soft) }
.notes { margin: 1rem 0; padding: .6rem 1rem .6rem 2rem; border-left: 4px solid var(--warn); background: var(--card) }
.scroll { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600; font-size: .85rem; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; max-width: 16rem; overflow-wrap: anywhere }
tbody th { color: var(--ink); font-size: 1rem; min-width: 6rem }
td small { display: block; color: var(--soft); white-space: nowrap }
table.text td { text-align: left; max-width: 24rem; overflow-wrap: anywhere }
figure { margin: .8rem 0 }
img { width: 100%; height: auto; display: block; background: #fff; border: 1px solid var(--line); border-radius: 6px }
.wide { overflow-x: auto }
.wide img { min-width: 720px }
details { margin: .5rem 0; padding: .5rem .8rem; background: var(--card); border-radius: 6px }
summary { cursor: pointer; color: var(--accent) }
pre, code { font: 14px/1.45 ui-monospace, monospace }
pre { padding: .8rem 1rem; background: var(--card); border-radius: 6px; overflow-x: auto; white-space: pre-wrap }
"""


def write_page(results: Mapping[str, Any], plots: Mapping[str, Path], path: Path) -> None:
    """Writes the report; the pictures are inside, nothing is loaded from anywhere, and no text can become markup."""
    title = f"remax compare: {', '.join(results['methods'])}"
    body = "\n".join(part for part in _parts(results, plots) if part)
    path.write_text(document(title, body, style=STYLE), encoding="utf-8")


def _parts(results: Mapping[str, Any], plots: Mapping[str, Path]) -> Iterator[str]:
    seeds = len(results["seeds"])
    yield (
        f'<p class="kicker">{len(results["methods"])} methods, {seeds} seed{"s" * (seeds != 1)}, '
        f"{safe(budget_text(results))} each</p>\n<h1>{safe(headline(results))}</h1>"
    )
    if results["notes"]:
        yield '<ul class="notes">' + "".join(f"<li>{safe(note)}</li>" for note in results["notes"]) + "</ul>"
    yield "<h2>Held-out prompts, at the end</h2>"
    yield _figures_table(results, shown_columns(results))
    yield f'<p class="soft">{safe(about(results))}</p>'
    yield _pairwise(results)
    for name, picture in plots.items():
        yield _picture(name, picture)
    yield "<h2>What was spent</h2>"
    yield f"<p>The budget of a run: {safe(budget_text(results))}. Means over seeds.</p>"
    yield _figures_table(results, shown_columns(results, SPENT))
    yield from _conditions(results)
    yield _every_seed(results)


def _figures_table(results: Mapping[str, Any], columns: Sequence[Column]) -> str:
    """Returns a row per method with the mean and, beneath, the interval."""
    shown = [cells(results, column) for column in columns]
    heads = ["method", "seeds", *(c.title + (f", {c.unit}" if c.unit else "") for c in columns)]
    rows = []
    for row, (label, method) in enumerate(results["methods"].items()):
        figures = [
            safe(mean) + ("" if interval in (None, NOTHING) else f"<small>{safe(interval or '')}</small>")
            for mean, interval in (column[row] for column in shown)
        ]
        rows.append([safe(label), str(len(method["seeds"])), *figures])
    return table([safe(head) for head in heads], rows)


def _pairwise(results: Mapping[str, Any]) -> str:
    """Returns how each method differs from the first."""
    names = [name for name in PAIRED_TITLES if any(pair["metrics"][name] for pair in results["pairwise"])]
    if not names:
        return ""
    rows = [
        [safe(pair["label"]), *(part for name in names for part in _pair_cells(pair["metrics"][name]))]
        for pair in results["pairwise"]
    ]
    heads = ["method", *(text for name in names for text in (PAIRED_TITLES[name], "P(higher)"))]
    first = results["pairwise"][0]["against"]
    return (
        f"<h2>Against {safe(first)}</h2>\n<p>The mean difference to {safe(first)} seed by seed, above 0 where the "
        f"method is higher, and the probability that one of its runs beats one of {safe(first)}; both with 95% "
        f"intervals.</p>\n{table([safe(head) for head in heads], rows)}"
    )


def _pair_cells(pair: Mapping[str, Any] | None) -> tuple[str, str]:
    if pair is None:
        return NOTHING, NOTHING
    difference = pair["difference"]
    texts = []
    for estimate, digits in ((difference, None), (pair["probability_of_improvement"], 2)):
        if estimate is None:
            texts.append(NOTHING)
            continue
        decimals = decimals_for([estimate["value"], *(estimate["interval"] or [])]) if digits is None else digits
        interval = "" if estimate["interval"] is None else interval_text(estimate["interval"], decimals)
        texts.append(number_text(estimate["value"], decimals) + (f"<small>{interval}</small>" if interval else ""))
    return texts[0], texts[1]


def _picture(name: str, path: Path) -> str:
    title, caption = CAPTIONS[name]
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img alt="{safe(title)}" src="data:image/png;base64,{data}">'
    return f'<h2>{safe(title)}</h2>\n<p>{safe(caption)}</p>\n<figure><div class="wide">{image}</div></figure>'


def _conditions(results: Mapping[str, Any]) -> Iterator[str]:
    """Returns what the runs were made of: settings, what they share, models, machine and command."""
    methods = results["methods"]
    yield "<h2>Settings</h2>"
    keys = list(dict.fromkeys(key for method in methods.values() for key in method["settings"]))
    rows = [[safe(key), *(setting(method["settings"].get(key)) for method in methods.values())] for key in keys]
    if any(method["hyperparameters"] is not None for method in methods.values()):
        own = [method["hyperparameters"] for method in methods.values()]
        texts = [NOTHING if names is None else f"{len(names)}: {', '.join(map(str, names))}" for names in own]
        rows.append(["settings that only this method has", *(safe(text.removesuffix(": ")) for text in texts)])
    yield table(["setting", *(safe(label) for label in methods)], rows, kind="text")
    yield folded("Settings that all methods share", pairs(results.get("shared") or {}))
    yield "<h2>How it was made</h2>"
    made = {name: results.get(name) for name in ("model", "reward", "gold", "commit")}
    yield pairs({**made, "seeds": results["seeds"], **_named(results, "hardware"), **_named(results, "versions")})
    yield f"<pre>{safe(str(results.get('command') or ''))}</pre>"


def _named(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    values = results.get(name)
    return {f"{name}: {key}": value for key, value in values.items()} if isinstance(values, Mapping) else {name: values}


def _every_seed(results: Mapping[str, Any]) -> str:
    """Returns each run's values and the interquartile means, folded away."""
    columns = shown_columns(results)
    rows = []
    for label, method in results["methods"].items():
        metrics = [(method["metrics"][c.metric], c.scale) for c in columns]
        for index, seed in enumerate(method["seeds"]):
            rows.append([safe(label), str(seed), *(_plain(m["values"][index], scale) for m, scale in metrics)])
        if method["seeds"]:
            rows.append([safe(label), "IQM", *(_interquartile(metric, scale) for metric, scale in metrics)])
    heads = ["method", "seed", *(c.title + (f", {c.unit}" if c.unit else "") for c in columns)]
    every = table([safe(head) for head in heads], rows)
    return folded("Every run, and the interquartile means (IQM) over seeds", every)


def _interquartile(metric: Mapping[str, Any], scale: float) -> str:
    text, interval = _plain(metric["iqm"], scale), metric["iqm_interval"]
    if interval is None:
        return text
    return f"{text}<small>{' to '.join(_plain(value, scale) for value in interval)}</small>"


def _plain(value: float | None, scale: float) -> str:
    return NOTHING if value is None else number_text(value * scale, decimals_for([value * scale]))

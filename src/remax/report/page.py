"""The report as one HTML file that needs nothing else."""

import datetime
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from remax.errors import UserError
from remax.markup import NOTHING, document, embedded_json, folded, pairs, prose, safe, setting, table
from remax.report.browser import browser
from remax.report.completions import Kept, choose
from remax.report.curves import charts, smoothing
from remax.report.drawing import DASHES, Alarm, Drawing, draw, marked_in, style_of
from remax.report.reading import Run
from remax.report.shapes import Chart, Line
from remax.report.summary import Change, Summary, estimate_texts, headline, summarise
from remax.untrusted import shown

LONGEST_COMMAND = 4_000
MOST_BYTES = 5_800_000
"""Of the whole page: one below 6 MB can be mailed and opened on a phone."""


def page(runs: Sequence[Run]) -> str:
    """Returns the report of one run, or of several over each other, below 6 MB.

    Raises:
        UserError: the curves alone take more.
    """
    summaries = [summarise(run) for run in runs]
    drawn = charts(runs)
    alarms = [
        Alarm(index, str(alarm.get("metric")), float(alarm["step"]))
        for index, run in enumerate(runs)
        for alarm in run.alarms
        if alarm.get("event") == "alarm" and isinstance(alarm.get("step"), int)
    ]
    drawings = draw(drawn, len(runs), alarms)
    fixed = {
        "runs": [run.label for run in runs],
        "charts": {key: drawing.readout for key, drawing in drawings.items()},
    }
    names = ", ".join(run.label for run in runs)

    def whole(content: Mapping[str, Any], kept: Sequence[Kept]) -> str:
        figures = [_figure(chart, drawings[chart.key], len(runs), marked_in(chart, alarms)) for chart in drawn]
        body = "\n".join(_parts(runs, summaries, figures, kept))
        data = embedded_json({**fixed, "completions": content})
        return document(f"remax report: {names}", body, style=_asset("page.css"), data=data, script=_asset("page.js"))

    nothing, none_kept = choose(runs, 0)
    room = MOST_BYTES - len(whole(nothing.content(), none_kept).encode())
    if room < 0:
        raise UserError(f"--runs names {len(runs)} runs: their curves alone are more than 6 MB; report fewer at once.")
    shelf, kept = choose(runs, room)
    return whole(shelf.content(), kept)


@cache
def _asset(name: str) -> str:
    """Returns a file beside this one; the comments of a style are for those who change it."""
    return (files("remax.report") / name).read_text(encoding="utf-8")


def _parts(
    runs: Sequence[Run], summaries: Sequence[Summary], figures: Sequence[str], kept: Sequence[Kept]
) -> Iterator[str]:
    yield _top(runs)
    yield f"<main>\n<h1>{safe(headline(runs, summaries))}</h1>"
    notes = list(_notes(runs))
    if notes:
        yield '<ul class="notes">' + "".join(f"<li>{prose(note)}</li>" for note in notes) + "</ul>"
    if len(runs) > 1:
        yield _run_boxes(runs)
    yield '<section id="before-after"><h2>Before and after</h2>'
    yield _before_after(runs, summaries)
    yield "</section>"
    yield '<section id="curves"><h2>Curves</h2>'
    yield f'<p class="soft">{safe(_how_drawn(runs))}</p><div class="charts">'
    yield from figures
    yield "</div></section>"
    yield from browser(runs, kept)
    yield '<section id="alarms"><h2>Alarms</h2>'
    yield _alarms(runs)
    yield "</section>"
    yield '<section id="settings"><h2>Settings</h2>'
    yield _settings(runs)
    yield '</section><section id="origin"><h2>How it was made</h2>'
    yield from _origin(runs)
    yield "</section></main>"


def _top(runs: Sequence[Run]) -> str:
    links = {"before-after": "Before and after", "curves": "Curves", "completions": "Completions", "alarms": "Alarms"}
    links |= {"settings": "Settings", "origin": "How it was made"}
    anchors = " ".join(f'<a href="#{key}">{title}</a>' for key, title in links.items())
    names = ", ".join(run.label for run in runs)
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    kicker = f'<p class="kicker">remax report of <b>{safe(names)}</b>, {now}</p>'
    button = '<button type="button" id="theme">Theme: as the system</button>'
    return f'<nav class="top" aria-label="Sections">{kicker} {anchors} {button}</nav>'


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    """Says what the reader must know before believing the figures."""
    for run in runs:
        name = f"{run.label}: " if len(runs) > 1 else ""
        if not run.ended:
            planned = run.config.get("max_steps")
            of = f" of {planned:,}" if isinstance(planned, int) and planned > 0 else ""
            yield f"{name}The run has not ended: it goes on, or was stopped. It is shown after step {run.step:,}{of}."
        skipped = run.column("skipped_steps")[1]
        if len(skipped) and skipped[-1] > 0:
            yield f"{name}{skipped[-1]:.0f} updates were skipped, since their loss or gradient was not finite."
    if len(runs) > 1:
        yield "One run each: what separates them may be the seed as well as the settings (`remax compare` tells)."


def _run_boxes(runs: Sequence[Run]) -> str:
    """Returns the legend of the runs, each with a box that shows or hides it."""
    boxes = "".join(
        f'<label><input type="checkbox" data-run="{index}" checked><span class="swatch" style="color: var(--c{index})">'
        f"</span>run {index + 1}: {safe(run.label)}</label>"
        for index, run in enumerate(runs)
    )
    return f'<div class="runs" role="group" aria-label="Runs that the curves show">{boxes}</div>'


def _before_after(runs: Sequence[Run], summaries: Sequence[Summary]) -> str:
    several = len(runs) > 1
    parts = []
    for index, (run, summary) in enumerate(zip(runs, summaries, strict=True)):
        title = f"<h3>run {index + 1}: {safe(run.label)}</h3>" if several else ""
        parts.append(f'<div class="run{index}">{title}')
        rows = [[safe(change.title), *_change_cells(change)] for change in summary.changes.values()]
        parts.append(table(["", "before", "after", "change"], rows))
        parts.append("</div>")
    bases = dict.fromkeys(summary.basis for summary in summaries)
    said = "".join(f'<p class="soft">{prose(basis)}</p>' for basis in bases)
    return f'<div class="beside">{"".join(parts)}</div>{said}'


def _change_cells(change: Change) -> list[str]:
    cells = []
    for estimate, signed in ((change.before, False), (change.after, False), (change.change, True)):
        value, interval = estimate_texts(estimate, signed=signed)
        cells.append(safe(value) + ("" if interval is None else f"<small>{safe(interval)}</small>"))
    return cells


def _how_drawn(runs: Sequence[Run]) -> str:
    widths = sorted({width for width in smoothing(runs) if width > 1})
    text = "Point at a curve, or focus it and use the arrow keys, to read its values."
    if widths:
        over = " or ".join(map(str, widths))
        text += f" Strong lines are running means over {over} steps; faint lines are the steps themselves."
    return text


def _figure(chart: Chart, drawing: Drawing, num_runs: int, alarms: Sequence[Alarm]) -> str:
    legend = ""
    if len(chart.names) > 1:
        first = {(line.name, line.style): line for panel in chart.panels for line in reversed(panel.lines)}
        samples = (_sample(chart, first[name, style], num_runs) for name, style in chart.names)
        legend = f'<div class="legend">{"".join(samples)}</div>'
    label = f"{safe(chart.title)}: the arrow keys read out its values"
    focus = f' tabindex="0" role="group" aria-label="{label}"' if chart.names else ""
    return (
        f'<figure id="chart-{chart.key}"><h3>{safe(chart.title)}</h3>{legend}'
        f'<div class="plot"{focus}>{drawing.svg}</div><div class="readout" aria-live="polite"></div>'
        f"<figcaption>{prose(chart.reading)}{' Dotted: an alarm.' if alarms else ''}</figcaption></figure>"
    )


def _sample(chart: Chart, line: Line, num_runs: int) -> str:
    """Returns an entry of the legend; where colours tell runs, its line has none."""
    colour, dash = style_of(chart, line, num_runs)
    ink = f"var(--c{colour})" if num_runs == 1 or chart.by_phase else "var(--soft)"
    style = DASHES[dash]
    dashes = "" if style == "-" else f' stroke-dasharray="{" ".join(f"{2 * part:g}" for part in style[1])}"'
    stacked = any(panel.stacked for panel in chart.panels)
    width, opacity = ("8", ' stroke-opacity=".75"') if stacked else ("2.4", "")
    path = f'<path d="M0 4H26" style="stroke: {ink}" stroke-width="{width}"{dashes}{opacity}/>'
    return f'<span><svg viewBox="0 0 26 8" aria-hidden="true">{path}</svg>{safe(line.name)}</span>'


def _alarms(runs: Sequence[Run]) -> str:
    rows = [
        [*([safe(run.label)] if len(runs) > 1 else []), setting(alarm.get("step")), safe(str(alarm.get("message", "")))]
        for run in runs
        for alarm in run.alarms
    ]
    if rows:
        heads = [*(["run"] if len(runs) > 1 else []), "step", "what happened"]
        return table(heads, rows, kind="text")
    off = [run.label for run in runs if run.config.get("alarms") == "off"]
    if off:
        return f"<p>None was raised; they were switched off (--alarms off) in {safe(', '.join(off))}.</p>"
    return "<p>None was raised, and no update was skipped.</p>"


def _settings(runs: Sequence[Run]) -> str:
    if not any(run.config for run in runs):
        return "<p>config.yaml is missing or cannot be read.</p>"
    if len(runs) == 1:
        return folded(f"All {len(runs[0].config)} settings (config.yaml)", pairs(_shortened(runs[0].config)))
    differing, shared = _told_apart([_shortened(run.config) for run in runs])
    table_of_both = _beside(runs, differing) if differing else "<p>All settings are the same.</p>"
    return table_of_both + folded(f"{len(shared)} settings that all runs share", pairs(shared))


def _told_apart(values: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Returns what differs between runs, by name and run, and what all have."""
    names = list(dict.fromkeys(name for own in values for name in own))
    differing = {n: [own.get(n) for own in values] for n in names if len({repr(own.get(n)) for own in values}) > 1}
    return differing, {name: values[0][name] for name in names if name not in differing}


def _beside(runs: Sequence[Run], values: Mapping[str, Sequence[Any]]) -> str:
    heads = ["", *(f"run {index + 1}: {safe(run.label)}" for index, run in enumerate(runs))]
    return table(heads, ([safe(name), *map(setting, own)] for name, own in values.items()), kind="text")


def _shortened(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value if value not in ([], {}) else None for name, value in config.items()}


def _origin(runs: Sequence[Run]) -> Iterator[str]:
    """Says with which commands, versions and hardware, and how to make it again."""
    for run in runs:
        if not run.starts:
            yield f"<p>Of {safe(run.label)}, no commands, versions and hardware are recorded (no provenance.json).</p>"
        if len({repr(start.get("versions")) for start in run.starts}) > 1:
            yield f"<p>The versions of {safe(run.label)} changed between its starts; the last ones are shown.</p>"
    commands = [_command(run, start) for run in runs for start in run.starts]
    if commands:
        yield f"<pre>{safe(chr(10).join(commands))}</pre>"
    known = [run for run in runs if run.starts]
    differing, shared = _told_apart([_facts(run.starts[-1]) for run in known]) if known else ({}, {})
    if differing:
        yield _beside(known, differing)
    yield pairs(shared)
    again = [(run.label, command) for run in known if (command := _from_settings(run)) is not None]
    for run in known:
        if _from_settings(run) is not None:
            continue
        commands_above = "its command above" if len(run.starts) == 1 else "its commands above"
        number = run.starts[-1].get("num_processes")
        processes = f", in {number} processes as then" if isinstance(number, int) and number > 1 else ""
        yield f"<p>To run {safe(run.label)} again, run {commands_above} with another output_dir{processes}.</p>"
    names = "it" if len(runs) == 1 else ", ".join(label for label, _ in again)
    purpose = f"To run {names} again, and to make this page again" if again else "To make this page again"
    page_again = shlex.join(["remax", "report", *(str(run.path.absolute()) for run in runs)])
    lines = [*(command for _, command in again), page_again]
    yield f"<p>{safe(purpose)} (by remax {safe(version('remax-rlhf'))}):</p>"
    yield "<pre>" + "\n".join(safe(shown(line, LONGEST_COMMAND)) for line in lines) + "</pre>"


def _from_settings(run: Run) -> str | None:
    """Returns the command that runs it again from its config.yaml; None where that does not say all.

    The settings have nothing of what a script puts together itself, nor of the launcher that started the processes.
    """
    starts = [_words(start.get("command")) for start in run.starts]
    launch = _launch_flags(starts[-1])
    alone = run.starts[-1].get("num_processes") == 1
    if not run.config or any(words[:2] != ["remax", "train"] for words in starts) or not (launch or alone):
        return None
    flags = ["--config", str(run.path.absolute() / "config.yaml"), *launch, "--output_dir", "NEW"]
    directory = run.starts[-1].get("directory")
    there = f"{shlex.join(['cd', directory])} && " if isinstance(directory, str) else ""
    return there + shlex.join(["remax", "train", *flags])


def _words(command: object) -> list[str]:
    try:
        return shlex.split(command) if isinstance(command, str) else []
    except ValueError:
        return []


def _launch_flags(words: Sequence[str]) -> list[str]:
    """Returns the flags among these that say in which processes to train; config.yaml does not have them."""
    found = []
    for word, following in zip(words, [*words, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in ("accelerate_config", "num_processes"):
            found += [f"--{name}", value if equals else following]
    return found


def _command(run: Run, start: Mapping[str, Any]) -> str:
    """Returns a command as a shell takes it, each part in one line: what is copied must be what is seen."""
    step = start.get("step")
    on = f", going on after step {step}" if step else ""
    about = shown(f"{run.label}, {start.get('date', NOTHING)}{on}")
    return f"# {about}\n{shown(start.get('command', NOTHING), LONGEST_COMMAND)}"


def _facts(start: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"directory": start.get("directory"), "commit": start.get("commit")}
    facts["processes"] = start.get("num_processes")
    for name in ("hardware", "versions"):
        values = start.get(name)
        if isinstance(values, dict):
            facts |= {str(key): ", ".join(map(str, v)) if isinstance(v, list) else v for key, v in values.items()}
    return {name: value if value != "" else None for name, value in facts.items()}

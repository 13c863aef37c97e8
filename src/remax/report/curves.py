"""What the charts show: every chart as data, with the sentence that says how to read it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from remax.compare.results import PHASES
from remax.report import summary
from remax.report.reading import Floats, Run
from remax.report.shapes import Chart, Heat, Line, Panel, running_mean, smoothed, thinned, window
from remax.untrusted import shown

MIB = 2**20
HEAT_COLUMNS, HEAT_ROWS = 40, 24
MOST_FUNCTIONS, LONGEST_NAME = 6, 40


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Returns the charts for which at least one run has something to show."""
    makers: tuple[Callable[[Sequence[Run]], Chart | None], ...] = (
        *(_training, _held_out, _against_kl, _kl, _length, _entropy, _gradient, _fractions, _functions),
        *(_histogram, _time, _memory),
    )
    return [chart for make in makers if (chart := make(runs)) is not None]


def _training(runs: Sequence[Run]) -> Chart | None:
    names = {"reward": "sampled", "reward/greedy": "greedy"}
    reading = "The mean of each step's own prompts: single steps differ with their prompts, the trend should rise."
    if any(len(run.column("reward/greedy")[0]) for run in runs):
        reading += (
            " Sampled and greedy should rise together; greedy that stands still above sampled means that the policy "
            "only gets less random."
        )
    return _by_step(runs, "reward", "Reward in training", reading, names, "reward")


def _held_out(runs: Sequence[Run]) -> Chart | None:
    """The reward above the gold reward, both on held-out prompts."""
    panels = []
    for label, names in (("reward", ("reward", "reward/greedy")), ("gold reward", ("gold", "gold/greedy"))):
        lines = tuple(
            line
            for index, run in enumerate(runs)
            for style, name in enumerate(names)
            if (line := _evaluated(index, run, name, ("sampled", "greedy")[style], style)) is not None
        )
        panels += [Panel(label, lines)] if lines else []
    reading = "The same held-out prompts with the same noise every time"
    if any(line.band is not None for panel in panels for line in panel.lines):
        reading += ", with 95% intervals over prompts"
    if len(panels) == 2:
        reading += (
            ". The reward is what training maximises, the gold reward judges and is never trained on: where the reward "
            "rises and the gold reward falls, the policy pleases the reward and not what it stands for"
        )
    elif any(run.config.get("reward_model") for run in runs):
        reading += (
            ". A reward model can be fooled: without a gold reward (--gold_reward_model) nothing tells whether a "
            "higher reward is a better policy"
        )
    reading += "."
    title = "Reward against gold reward, held out" if len(panels) == 2 else "Reward, held out"
    return Chart("held-out", title, reading, tuple(panels), metrics=("eval/gold",)) if panels else None


def _evaluated(index: int, run: Run, name: str, title: str, style: int) -> Line | None:
    steps, values = run.evaluated(name)
    if not len(steps):
        return None
    intervals = []
    for step, value in zip(steps, values, strict=True):
        by_prompt = run.by_prompt(name, step)
        interval = summary.mean(np.array([*by_prompt.values()])).interval if by_prompt else None
        intervals.append(interval or (value, value))
    band = tuple(np.array(side) for side in zip(*intervals, strict=True))
    known = any(low < high for low, high in intervals)
    return Line(index, title, style, steps, values, band=(band[0], band[1]) if known else None, marked=True)


def _against_kl(runs: Sequence[Run]) -> Chart | None:
    lines = []
    for index, run in enumerate(runs):
        for style, name in enumerate(("reward", "gold")):
            line = _path(index, run, name, style)
            lines += [] if line is None else [line]
    reading = (
        "How much reward each nat of distance from the reference bought: a path that is steep and ends far to the left "
        "is cheap, one that goes on to the right without rising only drifts. The large point is the end."
    )
    panel = Panel("reward", tuple(lines))
    title = "Reward against KL"
    return Chart("against-kl", title, reading, (panel,), "KL to the reference, nats per sequence") if lines else None


def _path(index: int, run: Run, name: str, style: int) -> Line | None:
    """Returns the path over the evaluations or, where there are fewer than two, over the running means of training."""
    source = run.evaluated if len(run.evaluated("kl")[0]) > 1 else run.column
    (kl_steps, kls), (steps, values) = source("kl"), source(name)
    common, at_kl, at_value = np.intersect1d(kl_steps, steps, return_indices=True)
    if len(common) < 2:
        return None
    kls, values = kls[at_kl], values[at_value]
    if source == run.column:
        width = window(len(common))
        kls, values = running_mean(kls, width), running_mean(values, width)
    kls, values, common = (thinned(column) for column in (kls, values, common))
    return Line(index, summary.MEASURES[name], style, kls, values, marked=source == run.evaluated, steps=common)


def _kl(runs: Sequence[Run]) -> Chart | None:
    return _by_step(
        runs,
        "kl",
        "KL to the reference",
        "How far the policy has moved from where it began: the mean log-ratio of whole samples. It should rise early "
        "and level off; growth without end calls for a higher --beta or a lower --learning_rate.",
        {"kl": "sampled"},
        "nats per sequence",
    )


def _length(runs: Sequence[Run]) -> Chart | None:
    return _by_step(
        runs,
        "length",
        "Completion length",
        "Rewards are often higher for longer texts: a length that grows with the reward says that part of the gain is "
        "length. Flat at --max_completion_length means that completions are cut.",
        {"completions/mean_length": "sampled", "completions/greedy_mean_length": "greedy"},
        "tokens",
        alarms=("completions/mean_length",),
    )


def _entropy(runs: Sequence[Run]) -> Chart | None:
    return _by_step(
        runs,
        "entropy",
        "Entropy",
        "How undecided the policy is at each token. A slow fall is learning; a fall to near zero is collapse: all "
        "samples of a prompt become the same, and nothing is left to learn from.",
        {"entropy": "sampled"},
        "nats per token",
        from_zero=True,
    )


def _gradient(runs: Sequence[Run]) -> Chart | None:
    chart = _by_step(
        runs,
        "gradient",
        "Gradient norm",
        "Before clipping. Steady or slowly falling is healthy; spikes that come with jumps of the KL call for a lower "
        "--learning_rate or --max_grad_norm.",
        {"grad_norm": "policy"},
        "norm",
    )
    if chart is None:
        return None
    values = np.concatenate([line.y for line in chart.panels[0].lines])
    positive = values[values > 0]
    spread = len(positive) == len(values) and positive.max() > 100 * positive.min()
    return replace(chart, panels=(replace(chart.panels[0], logarithmic=bool(spread)),))


def _fractions(runs: Sequence[Run]) -> Chart | None:
    return _by_step(
        runs,
        "fractions",
        "No signal, truncated, missing",
        "Fractions of the samples. No signal: the reward equals the baseline and no token gets a gradient; near 1 the "
        "step is wasted. Truncated: cut at the length limit. Missing: without a reward, and left out.",
        {
            "gradient/zero_signal_fraction": "no signal",
            "completions/clipped_ratio": "truncated",
            "reward/missing_fraction": "missing reward",
        },
        "fraction",
        from_zero=True,
        alarms=("completions/clipped_ratio",),
    )


def _functions(runs: Sequence[Run]) -> Chart | None:
    """Every reward by itself, where a run has several."""
    functions = list(dict.fromkeys(name for run in runs if len(run.functions) > 1 for name in run.functions))
    reading = "What the reward is the weighted sum of: one that falls is paid for by another."
    if len(functions) > MOST_FUNCTIONS:
        reading += f" The first {MOST_FUNCTIONS} of {len(functions)} are drawn; metrics.jsonl has all."
    names = {f"rewards/{name}/mean": shown(name, LONGEST_NAME) for name in functions[:MOST_FUNCTIONS]}
    return _by_step(runs, "functions", "Rewards one by one", reading, names, "mean over samples")


def _histogram(runs: Sequence[Run]) -> Chart | None:
    known = [run.completions.column("reward") for run in runs]
    known = [values[np.isfinite(values)] for values in known]
    values = np.concatenate(known) if known else np.empty(0)
    if not len(values):
        return None
    low, high = np.percentile(values, [0.5, 99.5])
    margin = 0.02 * (high - low) or 0.5
    y_edges = np.linspace(low - margin, high + margin, HEAT_ROWS + 1)
    panels = tuple(
        Panel("reward", heat=_heat(index, run, y_edges), title=_label_of(runs, index))
        for index, run in enumerate(runs)
        if len(known[index])
    )
    reading = (
        "Each column is the histogram of some steps' sampled rewards, the stronger the more of them; the lowest and "
        "highest 0.5% are drawn at the rims. A cloud that moves up as a whole is learning; two clouds, or a dense line "
        "at one value, hint at a trick that the reward pays for, unless rewards have only a few values."
    )
    return Chart("histogram", "Histogram of rewards by step", reading, panels)


def _heat(index: int, run: Run, y_edges: Floats) -> Heat:
    steps, rewards = run.completions.column("step"), run.completions.column("reward")
    known = np.isfinite(steps) & np.isfinite(rewards)
    steps, rewards = steps[known], np.clip(rewards[known], y_edges[0], y_edges[-1])
    first, last = steps.min(), steps.max()
    columns = int(min(HEAT_COLUMNS, last - first + 1))
    x_edges = np.linspace(first - 0.5, last + 0.5, columns + 1)
    counts, _, _ = np.histogram2d(rewards, steps, bins=(y_edges, x_edges))
    return Heat(index, x_edges, y_edges, counts / np.maximum(counts.sum(axis=0), 1))


def _time(runs: Sequence[Run]) -> Chart | None:
    panels = []
    for index, run in enumerate(runs):
        lines = _phase_lines(index, run, "time", 1.0)
        whole_steps, whole = run.column("time/step")
        if lines and len(whole) == len(lines[0].y) and np.array_equal(whole_steps, lines[0].x):
            rest = np.maximum(whole - np.sum([line.y for line in lines], axis=0), 0.0)
            lines.append(Line(index, "rest", len(PHASES), whole_steps, rest))
        if lines:
            width = window(len(lines[0].x))
            smooth = (replace(own, x=thinned(own.x), y=thinned(running_mean(own.y, width))) for own in lines)
            panels.append(Panel("seconds per step", tuple(smooth), stacked=True, title=_label_of(runs, index)))
    reading = (
        "Where a step's seconds go, one upon the other. A rollout that grows goes with longer completions; a reward "
        "that dominates calls for a faster reward or a larger --reward_batch_size."
    )
    return Chart("time", "Time by phase", reading, tuple(panels), by_phase=True) if panels else None


def _phase_lines(index: int, run: Run, kind: str, scale: float) -> list[Line]:
    """Returns a line for each phase; a phase that a step did not have took nothing."""
    steps = np.array([float(record["step"]) for record in run.steps])
    lines = []
    for style, phase in enumerate(PHASES):
        known, values = run.column(f"{kind}/{phase}")
        if len(known):
            filled = np.zeros(len(steps))
            filled[np.isin(steps, known)] = values
            lines.append(Line(index, phase, style, steps, filled * scale))
    return lines


def _memory(runs: Sequence[Run]) -> Chart | None:
    panels = []
    for index, run in enumerate(runs):
        lines = tuple(
            replace(line, x=thinned(line.x), y=thinned(line.y, np.max))
            for line in _phase_lines(index, run, "memory", 1 / MIB)
        )
        panels += [Panel("peak, MiB", lines, from_zero=True, title=_label_of(runs, index))] if lines else []
    reading = (
        "The peak within each phase: of the GPU's allocated memory or, on a CPU, of the process. Peaks do not add up; "
        "the highest line decides whether a step fits. Growth from step to step would be a leak."
    )
    return Chart("memory", "Memory by phase", reading, tuple(panels), by_phase=True) if panels else None


def _label_of(runs: Sequence[Run], index: int) -> str:
    return f"run {index + 1}" if len(runs) > 1 else ""


def _by_step(
    runs: Sequence[Run],
    key: str,
    title: str,
    reading: str,
    names: dict[str, str],
    label: str,
    *,
    from_zero: bool = False,
    alarms: tuple[str, ...] | None = None,
) -> Chart | None:
    """Returns a chart of metrics of the training steps; None if no run has any."""
    lines = []
    for index, run in enumerate(runs):
        for style, (metric, name) in enumerate(names.items()):
            steps, values = run.column(metric)
            if len(steps):
                lines.append(smoothed(Line(index, name, style, steps, values)))
    if not lines:
        return None
    panel = Panel(label, tuple(lines), from_zero=from_zero)
    return Chart(key, title, reading, (panel,), metrics=tuple(names) if alarms is None else alarms)


def smoothing(runs: Sequence[Run]) -> Iterator[int]:
    """Yields over how many steps each run's running mean goes."""
    for run in runs:
        yield window(len(run.steps))

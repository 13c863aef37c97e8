"""What became of a run, before any picture: each measurement at its beginning and its end, with intervals."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from remax.compare import statistics
from remax.compare.statistics import Estimate
from remax.compare.tables import decimals_for, interval_text, number_text
from remax.report.reading import Floats, Run

MEASURES = {
    "reward": "reward, sampled",
    "reward/greedy": "reward, greedy",
    "gold": "gold reward, sampled",
    "gold/greedy": "gold reward, greedy",
    "kl": "KL to the reference, nats per sequence",
    "entropy": "entropy, nats per token",
    "completions/mean_length": "length, tokens",
    "completions/clipped_ratio": "truncated fraction",
}
JUDGES = {
    "reward": ("reward_model", "reward_funcs", "reward_url"),
    "gold": ("gold_reward_model", "gold_reward_funcs"),
}
"""The settings that name what gives a reward."""
EVALUATION = (
    *("eval_dataset", "eval_split", "num_eval_prompts", "max_prompt_length", "overlong_prompts", "system_prompt"),
    *("max_completion_length", "temperature", "top_p", "top_k"),
)
"""The settings that decide what is evaluated, and how completions are drawn there."""
MOST_RESAMPLED = 512
"""Beyond so many values the mean is as good as normal, and resampling them takes gigabytes."""
NORMAL_95 = 1.96
MINUS = "\N{MINUS SIGN}"
"""Unlike a hyphen, no line is broken behind it."""
MOST_STEPS = 10
"""How many steps stand for the beginning and for the end where there are no evaluations."""


@dataclass(frozen=True)
class Change:
    """A measurement before and after, and what was added in between."""

    title: str
    before: Estimate
    after: Estimate
    change: Estimate

    @property
    def verdict(self) -> str:
        """What may be said of it, in a word or two."""
        if self.change.interval is None:
            return "changed" if self.change.value else "stayed the same"
        low, high = self.change.interval
        return "rose" if low > 0 else "fell" if high < 0 else "changed within chance"


@dataclass(frozen=True)
class Summary:
    """The changes of a run, by name."""

    changes: dict[str, Change]
    basis: str
    """What was measured, as a sentence."""
    held_out: bool


def summarise(run: Run) -> Summary:
    """Returns the changes between the first and the last evaluation or, without those, between first and last steps."""
    if len(run.evaluations) > 1:
        return _of_evaluations(run)
    span = max(1, min(MOST_STEPS, len(run.steps) // 2))
    changes = {}
    for name, title in MEASURES.items():
        _, values = run.column(name)
        if len(values):
            before, after = mean(values[:span]), mean(values[-span:])
            changes[name] = Change(title, before, after, Estimate(after.value - before.value, None))
    steps = "step" if span == 1 else f"{span} steps"
    basis = (
        f"{'One evaluation is' if run.evaluations else 'No evaluations are'} there to compare (--eval_dataset): before "
        f"and after are the first and the last {steps} of training, on different prompts, with the interval over steps."
    )
    return Summary(changes, basis, held_out=False)


def _of_evaluations(run: Run) -> Summary:
    first, last = (float(run.evaluations[index]["step"]) for index in (0, -1))
    changes = {}
    with_prompts = 0
    for name, title in MEASURES.items():
        steps, means = run.evaluated(name)
        if first not in steps or last not in steps:
            continue
        before, after = run.by_prompt(name, first), run.by_prompt(name, last)
        both = sorted(before.keys() & after.keys())
        if both:
            with_prompts = max(with_prompts, len(both))
            added = np.array([after[prompt] - before[prompt] for prompt in both])
            ends = [mean(np.array([*values.values()])) for values in (before, after)]
            changes[name] = Change(title, ends[0], ends[1], mean(added))
        else:
            values = [float(means[steps == step][0]) for step in (first, last)]
            added_mean = Estimate(values[1] - values[0], None)
            changes[name] = Change(title, Estimate(values[0], None), Estimate(values[1], None), added_mean)
    basis = f"Evaluated after step {first:.0f} and after step {last:.0f}"
    if with_prompts:
        basis += (
            f" on the same {with_prompts:,} held-out prompts; 95% intervals over prompts, that of the change over "
            "the prompts' own changes. They say nothing about other seeds."
        )
    else:
        basis += " on held-out prompts; only means were kept of them (--log_completions), so there are no intervals."
    return Summary(changes, basis, held_out=True)


def mean(values: Floats) -> Estimate:
    """Returns the mean with its 95% interval: bootstrap, or normal where there are many values."""
    if len(values) <= MOST_RESAMPLED:
        return statistics.mean(values)
    centre, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(centre, (centre - NORMAL_95 * error, centre + NORMAL_95 * error))


def headline(runs: Sequence[Run], summaries: Sequence[Summary]) -> str:
    """Returns what came out, in a sentence or two."""
    if len(runs) == 1:
        return _one(runs[0], summaries[0])
    name = next((n for n in ("gold", "reward") if all(n in s.changes for s in summaries)), None)
    if name is None:
        return f"{len(runs)} runs side by side."
    obstacle = _obstacle(runs, summaries, name)
    if obstacle is not None:
        return f"{len(runs)} runs side by side; {obstacle}, so none is called the best."
    ends = [summary.changes[name].after for summary in summaries]
    highest = max(ends, key=lambda end: end.value)
    best = [
        run.label for run, end in zip(runs, ends, strict=True) if estimate_texts(end)[0] == estimate_texts(highest)[0]
    ]
    result = f"{MEASURES[name].split(',')[0]} on held-out prompts: {estimate_text(highest)}."
    if len(best) == len(runs):
        return f"{len(runs)} runs reach the same {result}"
    if len(best) == 1:
        return f"Of {len(runs)} runs, {best[0]} reaches the highest {result}"
    return f"Of {len(runs)} runs, {', '.join(best[:-1])} and {best[-1]} reach the same highest {result}"


def _obstacle(runs: Sequence[Run], summaries: Sequence[Summary], name: str) -> str | None:
    """Returns why one run's reward, or gold reward, cannot be held against another's; None if it can."""
    if not all(summary.held_out for summary in summaries):
        return "not all have evaluations on held-out prompts to compare"
    judges = [[_named(run, setting) for setting in JUDGES[name]] for run in runs]
    if not all(any(own) for own in judges):
        return "the settings of some do not say which rewards they had"
    sums = [(_named(run, "reward_weights"), sorted(run.functions)) for run in runs]
    if _differ(judges) or (name == "reward" and _differ(sums)):
        return "their settings name different rewards"
    if _differ([[_named(run, setting) for setting in EVALUATION] for run in runs]):
        return "their settings name different evaluations"
    if _differ([_prompts(run) for run in runs]):
        return "they were evaluated on different prompts"
    return None


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _named(run: Run, setting: str) -> list[str]:
    """Returns what a setting names; a file that is still there by its whole path, read where the run was started."""
    value = run.config.get(setting)
    names = [str(name) for name in (value if isinstance(value, list) else [] if value is None else [value])]
    directory = run.starts[-1].get("directory") if run.starts else None
    if not isinstance(directory, str):
        return names
    parts = [name.partition(":") for name in names]  # rewards.py:function
    paths = [os.path.join(directory, path) for path, _, _ in parts]
    return [
        os.path.realpath(path) + colon + function if os.path.exists(path) else name
        for name, path, (_, colon, function) in zip(names, paths, parts, strict=True)
    ]


def _prompts(run: Run) -> list[str]:
    """Returns the prompts of the last evaluation; none where only means were kept of them."""
    rows = np.flatnonzero(run.held_out.column("step") == run.evaluations[-1]["step"])
    return sorted(json.dumps([r.get("prompt_index"), r.get("prompt")]) for r in run.held_out.read(rows.tolist()))


def _one(run: Run, summary: Summary) -> str:
    known = [
        (t, summary.changes[n]) for n, t in (("gold", "gold reward"), ("reward", "reward")) if n in summary.changes
    ]
    if not known or run.step == 0:
        return "No step is done yet."
    steps = "1 step" if run.step == 1 else f"{run.step:,} steps"
    where = "held-out prompts" if summary.held_out else "training prompts"
    parts = [f"the {title} {_moved(change)}" for title, change in known]
    return f"In {steps}, on {where}, {'; '.join(parts)}."


def _moved(change: Change) -> str:
    before, after = (estimate_texts(estimate)[0] for estimate in (change.before, change.after))
    value, interval = estimate_texts(change.change, signed=True)
    return f"{change.verdict}: {before} before, {after} after ({value}" + (f", {interval})" if interval else ")")


def estimate_text(estimate: Estimate) -> str:
    """Returns a value with its interval, such as "0.123 (0.100 to 0.146)"."""
    mean_text, interval = estimate_texts(estimate)
    return mean_text if interval is None else f"{mean_text} ({interval})"


def estimate_texts(estimate: Estimate, *, signed: bool = False) -> tuple[str, str | None]:
    """Returns a value and its interval, if it has one, with the same number of decimals."""
    decimals = min(3, decimals_for([estimate.value, *(estimate.interval or ())]))
    text = number_text(estimate.value, decimals).replace("-", MINUS)
    sign = "+" if signed and round(estimate.value, decimals) > 0 else ""
    if estimate.interval is None or len(set(estimate.interval)) == 1:
        return sign + text, None
    return sign + text, interval_text(estimate.interval, decimals).replace("-", MINUS)

"""The statistics of a comparison: few seeds, so means come with interquartile means and bootstrap intervals.

Everything is resampled over seeds. A resample of n seeds is a row of counts, how often each seed was drawn, so that all
resamples of a statistic are one matrix product. Shapes: R resamples, n seeds.

Source: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv 2108.13264).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]

NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A statistic and its 95% percentile bootstrap interval; without an interval where there is one seed."""

    value: float
    interval: Interval | None


def weighted_mean(values: Floats, counts: Floats) -> Floats:
    """Returns the mean over the last axis, every value taken as often as its count says."""
    result: Floats = (values * counts).sum(-1) / counts.sum(-1)
    return result


def weighted_interquartile_mean(values: Floats, counts: Floats) -> Floats:
    """Returns the mean of the middle half over the last axis, every value taken as often as its count says.

    In sorted order, value i covers the ranks from C_{i-1} to C_i, where C are the cumulated counts; its weight is what
    of that lies between n/4 and 3n/4. That is exact for every n, also where a quarter of n is no whole number.
    """
    values, counts = np.broadcast_arrays(values, counts)
    order = np.argsort(values, axis=-1, kind="stable")
    ends = np.cumsum(np.take_along_axis(counts, order, axis=-1), axis=-1)
    total = ends[..., -1:]
    inside = np.clip(ends, total / 4, 3 * total / 4)
    weights = np.diff(inside, axis=-1, prepend=total / 4)
    result: Floats = (np.take_along_axis(values, order, axis=-1) * weights).sum(-1) / (total[..., 0] / 2)
    return result


def mean(values: Floats) -> Estimate:
    """Returns the mean over seeds."""
    return _estimate(values, weighted_mean)


def interquartile_mean(values: Floats) -> Estimate:
    """Returns the interquartile mean (IQM) over seeds: the mean of the middle half."""
    return _estimate(values, weighted_interquartile_mean)


def paired_difference(values: Floats, baseline: Floats) -> Estimate:
    """Returns the mean of values - baseline, seed by seed: what the seeds share falls out."""
    return mean(values - baseline)


def probability_of_improvement(values: Floats, baseline: Floats) -> Estimate:
    """Returns P(X > Y) + P(X = Y) / 2 for a run X of the one method and a run Y of the other, as Agarwal et al.

    Both sides are resampled independently; the seeds need not be the same.
    """
    wins = (np.sign(values[:, None] - baseline[None, :]) + 1) / 2
    generator = np.random.default_rng(0)
    left, right = _resamples(len(values), generator), _resamples(len(baseline), generator)
    resampled = ((left @ wins) * right).sum(-1) / wins.size
    return Estimate(float(wins.mean()), _interval(resampled) if min(wins.shape) > 1 else None)


@dataclass(frozen=True)
class LengthControl:
    """Rewards as they would be if all completions had the reference length.

    One regression over all final samples, reward = a_method + b * (length - reference length), with one slope b for all
    methods, taken from the deviations within each method (ANCOVA): a method that writes longer does not bend it.
    """

    slope: Estimate
    """b, reward per token; 0 where lengths do not vary within any method."""
    varies: bool
    """Whether lengths vary within any method."""
    means: Mapping[str, Estimate]
    """By method: a_method."""
    interquartile_means: Mapping[str, Estimate]
    """By method: the same of its runs."""
    values: Mapping[str, Floats]
    """By method, [n]: each run's mean reward - b * (its mean length - reference length)."""


def length_controlled(samples: Mapping[str, Sequence[Floats]], reference_length: float) -> LengthControl:
    """Returns the length-controlled rewards; samples holds, by method and run, rows of (length, reward).

    Intervals come from resampling the seeds of every method independently and fitting anew, b included.
    """
    sums = {label: np.stack([_sums(run, reference_length) for run in runs]) for label, runs in samples.items()}
    generator = np.random.default_rng(0)
    drawn = {label: _resamples(len(runs), generator) for label, runs in sums.items()}
    slopes, slope = (
        _slopes(sums, drawn),
        _slopes(sums, {label: np.ones((1, len(runs))) for label, runs in sums.items()}),
    )
    means, interquartile_means, values = {}, {}, {}
    for label, runs in sums.items():
        several = len(runs) > 1
        total, pooled = runs.sum(0), drawn[label] @ runs
        adjusted = (pooled[:, 2] - slopes * pooled[:, 1]) / pooled[:, 0]
        means[label] = Estimate(
            float((total[2] - slope[0] * total[1]) / total[0]), _interval(adjusted) if several else None
        )
        values[label] = (runs[:, 2] - slope[0] * runs[:, 1]) / runs[:, 0]
        per_run = (runs[:, 2] - slopes[:, None] * runs[:, 1]) / runs[:, 0]
        interquartile_means[label] = Estimate(
            float(weighted_interquartile_mean(values[label], np.ones(len(runs)))),
            _interval(weighted_interquartile_mean(per_run, drawn[label])) if several else None,
        )
    any_several = any(len(runs) > 1 for runs in sums.values())
    return LengthControl(
        slope=Estimate(float(slope[0]), _interval(slopes) if any_several else None),
        varies=any(len(np.unique(np.concatenate(list(runs))[:, 0])) > 1 for runs in samples.values()),
        means=means,
        interquartile_means=interquartile_means,
        values=values,
    )


def _sums(run: Floats, reference_length: float) -> Floats:
    """Returns what the regression needs of a run: number, sum l, sum r, sum l^2, sum l r; l = length - reference."""
    lengths, rewards = run[:, 0] - reference_length, run[:, 1]
    return np.array([len(run), lengths.sum(), rewards.sum(), lengths @ lengths, lengths @ rewards])


def _slopes(sums: Mapping[str, Floats], counts: Mapping[str, Floats]) -> Floats:
    """Returns [R] common slopes: the methods' sums of l r over those of l^2, both about the method's own means."""
    numerator, denominator, scale = 0.0, 0.0, 0.0
    for label, runs in sums.items():
        num, length, reward, square, product = (counts[label] @ runs).T
        numerator = numerator + product - length * reward / num
        denominator = denominator + square - length**2 / num
        scale = scale + square
    varies = np.asarray(denominator > 1e-9 * np.asarray(scale))  # what rounding leaves of no variance is no variance
    slopes: Floats = np.where(varies, numerator, 0.0) / np.where(varies, denominator, 1.0)
    return slopes


def _estimate(values: Floats, statistic: Callable[[Floats, Floats], Floats]) -> Estimate:
    counts = _fixed_resamples(len(values))
    interval = _interval(statistic(values, counts)) if len(values) > 1 else None
    return Estimate(float(statistic(values, np.ones(len(values)))), interval)


@lru_cache(maxsize=8)
def _fixed_resamples(num_seeds: int) -> Floats:
    """Returns the resamples of all statistics of one method, the same every time; not to be changed."""
    return _resamples(num_seeds, np.random.default_rng(0))


def _resamples(num_seeds: int, generator: np.random.Generator) -> Floats:
    """Returns [R, n]: how often each seed is drawn when n are drawn with replacement."""
    return generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=NUM_RESAMPLES).astype(np.float64)


def _interval(resampled: Floats) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)

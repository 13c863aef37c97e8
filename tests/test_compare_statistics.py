"""The statistics of a comparison: exact values, enumerated resamples, planted effects."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest

from remax.compare import statistics
from remax.compare.statistics import Floats

HOSTILE = '$\\frac{$</title><script>alert(1)</script>"><img src=http://x onerror=y> [red]|\x1b[2J'


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7], 7),
        ([1, 5], 3),
        ([0, 3, 90], (0.25 * 0 + 3 + 0.25 * 90) / 1.5),
        ([1, 2, 3, 10], (2 + 3) / 2),
        ([0, 1, 2, 4, 100], (0.75 * 1 + 2 + 0.75 * 4) / 2.5),
        ([-50, 2, 3, 5, 8, 90], (0.5 * 2 + 3 + 5 + 0.5 * 8) / 3),
        ([-9, -8, 1, 2, 3, 6, 70, 80], (1 + 2 + 3 + 6) / 4),
    ],
)
def test_the_interquartile_mean_by_hand(values: list[float], expected: float) -> None:
    shuffled = np.random.default_rng(0).permutation(np.array(values, dtype=np.float64))
    assert statistics.interquartile_mean(shuffled).value == pytest.approx(expected, abs=1e-12)


def test_counts_mean_repetitions() -> None:
    values, counts = np.array([3.0, -1.0, 10.0, 4.0]), np.array([2.0, 0.0, 1.0, 1.0])
    repeated, ones = np.array([3.0, 3.0, 10.0, 4.0]), np.ones(4)
    for statistic in (statistics.weighted_mean, statistics.weighted_interquartile_mean):
        assert statistic(values, counts) == pytest.approx(statistic(repeated, ones))


def every_resample(*sizes: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    return itertools.product(*(itertools.product(range(n), repeat=n) for n in sizes))


def percentiles(all_values: Sequence[float]) -> Floats:
    """The limits of the middle 95%, without interpolating between the few values there are."""
    limits: Floats = np.percentile(all_values, [2.5, 97.5], method="inverted_cdf")
    return limits


@pytest.mark.parametrize("values", [[0.0, 1.0, 5.0], [0.0, 1.0, 10.0, 100.0], [2.0, 3.0, 3.5, 7.0, 20.0]])
def test_intervals_are_the_percentiles_of_all_resamples(values: list[float]) -> None:
    array = np.array(values)
    means = [array[list(rows)].mean() for (rows,) in every_resample(len(values))]
    result = statistics.mean(array)
    assert result.value == pytest.approx(np.mean(values))
    assert result.interval == pytest.approx(percentiles(means), abs=0.02 * np.ptp(array))


def test_the_interval_of_a_constant_is_that_constant_and_one_seed_has_none() -> None:
    for estimate in (statistics.mean, statistics.interquartile_mean):
        result = estimate(np.full(5, 0.1))
        assert result.interval == pytest.approx((0.1, 0.1), abs=1e-15)
        assert estimate(np.array([0.3])) == statistics.Estimate(0.3, None)


def test_intervals_are_deterministic() -> None:
    values = np.random.default_rng(1).normal(size=7)
    first = statistics.mean(values)
    statistics._fixed_resamples.cache_clear()
    assert statistics.mean(values) == first


def test_a_paired_difference_drops_what_seeds_share() -> None:
    hard_or_easy = np.array([-30.0, 0.0, 50.0])
    result = statistics.paired_difference(hard_or_easy + 0.25, hard_or_easy)
    assert result.value == 0.25
    assert result.interval == pytest.approx((0.25, 0.25))


def test_the_probability_of_improvement_counts_ties_half_and_resamples_both_sides() -> None:
    ours, theirs = np.array([1.0, 2.0, 2.0]), np.array([0.0, 2.0, 3.0])
    result = statistics.probability_of_improvement(ours, theirs)
    assert result.value == pytest.approx((1 + 1.5 + 1.5) / 9)

    def wins(left: Sequence[int], right: Sequence[int]) -> float:
        return float(np.mean([(ours[i] > theirs[j]) + 0.5 * (ours[i] == theirs[j]) for i in left for j in right]))

    all_values = [wins(left, right) for left, right in every_resample(3, 3)]
    assert result.interval == pytest.approx(percentiles(all_values), abs=0.03)
    assert statistics.probability_of_improvement(ours, theirs[:1]).interval is None
    equal = statistics.probability_of_improvement(np.arange(3.0), np.arange(3.0))
    assert equal.value == 0.5
    assert equal.interval == pytest.approx((1 / 18, 17 / 18), abs=0.06), "one common resample would always give 0.5"


def normal_equations(samples: Mapping[str, Floats], reference_length: float) -> tuple[float, dict[str, float]]:
    """Least squares with one indicator column per method and one column of lengths."""
    rows, targets = [], []
    for column, run in enumerate(samples.values()):
        for length, reward in run:
            rows.append([float(column == c) for c in range(len(samples))] + [length - reference_length])
            targets.append(reward)
    design = np.array(rows)
    *levels, slope = np.linalg.solve(design.T @ design, design.T @ np.array(targets))
    return slope, dict(zip(samples, levels, strict=True))


def noisy_runs() -> dict[str, list[Floats]]:
    generator = np.random.default_rng(3)

    def run(num: int, length: float, level: float) -> Floats:
        lengths = generator.normal(length, 5, num)
        return np.stack([lengths, level + 0.03 * lengths + generator.normal(0, 0.5, num)], axis=1)

    return {"a": [run(9, 30, 1.0), run(14, 33, 1.4)], "b": [run(20, 55, 0.2), run(5, 40, 0.1)]}


def test_length_control_is_the_least_squares_solution_also_in_every_resample() -> None:
    runs = noisy_runs()
    result = statistics.length_controlled(runs, 41.5)
    pooled = {label: np.concatenate(own) for label, own in runs.items()}
    slope, levels = normal_equations(pooled, 41.5)
    assert result.slope.value == pytest.approx(slope)
    assert {label: mean.value for label, mean in result.means.items()} == pytest.approx(levels)
    for label, own in runs.items():
        expected = [run[:, 1].mean() - slope * (run[:, 0].mean() - 41.5) for run in own]
        assert result.values[label] == pytest.approx(expected)
        assert result.interquartile_means[label].value == pytest.approx(np.mean(expected))

    outcomes = []
    for rows_a, rows_b in every_resample(2, 2):
        drawn = {"a": [runs["a"][i] for i in rows_a], "b": [runs["b"][i] for i in rows_b]}
        outcomes.append(normal_equations({label: np.concatenate(own) for label, own in drawn.items()}, 41.5))
    # Sixteen equally likely outcomes, or fewer: 2.5% lies within the lowest of them and 97.5% within the highest.
    slopes = [outcome[0] for outcome in outcomes]
    assert result.slope.interval == pytest.approx((min(slopes), max(slopes)))
    for label in runs:
        own_levels = [outcome[1][label] for outcome in outcomes]
        assert result.means[label].interval == pytest.approx((min(own_levels), max(own_levels)))


def test_a_planted_length_effect_is_removed() -> None:
    generator = np.random.default_rng(5)
    quality = {"short": 0.5, "long": 0.2}
    samples = {}
    for label, length in (("short", 20), ("long", 80)):
        lengths = generator.integers(length - 8, length + 8, (3, 40)).astype(float)
        samples[label] = [np.stack([row, quality[label] + 0.02 * (row - 30)], axis=1) for row in lengths]
    assert samples["long"][0][:, 1].mean() > samples["short"][0][:, 1].mean() + 0.5
    result = statistics.length_controlled(samples, 30.0)
    assert result.slope.value == pytest.approx(0.02)
    assert result.varies
    for label, expected in quality.items():
        assert result.means[label].value == pytest.approx(expected)
        assert result.means[label].interval == pytest.approx((expected, expected))


def test_without_variance_of_lengths_nothing_is_controlled() -> None:
    runs = {"a": [np.array([[10.1, 1.0], [10.1, 2.0]])] * 2, "b": [np.array([[20.3, 4.0], [20.3, 5.0]])]}
    result = statistics.length_controlled(runs, 15.0)
    assert result.slope.value == 0
    assert not result.varies
    assert {label: mean.value for label, mean in result.means.items()} == {"a": 1.5, "b": 4.5}
    assert result.means["b"].interval is None

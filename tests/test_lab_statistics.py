"""`remax lab`'s statistics: those of the gradients themselves, with intervals that cover the truth."""

import numpy as np
import pytest

from remax.lab import statistics
from remax.lab.statistics import gram_by_layer, resample_counts

LAYERS = {"a": [slice(0, 20), slice(33, 50)], "b": [slice(20, 33)]}


def noisy_gradients(seed: int, num: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """[K, 50] float32 gradients with an expectation [50] of squared length 2 and a variance of 50 x 0.3^2 = 4.5."""
    generator = np.random.default_rng(seed)
    expectation = np.full(50, 0.2)
    return (expectation + 0.3 * generator.normal(size=(num, 50))).astype(np.float32), expectation


def test_statistics_equal_those_of_the_gradients_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "COLUMNS_AT_ONCE", 7)
    gradients, _ = noisy_gradients(0)
    grams, exact = gram_by_layer(gradients, LAYERS), gradients.astype(np.float64)
    gram, counts = sum(grams.values()), resample_counts(12, 0)
    np.testing.assert_allclose(gram, exact @ exact.T, rtol=1e-12)
    trace = np.trace(np.cov(exact.T))
    assert statistics.variance(gram, counts).value == pytest.approx(trace, rel=1e-12)
    by_layer = {name: statistics.variance(own, counts).value for name, own in grams.items()}
    assert by_layer["b"] == pytest.approx(np.trace(np.cov(exact[:, 20:33].T)), rel=1e-12)
    assert sum(by_layer.values()) == pytest.approx(trace, rel=1e-12)
    mean = exact.mean(0)
    assert statistics.signal(gram, counts).value == pytest.approx(mean @ mean - trace / 12, rel=1e-12)
    for k, cosine in enumerate(statistics.cosines(gram)):
        others = np.delete(exact, k, axis=0).mean(0)
        expected = exact[k] @ others / np.linalg.norm(exact[k]) / np.linalg.norm(others)
        assert cosine == pytest.approx(expected, rel=1e-9)
    minus, _ = noisy_gradients(1)
    differences = gram_by_layer(gradients, LAYERS, minus=minus)
    np.testing.assert_allclose(sum(differences.values()), (exact - minus) @ (exact - minus).T, rtol=1e-9)


def test_resamples_are_statistics_of_resampled_gradients() -> None:
    gradients, _ = noisy_gradients(0)
    gram, counts = sum(gram_by_layer(gradients, LAYERS).values()), resample_counts(12, 3)
    assert (counts.sum(1) == 12).all()
    drawn = np.repeat(gradients.astype(np.float64), counts[5].astype(int), axis=0)
    trace, mean = np.trace(np.cov(drawn.T)) * 12 / 11, drawn.mean(0)
    assert statistics.variance(gram, counts).resampled[5] == pytest.approx(trace, rel=1e-9)
    assert statistics.signal(gram, counts).resampled[5] == pytest.approx(mean @ mean - 2 * trace / 12, rel=1e-9)


def test_intervals_cover_the_truth_and_estimates_are_unbiased() -> None:
    inside, values, truths = np.zeros(4), np.zeros(2), (4.5, 2.0, 2.0 / 4.5, 4.5 / 2.0)
    for seed in range(200):
        gradients, _ = noisy_gradients(seed, num=30)
        gram, counts = sum(gram_by_layer(gradients, LAYERS).values()), resample_counts(30, seed)[:500]
        variance, signal = statistics.variance(gram, counts), statistics.signal(gram, counts)
        values += np.array([variance.value, signal.value]) / 200
        for i, estimate in enumerate((variance, signal, signal / variance, variance / signal)):
            low, high = estimate.interval
            inside[i] += low <= truths[i] <= high
    assert values == pytest.approx([4.5, 2.0], rel=0.02)
    assert (inside / 200 > 0.88).all()
    assert (inside / 200 < 0.995).all()


def test_pure_noise_has_no_signal_and_no_direction() -> None:
    noise = np.random.default_rng(0).normal(size=(40, 500)).astype(np.float32)
    gram, counts = sum(gram_by_layer(noise, {"a": [slice(0, 500)]}).values()), resample_counts(40, 0)
    variance, signal = statistics.variance(gram, counts), statistics.signal(gram, counts)
    assert signal.value < 0.05 * variance.value / 40 * 40
    assert (variance / signal).interval[1] == float("inf")
    assert abs(statistics.cosines(gram).mean()) < 0.03, "a mean with the gradient in it would be at 0.16"
    assert statistics.cosines(np.zeros((3, 3))).tolist() == [0.0, 0.0, 0.0]


def test_agreement_tells_equal_expectations_from_others() -> None:
    p_values, distances = [], []
    for seed in range(100):
        noise = np.random.default_rng(seed).normal(size=(30, 20))
        result = statistics.agreement(noise @ noise.T, resample_counts(30, seed))
        p_values.append(result.p_value)
        distances.append(result.distance)
    assert np.mean(distances) == pytest.approx(1.0, abs=0.05)
    assert 0.35 < np.mean(p_values) < 0.65
    assert np.mean(np.array(p_values) < 0.05) < 0.15
    noise = np.random.default_rng(0).normal(size=(30, 20)) + 0.5
    shifted = statistics.agreement(noise @ noise.T, resample_counts(30, 0))
    assert shifted.p_value == 0.0
    assert shifted.distance > 2
    assert statistics.agreement(np.zeros((30, 30)), resample_counts(30, 0)) == (0.0, 1.0)

"""Variance, signal and direction of random gradients, from their inner products alone.

Legend: K gradients g_k of D weights, G their Gram matrix G_kj = g_k . g_j [K, K], R resamples. A resample of K
gradients is a row of counts, how often each was drawn, so that all resamples of a statistic are one matrix product;
all statistics of an experiment use the same counts, so that quotients of them have intervals too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUM_RESAMPLES = 2000
COLUMNS_AT_ONCE = 2**16
"""Weights that are held in float64 for all gradients at once."""


@dataclass(frozen=True)
class Estimate:
    """A statistic and its bootstrap distribution."""

    value: float
    resampled: Floats
    """[R]"""

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% percentile bootstrap interval; infinite where it reaches a division by zero."""
        low, high = np.quantile(self.resampled, [0.025, 0.975], method="inverted_cdf")
        return float(low), float(high)

    def __mul__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value * other.value, self.resampled * other.resampled)

    def __truediv__(self, other: "Estimate") -> "Estimate":
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimate(float(np.float64(self.value) / other.value), self.resampled / other.resampled)


def resample_counts(num_gradients: int, seed: int) -> Floats:
    """Returns [R, K]: how often each gradient is drawn when K are drawn with replacement."""
    generator = np.random.default_rng(seed)
    chances = np.full(num_gradients, 1 / num_gradients)
    return generator.multinomial(num_gradients, chances, size=NUM_RESAMPLES).astype(np.float64)


def gram_by_layer(
    gradients: NDArray[np.float32], layers: Mapping[str, Sequence[slice]], minus: NDArray[np.float32] | None = None
) -> dict[str, Floats]:
    """Returns the Gram matrix [K, K] of each layer's columns of the gradients [K, D], or of gradients - minus.

    In float64 and in pieces: the gradients may be a file much larger than memory.
    """
    grams = {}
    for name, runs in layers.items():
        grams[name] = np.zeros((len(gradients), len(gradients)))
        starts = [(run, start) for run in runs for start in range(run.start, run.stop, COLUMNS_AT_ONCE)]
        for run, start in starts:
            piece = slice(start, min(start + COLUMNS_AT_ONCE, run.stop))
            block = gradients[:, piece].astype(np.float64)
            if minus is not None:
                block -= minus[:, piece]
            grams[name] += block @ block.T
    return grams


def mean(values: Floats, counts: Floats) -> Estimate:
    """Returns the mean of one number per gradient, [K]."""
    return Estimate(float(values.mean()), counts @ values / len(values))


def variance(gram: Floats, counts: Floats) -> Estimate:
    """Returns the trace of the gradients' covariance, sum_k |g_k - mean|^2 / (K - 1), which is unbiased.

    A resample is a sample of the sample, whose variance is (K - 1)/K of what it estimates; that is made good.
    """
    num = len(gram)

    def trace(counts: Floats) -> Floats:
        result: Floats = (counts @ gram.diagonal() - num * _squared_means(gram, counts)) / (num - 1)
        return result

    return Estimate(_at_sample(trace(np.ones((1, num)))), trace(counts) * num / (num - 1))


def signal(gram: Floats, counts: Floats) -> Estimate:
    """Returns the squared length of the expected gradient, |mean|^2 - variance / K, at least 0.

    Without the second term, which is the expected part of noise in it, a mean of pure noise would pass for a signal. A
    resample's mean has the noise of the sample and that of the resample: there it is subtracted twice.
    """
    num, noise = len(gram), variance(gram, counts)
    value = _at_sample(_squared_means(gram, np.ones((1, num)))) - noise.value / num
    resampled = _squared_means(gram, counts) - 2 * noise.resampled / num
    return Estimate(max(value, 0.0), resampled.clip(min=0.0))


def cosines(gram: Floats) -> Floats:
    """Returns the cosine of each gradient to the mean of the others, [K]; 0 where one of them has no direction.

    A mean that has the gradient itself in it would be near it without any signal: at 1/sqrt(K) for pure noise.
    """
    squares = gram.diagonal()
    with_all = gram.sum(axis=1)
    others = gram.sum() - 2 * with_all + squares  # |sum of the others|^2
    lengths = np.sqrt(squares * others.clip(min=0.0))
    result: Floats = np.where(lengths > 0, with_all - squares, 0.0) / np.where(lengths > 0, lengths, 1.0)
    return result


class Agreement(NamedTuple):
    """Whether two sets of gradients, pairwise from the same rollouts, have the same expectation."""

    distance: float
    """Of the two means in standard errors, |mean d| / sqrt(variance(d) / K) of the differences d: about 1 if so."""
    p_value: float
    """How often a distance as large comes by chance alone: the part of resamples whose mean is as far from that of the
    sample as the sample's is from 0."""


def agreement(gram: Floats, counts: Floats) -> Agreement:
    """Returns whether the expectation is 0 for the differences d_k with this Gram matrix."""
    num = len(gram)
    squared = _at_sample(_squared_means(gram, np.ones((1, num))))
    noise = variance(gram, counts).value / num
    if squared <= 0.0 or noise <= 0.0:
        return Agreement(0.0 if squared <= 0.0 else float("inf"), 1.0 if squared <= 0.0 else 0.0)
    by_chance = _squared_means(gram, counts - 1) * num / (num - 1)
    return Agreement(float(np.sqrt(squared / noise)), float((by_chance >= squared).mean()))


def _squared_means(gram: Floats, weights: Floats) -> Floats:
    """Returns |sum_k w_k g_k / K|^2 for each row of weights [R, K]: [R]."""
    result: Floats = ((weights @ gram) * weights).sum(axis=1) / len(gram) ** 2
    return result


def _at_sample(values: Floats) -> float:
    return float(values[0])

"""The statistics of a win rate: ties as half, controlled for length, with intervals and an exact test.

Legend: n pairs; score s_i in [0, 1] of the first side, 1 where it won, 1/2 for a tie (of two orders: their mean);
d_i = length of the first side's output minus that of the second, in characters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remax.evaluate import bootstrap_interval

Floats = NDArray[np.float64]
Interval = tuple[float, float]

PRIOR_DEVIATION = 10.0
"""Of the normal prior on both coefficients: far too wide to move a fit of two dozen pairs or more, and narrow enough
to keep it finite where one side wins every pair, or every longer one."""
MOST_ITERATIONS = 100
TOLERANCE = 1e-8


@dataclass(frozen=True)
class LengthControlled:
    """The win rate as it would be between outputs of equal length."""

    rate: float
    interval: Interval
    slope: float
    """What a length difference of one standard deviation does to the log-odds is slope * tanh(1)."""
    extrapolated: bool
    """Whether one side's outputs are longer in every pair: no pair tells then what equal lengths would do."""


def win_rate(scores: Sequence[float], seed: int) -> tuple[float, Interval]:
    """Returns the mean score and its 95% bootstrap interval over pairs."""
    values = np.asarray(scores, dtype=np.float64)
    return float(values.mean()), bootstrap_interval(values, seed=seed)


def sign_test(num_wins: int, num_losses: int) -> float:
    """Returns the two-sided p-value of the exact sign test; ties are left out.

    If neither side were better, the number of wins would be binomial with chance 1/2: p is twice the probability of
    the smaller count or less, at most 1.
    """
    number, fewer = num_wins + num_losses, min(num_wins, num_losses)
    coefficient = total = 1
    for k in range(fewer):
        coefficient = coefficient * (number - k) // (k + 1)
        total += coefficient
    # Whole numbers of any size divide exactly where floats would be infinite.
    return min(1.0, float(2 * total / 2**number))


def length_controlled(scores: Sequence[float], differences: Sequence[float], seed: int) -> LengthControlled | None:
    """Returns the length-controlled win rate; None where the length differences do not vary.

    A logistic regression P(first side wins) = sigmoid(theta + phi * tanh(d / std(d))), fitted to the scores by maximum
    likelihood with a wide normal prior (PRIOR_DEVIATION) on both; its prediction at d = 0 is sigmoid(theta). The
    interval comes from fitting anew to resampled pairs, with std(d) as it is.

    Source of the idea and of the length term: Dubois et al. 2024, "Length-Controlled AlpacaEval" (arXiv 2404.04475).
    Theirs has a term for the difficulty of each instruction beside it, which takes the outputs of many models.
    """
    lengths = np.asarray(differences, dtype=np.float64)
    deviation = lengths.std()
    if deviation == 0:
        return None
    rows = np.stack([np.asarray(scores, dtype=np.float64), np.tanh(lengths / deviation)], axis=1)
    fitted = fit_logistic(rows)

    def at_equal_length(sample: Floats) -> float:
        return float(_sigmoid(fit_logistic(sample, start=fitted)[0]))

    return LengthControlled(
        rate=float(_sigmoid(fitted[0])),
        interval=bootstrap_interval(rows, at_equal_length, seed=seed),
        slope=float(fitted[1]),
        extrapolated=bool((lengths > 0).all() or (lengths < 0).all()),
    )


def fit_logistic(rows: Floats, start: Floats | None = None) -> Floats:
    """Returns (theta, phi) that maximise the penalised likelihood of rows [n, 2] of a score and a feature.

    By Newton's method with halved steps where a whole one would overshoot; the objective is strictly concave.
    """
    scores, feature = rows[:, 0], rows[:, 1]
    weight = PRIOR_DEVIATION**-2

    def objective(coefficients: Floats) -> float:
        logits = coefficients[0] + coefficients[1] * feature
        likelihood = scores @ logits - np.logaddexp(0, logits).sum()
        return float(likelihood - weight / 2 * coefficients @ coefficients)

    coefficients = np.zeros(2) if start is None else start
    value = objective(coefficients)
    for _ in range(MOST_ITERATIONS):
        chances = _sigmoid(coefficients[0] + coefficients[1] * feature)
        residuals, spread = scores - chances, chances * (1 - chances)
        gradient = np.array([residuals.sum(), feature @ residuals]) - weight * coefficients
        mixed = feature @ spread
        of_theta, of_phi = spread.sum() + weight, feature**2 @ spread + weight
        inverse = np.array([[of_phi, -mixed], [-mixed, of_theta]]) / (of_theta * of_phi - mixed**2)
        step = inverse @ gradient
        if np.abs(step).max() < TOLERANCE:
            break
        # Rounding may deny the last, tiny step an increase.
        while (reached := objective(coefficients + step)) < value and np.abs(step).max() > TOLERANCE:
            step = step / 2
        coefficients, value = coefficients + step, reached
    return coefficients


def _sigmoid(logits: Floats) -> Floats:
    result: Floats = (1 + np.tanh(logits / 2)) / 2
    return result


@dataclass(frozen=True)
class PositionBias:
    """How much a judge's answers depend on which output stands first."""

    first_rate: float | None
    """Of its answers that are no ties, the fraction that chose the output that stood first: 1/2 without bias."""
    agreement: float
    """The fraction of pairs for which both orders gave the same verdict."""


def position_bias(answers: Sequence[tuple[float, float]]) -> PositionBias | None:
    """Returns the position bias of answers, one pair each: the score of the output that stands first, in both orders.

    None without answers. In the second order the sides are swapped, so verdicts agree if the two scores add up to 1.
    """
    if not answers:
        return None
    decided = [score for pair in answers for score in pair if score != 0.5]
    return PositionBias(
        first_rate=sum(decided) / len(decided) if decided else None,
        agreement=sum(first + second == 1 for first, second in answers) / len(answers),
    )

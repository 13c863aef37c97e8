"""The statistics of win rates: exact tests, length control by logistic regression, bias of the order."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from judging import pair
from remax.errors import UserError
from remax.winrate.command import summary
from remax.winrate.judges import Verdict, Verdicts
from remax.winrate.statistics import fit_logistic, length_controlled, position_bias, sign_test, win_rate


@pytest.mark.parametrize("number", range(9))
def test_sign_test_by_enumeration(number: int) -> None:
    """p is the fraction of all sequences of fair coins that are at least as far from the middle."""
    for wins in range(number + 1):
        distance = abs(2 * wins - number)
        far = sum(abs(2 * sum(coins) - number) >= distance for coins in itertools.product((0, 1), repeat=number))
        assert sign_test(wins, number - wins) == far / 2**number


def test_sign_test_of_many_pairs_is_exact() -> None:
    exact = Fraction(2 * sum(math.comb(1000, k) for k in range(481)), 2**1000)
    assert sign_test(520, 480) == pytest.approx(float(exact), rel=1e-12)
    assert sign_test(520, 480) == sign_test(480, 520)
    assert sign_test(20000, 0) == 0.0


def test_win_rate_counts_ties_as_half() -> None:
    rate, (low, high) = win_rate([1, 1, 0.5, 0, 0.75], 0)
    assert rate == pytest.approx(0.65)
    assert 0 <= low < rate < high <= 1


def test_logistic_fit_has_its_closed_form() -> None:
    """Two values of the feature: each group's chance is its mean score, so theta and phi follow from two logits."""
    groups = {-0.6: 0.3, 0.2: 0.8}
    rows = np.array([(mean, feature) for feature, mean in groups.items() for _ in range(20_000)])
    low, high = (math.log(mean / (1 - mean)) for mean in groups.values())
    slope = (high - low) / 0.8
    assert fit_logistic(rows) == pytest.approx([low + 0.6 * slope, slope], abs=2e-3)


def test_logistic_fit_maximises_the_likelihood_with_its_prior() -> None:
    """Against coordinate-wise ternary search on an objective in plain Python; separable data, too."""
    generator = np.random.default_rng(0)
    feature = np.tanh(generator.normal(size=25))
    cases = [generator.choice([0, 0.25, 0.5, 1], size=25), np.ones(25), (feature > 0.1).astype(float)]
    for scores in cases:
        rows = np.stack([scores, feature], axis=1)

        def objective(theta: float, phi: float, rows: Any = rows) -> float:
            total = -(theta**2 + phi**2) / 200
            for score, x in rows.tolist():
                chance = 1 / (1 + math.exp(-(theta + phi * x)))
                total += score * math.log(chance) + (1 - score) * math.log1p(-chance)
            return total

        def best(along: Callable[[float], float]) -> float:
            low, high = -30.0, 30.0
            for _ in range(90):
                first, second = low + (high - low) / 3, high - (high - low) / 3
                low, high = (low, second) if along(first) > along(second) else (first, high)
            return (low + high) / 2

        fitted = fit_logistic(rows)
        theta, phi = fitted
        assert theta == pytest.approx(best(lambda t, phi=phi: objective(t, phi)), abs=1e-5)
        assert phi == pytest.approx(best(lambda p, theta=theta: objective(theta, p)), abs=1e-5)
        assert fit_logistic(rows, start=np.array([4.0, -6.0])) == pytest.approx(fitted, abs=1e-6)


def test_length_control_takes_away_what_length_decides() -> None:
    generator = np.random.default_rng(1)
    differences = generator.normal(40, 100, size=400)
    longer_wins = generator.random(400) < 1 / (1 + np.exp(-3 * np.tanh(differences / differences.std())))
    scores = longer_wins.astype(float)
    controlled = length_controlled(scores, differences, 0)
    assert controlled is not None
    assert scores.mean() > 0.57
    assert controlled.interval[0] < 0.5 < controlled.interval[1]
    assert controlled.slope == pytest.approx(3, abs=0.7)
    assert not controlled.extrapolated

    quality = (generator.random(400) < 0.7).astype(float)
    controlled = length_controlled(quality, differences, 0)
    assert controlled is not None
    assert controlled.rate == pytest.approx(quality.mean(), abs=0.03)
    width = controlled.interval[1] - controlled.interval[0]
    assert width == pytest.approx(2 * 1.96 * math.sqrt(0.21 / 400), rel=0.25)


def test_length_control_knows_what_it_cannot_tell() -> None:
    assert length_controlled([1, 0, 1], [5, 5, 5], 0) is None
    always_longer = length_controlled([1, 1, 0, 1], [5, 9, 30, 2], 0)
    assert always_longer is not None
    assert always_longer.extrapolated
    theta, _ = fit_logistic(np.array([[1.0, math.tanh(k - 25)] for k in range(50)]))
    assert 4 < theta < 10, "finite where one side wins every pair"


def test_position_bias_by_hand() -> None:
    bias = position_bias([(1.0, 1.0), (1.0, 0.0), (0.5, 0.5), (0.0, 0.5)])
    assert bias is not None
    assert bias.first_rate == 3 / 5
    assert bias.agreement == 2 / 4
    assert position_bias([]) is None
    undecided = position_bias([(0.5, 0.5)])
    assert undecided is not None
    assert (undecided.first_rate, undecided.agreement) == (None, 1.0)


def test_summary_counts_only_what_has_a_verdict_and_tells_lengths() -> None:
    pairs = [pair("p", "a" * k, "b" * (k % 3)) for k in range(5)]
    judged = Verdicts([Verdict(s) for s in (1.0, 0.5, 0.0, None, 0.75)], {"unanswered": 1})
    result = summary(pairs, judged, 0)
    assert (result["wins"], result["ties"], result["losses"]) == (2, 1, 1)
    assert (result["num_pairs"], result["num_judged"], result["unanswered"]) == (5, 4, 1)
    assert result["win_rate"]["mean"] == pytest.approx(2.25 / 4)
    assert result["sign_test"]["p_value"] == 1.0
    assert result["mean_length"] == {"a": 7 / 4, "b": 4 / 4, "unit": "characters"}
    assert result["position"] is None
    with pytest.raises(UserError, match="no pair of 1 could be judged"):
        summary(pairs[:1], Verdicts([Verdict(None)], {}), 0)

"""Advantages and losses of all methods as pure functions, against their formulas written as loops over numbers."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from remax import estimators
from remax.methods import PPO, baselines

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
LENGTHS = [5, 3, 1, 4]
GARBAGE = torch.where(MASK, 0.0, torch.nan).double()
"""Added to what is given, outside the mask: it must have no effect."""
NAN = math.nan


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(actual: Tensor, expected: list[list[float]]) -> None:
    """To 1e-12, missing numbers included; expected rows may be shorter, zeros follow."""
    width = actual.shape[1]
    padded = torch.tensor([row + [0.0] * (width - len(row)) for row in expected], dtype=torch.float64)
    torch.testing.assert_close(actual.double(), padded, rtol=0, atol=1e-12, equal_nan=True)


# Baselines ------------------------------------------------------------------------------------------------------------

REWARDS = torch.tensor(
    [[1.0, 2.0, 6.0], [NAN, 4.0, -2.0], [NAN, NAN, 3.0], [NAN, NAN, NAN], [5.0, 5.0, 5.0]], dtype=torch.float64
)


def test_leave_one_out_is_the_mean_of_the_others_that_have_a_reward() -> None:
    expected = [[4.0, 3.5, 1.5], [1.0, -2.0, 4.0], [3.0, 3.0, NAN], [NAN] * 3, [5.0] * 3]
    assert_equal(estimators.leave_one_out(REWARDS), expected)
    assert estimators.leave_one_out(torch.ones(2, 1)).isnan().all()


def test_group_mean_and_standard_deviation_are_those_of_the_rewards_that_are_there() -> None:
    assert_equal(estimators.group_mean(REWARDS), [[3.0] * 3, [1.0] * 3, [3.0] * 3, [NAN] * 3, [5.0] * 3])
    for row, rewards in zip(estimators.group_std(REWARDS), REWARDS, strict=True):
        if rewards.isnan().all():
            continue  # nothing there to divide
        present = rewards[rewards.isfinite()]
        expected = present.std() + 1e-4 if len(present) > 1 else torch.tensor(NAN).double()
        torch.testing.assert_close(row, expected.expand(3), rtol=0, atol=1e-12, equal_nan=True)


def test_dr_grpo_is_rloo_times_k_minus_1_over_k() -> None:
    for k in (2, 3, 5):
        rewards = randn(4, k, seed=k)
        mean_centred, others_left = (rewards - f(rewards) for f in (estimators.group_mean, estimators.leave_one_out))
        torch.testing.assert_close(mean_centred, others_left * (k - 1) / k, rtol=0, atol=1e-12)


def test_the_moving_average_is_of_past_batches_and_newer_ones_weigh_more() -> None:
    baseline, greedy = baselines.MovingAverage(), torch.full((2,), NAN)
    batches = [[[1.0, 3.0], [NAN, 5.0]], [[NAN, NAN], [NAN, NAN]], [[7.0, 8.0], [9.0, 8.0]], [[0.0, 0.0], [0.0, 1.0]]]
    seen = []
    for batch in map(torch.tensor, batches):
        values = baseline(batch, greedy)
        assert values.shape == batch.shape
        assert values.unique().numel() == 1
        seen.append(values[0, 0].item())
        baseline.observe(batch, greedy)
    # A batch without rewards says nothing and does not age the others.
    assert seen == pytest.approx([0.0, 3.0, 3.0, (0.9 * 3 + 8) / 1.9])
    assert baseline(batch, greedy)[0, 0].item() == pytest.approx((0.81 * 3 + 0.9 * 8 + 0.25) / 2.71)


def test_the_mixed_baseline_takes_the_alpha_of_least_squares_over_past_batches() -> None:
    """Against a search over alpha of the weighted mean square of r - b."""
    baseline = baselines.Mixed()
    assert baseline.alpha == 0.5
    batches = [(randn(6, 3, seed=seed), randn(6, seed=seed + 10)) for seed in (1, 2)]
    batches[0][0][2, 1] = batches[0][1][4] = NAN
    for rewards, greedy in batches:
        baseline.observe(rewards, greedy)
    assert 0.05 < baseline.alpha < 0.95
    assert abs(baseline.alpha - 0.5) > 0.01

    def square(alpha: float) -> float:
        total = 0.0
        for weight, (rewards, greedy) in zip((0.9, 1.0), batches, strict=True):
            mixed = (1 - alpha) * estimators.leave_one_out(rewards) + alpha * greedy.unsqueeze(-1)
            total += weight * ((rewards - mixed) ** 2).nansum().item()
        return total

    best = min((i / 1000 for i in range(1001)), key=square)
    assert baseline.alpha == pytest.approx(best, abs=6e-4)
    rewards, greedy = batches[1]
    expected = (1 - baseline.alpha) * estimators.leave_one_out(rewards) + baseline.alpha * greedy.unsqueeze(-1)
    torch.testing.assert_close(baseline(rewards, greedy), expected)


def test_alpha_stays_between_the_two_baselines_and_ignores_what_is_not_known() -> None:
    baseline = baselines.Mixed()
    for products, alpha in [(3.0, 1.0), (-1.0, 0.0), (0.5, 0.25)]:
        baseline.load_state_dict({"products": products, "squares": 2.0})
        assert baseline.alpha == alpha
    baseline.observe(torch.tensor([[4.0, NAN, 0.0], [1.0, NAN, NAN]]), torch.tensor([NAN, 2.0]))
    assert baseline.alpha == 0.25


def test_a_greedy_reward_holds_until_the_kth_visit() -> None:
    cache = baselines.GreedyRewards(3)
    seen = []
    for visit in range(8):
        due = cache.due(5)
        seen.append((due, cache.visit(5, float(visit) if due else None)))
    renewed = [True, False, False, True, False, False, True, False]
    assert seen == list(zip(renewed, [0.0, 0.0, 0.0, 3.0, 3.0, 3.0, 6.0, 6.0], strict=True))
    assert cache.due(6), "prompts are counted apart"


def test_a_failed_greedy_reward_is_drawn_again_or_leaves_the_former_one() -> None:
    cache = baselines.GreedyRewards(2)
    assert math.isnan(cache.visit(1, NAN))
    assert cache.due(1), "there is none to keep"
    assert cache.visit(1, 4.0) == 4.0
    assert cache.due(1), "the third visit"
    assert cache.visit(1, NAN) == 4.0
    every_time = baselines.GreedyRewards(1)
    assert [every_time.visit(1, 3.0), every_time.visit(1, 2.0)] == [3.0, 2.0]
    assert math.isnan(every_time.visit(1, NAN))
    assert every_time.due(1)
    with pytest.raises(AssertionError):
        every_time.visit(1, None)


# Proximal policy optimisation -----------------------------------------------------------------------------------------


def test_the_reward_of_a_token() -> None:
    rewards, log_ratios = randn(4, seed=1), randn(4, 5, seed=2)
    actual = estimators.token_rewards(rewards, log_ratios + GARBAGE, MASK, beta=0.3)
    expected = [
        [-0.3 * log_ratios[i, t].item() + (rewards[i].item() if t == length - 1 else 0) for t in range(length)]
        for i, length in enumerate(LENGTHS)
    ]
    assert_equal(actual, expected)


def literal_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> list[list[float]]:
    result = []
    for i, length in enumerate(LENGTHS):
        r, v = rewards[i].tolist(), [*values[i, :length].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        result.append([sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length)) for t in range(length)])
    return result


@pytest.mark.parametrize(("gamma", "lam"), [(0.83, 0.57), (1.0, 0.95), (0.9, 1.0), (0.7, 0.0), (1.0, 1.0)])
def test_generalised_advantages_against_a_double_loop(gamma: float, lam: float) -> None:
    rewards, values = randn(4, 5, seed=3), randn(4, 5, seed=4)
    actual = estimators.gae(rewards + GARBAGE, values + GARBAGE, MASK, gamma=gamma, lam=lam)
    assert_equal(actual, literal_gae(rewards, values, gamma, lam))
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            next_value = values[i, t + 1].item() if t + 1 < length else 0.0
            if lam == 0:
                delta = rewards[i, t].item() + gamma * next_value - values[i, t].item()
                assert actual[i, t].item() == pytest.approx(delta, abs=1e-12)
            if lam == 1:
                to_come = sum(gamma ** (s - t) * rewards[i, s].item() for s in range(t, length))
                assert actual[i, t].item() == pytest.approx(to_come - values[i, t].item(), abs=1e-12)


def test_whitening_is_over_all_tokens_of_the_mask() -> None:
    advantages = 3 * randn(4, 5, seed=5) + 2
    numbers = advantages[MASK].tolist()
    mean, variance = statistics.fmean(numbers), statistics.pvariance(numbers)
    actual = estimators.whiten(advantages + GARBAGE, MASK)
    expected = [
        [(advantages[i, t].item() - mean) / math.sqrt(variance + 1e-8) for t in range(n)] for i, n in enumerate(LENGTHS)
    ]
    assert_equal(actual, expected)
    assert estimators.whiten(torch.full((4, 5), 7.0), MASK).eq(0).all(), "equal advantages say nothing"


ADVANTAGES, RATIOS = (2.0, -3.0), (0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0)


def test_the_clipped_loss_and_its_gradient_token_by_token() -> None:
    """No gradient exactly where the ratio is past the bound that the advantage pushes it to."""
    pairs = [(a, r) for a in ADVANTAGES for r in RATIOS]
    advantages, ratios = torch.tensor(pairs, dtype=torch.float64).T.unsqueeze(-1)
    old = randn(len(pairs), 1, seed=6)
    logprobs = (old + ratios.log()).requires_grad_()
    losses = estimators.ppo_loss(logprobs, old, advantages, torch.ones(len(pairs), 1).bool(), cliprange=0.2)
    losses.sum().backward()
    for row, (advantage, ratio) in enumerate(pairs):
        clipped = min(max(ratio, 0.8), 1.2)
        assert losses[row].item() == pytest.approx(-min(ratio * advantage, clipped * advantage), abs=1e-12)
        past = ratio > 1.2 if advantage > 0 else ratio < 0.8
        assert logprobs.grad is not None
        assert logprobs.grad[row].item() == pytest.approx(0.0 if past else -ratio * advantage, abs=1e-12)


def test_on_policy_the_clipped_loss_has_the_gradient_of_the_policy_loss() -> None:
    logprobs = randn(4, 5, seed=7).requires_grad_()
    advantages = randn(4, 5, seed=8)
    clipped = estimators.ppo_loss(
        logprobs + GARBAGE, logprobs.detach() + GARBAGE, advantages + GARBAGE, MASK, cliprange=0.1
    )
    plain = estimators.policy_loss(logprobs, advantages, MASK)
    gradients = [torch.autograd.grad(loss.sum(), logprobs)[0] for loss in (clipped, plain)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert gradients[0][MASK].ne(0).all()
    assert clipped[~MASK].eq(0).all()


def test_the_value_loss_and_its_gradient_token_by_token() -> None:
    """The larger of two squares; no gradient where that is the one of the clipped value."""
    triples = [
        (value, old, target) for value in (-0.7, -0.1, 0.15, 0.6) for old in (0.0, 0.3) for target in (-1.0, 0.05, 1.0)
    ]
    values, old, targets = torch.tensor(triples, dtype=torch.float64).T.unsqueeze(-1)
    values.requires_grad_()
    losses = estimators.value_loss(values, old, targets, torch.ones(len(triples), 1).bool(), cliprange=0.2)
    losses.sum().backward()
    kinds = set()
    for row, (value, before, target) in enumerate(triples):
        clipped = min(max(value, before - 0.2), before + 0.2)
        squares = (value - target) ** 2, (clipped - target) ** 2
        assert losses[row].item() == pytest.approx(max(squares) / 2, abs=1e-12)
        stops = squares[1] > squares[0]
        assert values.grad is not None
        assert values.grad[row].item() == pytest.approx(0.0 if stops else value - target, abs=1e-12)
        kinds.add((value < before - 0.2, value > before + 0.2, stops))
    assert kinds == {(True, False, True), (True, False, False), (False, True, True), (False, True, False)} | {
        (False, False, False)
    }
    garbage = estimators.value_loss(GARBAGE, GARBAGE, GARBAGE, MASK, cliprange=0.2)
    assert garbage.eq(0).all()


def test_ppo_asks_for_no_greedy_completions() -> None:
    assert PPO.greedy_wanted(None, [None] * 3) == [False] * 3  # type: ignore[arg-type,list-item]

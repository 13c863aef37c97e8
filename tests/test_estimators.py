"""The estimators as pure functions: formulas as literal loops, and what the theory says of bias and variance."""

import itertools

import pytest
import torch
from torch import Tensor

from remax import estimators

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("mode", ["to_go", "one_step", "loss", "none"])
@pytest.mark.parametrize("gamma", [1.0, 0.99])
def test_returns_against_a_double_loop(mode: str, gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    log_ratios = torch.randn(MASK.shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(len(MASK), generator=generator, dtype=torch.float64)
    kl = estimators.kl_in_return(log_ratios, MASK, mode)
    returns = estimators.returns(advantages, kl, MASK, beta=0.3, gamma=gamma)
    for i, length in enumerate([4, 2, 1]):
        for t in range(4):
            expected = 0.0
            if t < length:
                terms = {"to_go": range(t, length), "one_step": [t], "loss": [], "none": []}[mode]
                expected = gamma ** (length - t) * advantages[i].item() - 0.3 * sum(
                    log_ratios[i, s].item() for s in terms
                )
            assert returns[i, t].item() == pytest.approx(expected, abs=1e-14)


def test_garbage_outside_the_mask_changes_nothing_and_gets_no_gradient() -> None:
    logprobs = torch.randn(MASK.shape, requires_grad=True)
    garbage = torch.where(MASK, torch.zeros(()), torch.full((), torch.nan))
    returns = estimators.returns(
        torch.ones(3), estimators.kl_in_return(logprobs.detach() + garbage, MASK), MASK, beta=0.1
    )
    loss = estimators.policy_loss(logprobs + garbage, returns, MASK).sum()
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad is not None
    assert logprobs.grad[~MASK].eq(0).all()
    assert logprobs.grad[MASK].ne(0).all()


def test_clip_modes() -> None:
    rewards, baselines = torch.tensor([3.0, -4.0, 0.5]), torch.tensor([0.5, 2.0, 0.25])
    assert estimators.advantages(rewards, baselines).tolist() == [2.5, -6.0, 0.25]
    assert estimators.advantages(rewards, baselines, 1.0, "raw").tolist() == [0.5, -2.0, 0.25]
    assert estimators.advantages(rewards, baselines, 1.0, "difference").tolist() == [1.0, -1.0, 0.25]


def test_shifting_all_rewards_of_a_prompt_changes_nothing_except_under_raw_clipping() -> None:
    rewards, baselines = torch.tensor([0.5, 1.0], dtype=torch.float64), torch.tensor([0.25, 2.0], dtype=torch.float64)
    shift = torch.tensor([8.0, -16.0], dtype=torch.float64)
    for clip, mode in [(None, "raw"), (0.5, "difference")]:
        before = estimators.advantages(rewards, baselines, clip, mode)
        assert torch.equal(before, estimators.advantages(rewards + shift, baselines + shift, clip, mode))
    before = estimators.advantages(rewards, baselines, 1.0, "raw")
    assert not torch.equal(before, estimators.advantages(rewards + shift, baselines + shift, 1.0, "raw"))
    # REINFORCE is the same with a baseline of 0, and moves.
    assert not torch.equal(rewards, rewards + shift)


def test_k2_has_the_gradient_of_the_kl_in_expectation() -> None:
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits, retain_graph=True)
    values = estimators.k2(logprobs.unsqueeze(0), ref.unsqueeze(0), torch.ones(1, 5, dtype=torch.bool))[0]
    (k2,) = torch.autograd.grad((logprobs.exp().detach() * values).sum(), logits)
    assert (k2 - exact).norm() / exact.norm() < 1e-12


def test_denominators() -> None:
    assert estimators.denominator("sequence", 3, 7) == 3
    assert estimators.denominator("token", 3, 7) == 7
    assert estimators.denominator("sequence", 0, 0) == 1


def bandit_variance(probability: float, rewards: tuple[float, float], *, greedy_baseline: bool) -> Tensor:
    """Trace of the covariance of the gradient estimate for a softmax policy over two arms, summed exactly."""
    logits = torch.tensor([torch.logit(torch.tensor(probability, dtype=torch.float64)), 0.0], dtype=torch.float64)
    logits.requires_grad_()
    probs = logits.softmax(0).detach()
    baseline = rewards[int(probs.argmax())] if greedy_baseline else 0.0
    estimates = []
    for arm in range(2):
        advantage = estimators.advantages(torch.tensor([rewards[arm]]), torch.tensor([baseline])).double()
        mask = torch.ones(1, 1, dtype=torch.bool)
        returns = estimators.returns(advantage, torch.zeros(1, 1, dtype=torch.float64), mask, beta=0.0)
        loss = estimators.policy_loss(logits.log_softmax(0)[arm].view(1, 1), returns, mask).sum()
        estimates.append(-torch.autograd.grad(loss, logits)[0])
    mean = probs[0] * estimates[0] + probs[1] * estimates[1]
    return sum(p * (e - mean).square().sum() for p, e in zip(probs, estimates, strict=True))


@pytest.mark.parametrize("rewards", [(2.0, 1.0), (1.0, 0.25), (3.0, 2.5)])
def test_bandit_variance_is_smaller_exactly_where_the_theory_says(rewards: tuple[float, float]) -> None:
    """For r1 > r2 > 0: ReMax below REINFORCE iff pi(a1) < 1/2 + r2 / (2 (r1 - r2)), equal at the bound."""
    r1, r2 = rewards
    bound = 0.5 + r2 / (2 * (r1 - r2))
    seen = set()
    for probability in itertools.chain((k / 40 for k in range(1, 40)), [bound]):
        if not 0 < probability < 1 or probability == 0.5:
            continue
        remax = bandit_variance(probability, rewards, greedy_baseline=True)
        reinforce = bandit_variance(probability, rewards, greedy_baseline=False)
        if abs(probability - bound) < 1e-9:
            assert remax == pytest.approx(reinforce.item(), rel=1e-9)
        else:
            assert (remax < reinforce) == (probability < bound)
            seen.add(probability < bound)
    assert True in seen
    assert (False in seen) == (bound < 1)

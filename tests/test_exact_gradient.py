"""ReMax's gradient against exact enumeration: every completion of a tiny policy, in float64, to 1e-12.

The oracles are in enumeration.py; the code under test is the real objective on the real scorer.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from enumeration import (
    BETA,
    CLIP,
    COMPLETIONS,
    EOS,
    MAX_LENGTH,
    PLAIN,
    POLICY,
    POLICY_SCORER,
    PROMPT,
    REFERENCE,
    REFERENCE_SCORER,
    REWARDS,
    assert_close,
    clipped,
    fixed_prefix_kl,
    gradient,
    greedy_completion,
    objective,
    sequence_logprob,
    step_logprobs,
)
from remax import estimators
from remax.batching import collate
from remax.config import ReMaxConfig
from remax.interfaces import Completion, Sampling
from remax.logprobs import untruncated
from remax.objective import policy_gradient_loss


def remax_gradient(rows: list[list[int]], denominator: int, sampling: Sampling, **settings: object) -> Tensor:
    """Minus the gradient of the code under test on a batch of these completions."""
    args = ReMaxConfig(**{"beta": BETA, **settings})
    completions = [Completion(PROMPT, 0, tokens, [], tokens[-1] != EOS) for tokens in rows]
    batch = collate(completions, 0, torch.device("cpu"))
    rewards = torch.tensor([REWARDS[tuple(tokens)] for tokens in rows], dtype=torch.float64)
    baselines = torch.full_like(rewards, REWARDS[tuple(greedy_completion())])
    advantages = estimators.advantages(rewards, baselines, args.reward_clip, args.reward_clip_mode)
    against: dict[str, Any] = {}
    if args.needs_exact_kl:
        against["reference"] = REFERENCE_SCORER
    elif args.needs_reference:
        against["ref_logprobs"] = REFERENCE_SCORER.logprobs(batch, untruncated(sampling))
    return -gradient(
        lambda: policy_gradient_loss(POLICY_SCORER, batch, advantages, sampling, args, denominator, **against).loss
    )


def expected_remax_gradient(sampling: Sampling, **settings: object) -> Tensor:
    """sum over all y of pi(y) times the estimate from y alone."""
    total = torch.zeros(())
    for tokens in COMPLETIONS:
        probability = sequence_logprob(POLICY, tokens, sampling).exp().item()
        if probability > 0:
            total = total + probability * remax_gradient([tokens], 1, sampling, **settings)
    return total


SAMPLINGS = {
    "plain": PLAIN,
    "temperature": Sampling(MAX_LENGTH, (EOS,), temperature=0.7),
    "top_k": Sampling(MAX_LENGTH, (EOS,), top_k=3),
    "top_p": Sampling(MAX_LENGTH, (EOS,), top_p=0.8),
    "all": Sampling(MAX_LENGTH, (EOS,), temperature=1.3, top_p=0.9, top_k=3),
}
each_sampling = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())


def test_the_enumeration_is_complete() -> None:
    assert len(COMPLETIONS) == 40
    for sampling in SAMPLINGS.values():
        total = sum(sequence_logprob(POLICY, tokens, sampling).exp().item() for tokens in COMPLETIONS)
        assert total == pytest.approx(1.0, abs=1e-12)


@each_sampling
def test_to_go_is_the_gradient_of_reward_minus_sequence_kl(sampling: Sampling) -> None:
    assert_close(expected_remax_gradient(sampling), gradient(lambda: objective(sampling, beta=BETA)))


@each_sampling
@pytest.mark.parametrize("estimator", ["one_step", "exact", "k2"])
def test_one_step_and_loss_are_the_gradient_with_fixed_prefixes(sampling: Sampling, estimator: str) -> None:
    mode = {"kl_mode": "one_step"} if estimator == "one_step" else {"kl_mode": "loss", "kl_estimator": estimator}
    oracle = gradient(lambda: objective(sampling, beta=0) - BETA * fixed_prefix_kl(sampling))
    assert_close(expected_remax_gradient(sampling, **mode), oracle)


def test_the_two_kl_gradients_differ() -> None:
    to_go = gradient(lambda: objective(PLAIN, beta=BETA))
    one_step = gradient(lambda: objective(PLAIN, beta=0) - BETA * fixed_prefix_kl(PLAIN))
    assert (to_go - one_step).norm() / to_go.norm() > 1e-3


def test_without_kl_it_is_the_gradient_of_the_reward() -> None:
    oracle = gradient(lambda: objective(PLAIN, beta=0))
    assert_close(expected_remax_gradient(PLAIN, kl_mode="none"), oracle)
    assert_close(expected_remax_gradient(PLAIN, beta=0.0), oracle)


@pytest.mark.parametrize("mode", ["raw", "difference"])
@pytest.mark.parametrize("kl", ["to_go", "one_step", "loss"])
def test_clipping_replaces_the_reward(mode: str, kl: str) -> None:
    actual = expected_remax_gradient(PLAIN, reward_clip=CLIP, reward_clip_mode=mode, kl_mode=kl)
    if kl == "to_go":
        oracle = gradient(lambda: objective(PLAIN, beta=BETA, clip=mode))
    else:
        oracle = gradient(lambda: objective(PLAIN, beta=0, clip=mode) - BETA * fixed_prefix_kl(PLAIN))
    assert_close(actual, oracle)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("kl", ["to_go", "one_step", "none"])
@pytest.mark.parametrize("clip", [None, "raw", "difference"])
def test_a_batch_follows_the_literal_formula(aggregation: str, gamma: float, kl: str, clip: str | None) -> None:
    """token and gamma < 1 have no simple objective: their oracle is the formula, written as a double loop."""
    rows = [COMPLETIONS[i] for i in (0, 2, 9, 25, 39)]
    lengths = [len(tokens) for tokens in rows]
    assert sorted(set(lengths)) == [1, 2, 3]
    baseline = REWARDS[tuple(greedy_completion())]

    def literal() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for tokens in rows:
            pi = [step[y] for step, y in zip(step_logprobs(POLICY, tokens), tokens, strict=True)]
            ref = [step[y] for step, y in zip(step_logprobs(REFERENCE, tokens), tokens, strict=True)]
            ratios = [(p - q).item() for p, q in zip(pi, ref, strict=True)]
            difference = clipped(REWARDS[tuple(tokens)], clip)
            if clip != "difference":
                difference -= clipped(baseline, clip)
            num_tokens = len(tokens)
            for t in range(num_tokens):
                kl_term = {"to_go": sum(ratios[t:]), "one_step": ratios[t], "none": 0.0}[kl]
                total = total + pi[t] * (gamma ** (num_tokens - t) * difference - BETA * kl_term)
        return total / (len(rows) if aggregation == "sequence" else sum(lengths))

    denominator = estimators.denominator(aggregation, len(rows), sum(lengths))
    settings = {"gamma": gamma, "kl_mode": kl, "loss_aggregation": aggregation}
    if clip:
        settings |= {"reward_clip": CLIP, "reward_clip_mode": clip}
    assert_close(remax_gradient(rows, denominator, PLAIN, **settings), gradient(literal))

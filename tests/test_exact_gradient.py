"""ReMax's gradient against exact enumeration: every completion of a tiny policy, in float64, to 1e-12.

The oracles below are written from the formulas, on the logits of a plain forward pass of one unpadded sequence at a
time; the code under test is the real objective on the real scorer.
"""

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from remax import estimators
from remax.batching import collate
from remax.config import ReMaxConfig
from remax.interfaces import Completion, Prompt, Sampling
from remax.logprobs import CompletionScorer
from remax.objective import policy_gradient_loss

VOCAB, EOS, MAX_LENGTH = 4, 3, 3
PROMPT = Prompt(0, "x", [0, 1])
BETA, CLIP = 0.7, 0.5
PLAIN = Sampling(MAX_LENGTH, (EOS,))


def tiny_gpt2(seed: int) -> GPT2LMHeadModel:
    """A transformer that is float64 throughout; Llama's norms and rotary embedding fall back to float32."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=8, n_embd=8, n_layer=1, n_head=2, initializer_range=0.5, eos_token_id=EOS
    )
    return GPT2LMHeadModel(config).double().eval()


POLICY, REFERENCE = tiny_gpt2(1), tiny_gpt2(2)
POLICY_SCORER, REFERENCE_SCORER = CompletionScorer(POLICY), CompletionScorer(REFERENCE)
COMPLETIONS = [
    list(tokens)
    for length in range(1, MAX_LENGTH + 1)
    for tokens in itertools.product(range(VOCAB), repeat=length)
    if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == MAX_LENGTH)
]
REWARDS = dict(
    zip(map(tuple, COMPLETIONS), torch.randn(len(COMPLETIONS), generator=torch.manual_seed(3)).tolist(), strict=True)
)


def step_logprobs(model: GPT2LMHeadModel, tokens: list[int], sampling: Sampling = PLAIN) -> list[Tensor]:
    """[V] log-probabilities before each token of a completion, by hand; top_k by sorting, top_p by adding up."""
    logits = model(torch.tensor([PROMPT.token_ids + tokens])).logits[0, 1:-1] / sampling.temperature
    if not sampling.truncates:
        return list(logits.log_softmax(-1))
    result = []
    for row in logits:
        order = sorted(range(VOCAB), key=lambda token: -row[token].item())
        if sampling.top_k:
            order = order[: sampling.top_k]
        kept, mass = [], 0.0
        probs = torch.stack([row[token] for token in order]).softmax(0).tolist()
        for token, prob in zip(order, probs, strict=True):
            if mass < sampling.top_p:
                kept.append(token)
            mass += prob
        allowed = torch.tensor([token in kept for token in range(VOCAB)])
        result.append(row.masked_fill(~allowed, -torch.inf).log_softmax(0))
    return result


def sequence_logprob(model: GPT2LMHeadModel, tokens: list[int], sampling: Sampling = PLAIN) -> Tensor:
    steps = step_logprobs(model, tokens, sampling)
    return torch.stack([step[token] for step, token in zip(steps, tokens, strict=True)]).sum()


@functools.cache
def greedy_completion() -> list[int]:
    tokens: list[int] = []
    while len(tokens) < MAX_LENGTH and tokens[-1:] != [EOS]:
        logits = POLICY(torch.tensor([PROMPT.token_ids + tokens])).logits[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens


def gradient(objective: Callable[[], Tensor]) -> Tensor:
    POLICY.zero_grad()
    objective().backward()
    return torch.cat([p.grad.flatten() for p in POLICY.parameters()])


def remax_gradient(rows: list[list[int]], denominator: int, sampling: Sampling, **settings: object) -> Tensor:
    """Minus the gradient of the code under test on a batch of these completions."""
    args = ReMaxConfig(**{"beta": BETA, **settings})
    completions = [Completion(PROMPT, 0, tokens, [], tokens[-1] != EOS) for tokens in rows]
    batch = collate(completions, 0, torch.device("cpu"))
    rewards = torch.tensor([REWARDS[tuple(tokens)] for tokens in rows], dtype=torch.float64)
    baselines = torch.full_like(rewards, REWARDS[tuple(greedy_completion())])
    advantages = estimators.advantages(rewards, baselines, args.reward_clip, args.reward_clip_mode)
    reference = REFERENCE_SCORER if args.needs_reference else None
    return -gradient(
        lambda: policy_gradient_loss(POLICY_SCORER, reference, batch, advantages, sampling, args, denominator).loss
    )


def expected_remax_gradient(sampling: Sampling, **settings: object) -> Tensor:
    """sum over all y of pi(y) times the estimate from y alone."""
    total = torch.zeros(())
    for tokens in COMPLETIONS:
        probability = sequence_logprob(POLICY, tokens, sampling).exp().item()
        if probability > 0:
            total = total + probability * remax_gradient([tokens], 1, sampling, **settings)
    return total


def clipped(reward: float, mode: str | None) -> float:
    if mode == "raw":
        return max(-CLIP, min(CLIP, reward))
    if mode == "difference":
        return max(-CLIP, min(CLIP, reward - REWARDS[tuple(greedy_completion())]))
    return reward


def objective(sampling: Sampling, *, beta: float, clip: str | None = None) -> Tensor:
    """E[r - beta KL(sequence)], summed over all completions."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens in COMPLETIONS:
        logprob = sequence_logprob(POLICY, tokens, sampling)
        if logprob.isinf():
            continue
        ref = sequence_logprob(REFERENCE, tokens, Sampling(MAX_LENGTH, (EOS,), temperature=sampling.temperature))
        total = total + logprob.exp() * (clipped(REWARDS[tuple(tokens)], clip) - beta * (logprob - ref.detach()))
    return total


def fixed_prefix_kl(sampling: Sampling) -> Tensor:
    """E[sum_t KL_t] with the prefixes held fixed: only the KLs carry gradient, not their prefixes' probabilities."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens in COMPLETIONS:
        weight = sequence_logprob(POLICY, tokens, sampling).exp().detach()
        reference = Sampling(MAX_LENGTH, (EOS,), temperature=sampling.temperature)
        pairs = zip(step_logprobs(POLICY, tokens, sampling), step_logprobs(REFERENCE, tokens, reference), strict=True)
        for pi, ref in pairs:
            support = ~pi.isinf()
            total = total + weight * (pi[support].exp() * (pi - ref.detach())[support]).sum()
    return total


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 1e-3, "an oracle of zero would prove nothing"
    assert (actual - expected).norm() / expected.norm() < 1e-12


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

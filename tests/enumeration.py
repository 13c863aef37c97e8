"""Everything that a tiny policy can write: exact expectations by enumeration, in float64.

The oracles are written from the formulas, on the logits of a plain forward pass of one unpadded sequence at a time.
"""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from remax.interfaces import Prompt, Sampling
from remax.logprobs import CompletionScorer

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

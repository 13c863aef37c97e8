"""How good a policy is on held-out prompts: rewards sampled and greedy, KL, lengths and perplexity, with intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from remax.assembly import Components, Rewards
from remax.batching import collate, split_by_tokens
from remax.interfaces import Completion, Prompt, Rollout, Sampling
from remax.logprobs import CompletionScorer, untruncated

Floats = NDArray[np.float64]

EVALUATION_STEP = -1
"""Keys the sampling noise of evaluations: the same every time, and never that of a training step."""


@dataclass(frozen=True)
class Evaluation:
    """Measurements of one policy, one value per prompt; several samples of a prompt are averaged."""

    rollout: Rollout
    rewards: Rewards
    values: Mapping[str, Floats]
    """By metric name, [prompts]; NaN where a reward is missing."""

    def means(self) -> dict[str, float]:
        """Returns the mean of every measurement over the prompts that have it."""
        return {name: float(values.mean()) for name, values in self._measured()}

    def intervals(self, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Returns 95% bootstrap intervals of those means."""
        return {name: bootstrap_interval(values, seed=seed) for name, values in self._measured()}

    def _measured(self) -> list[tuple[str, Floats]]:
        present = {name: values[~np.isnan(values)] for name, values in self.values.items()}
        return [(name, values) for name, values in present.items() if len(values)]


def evaluate_policy(
    parts: Components, prompts: Sequence[Prompt], *, num_samples: int, seed: int, max_tokens: int
) -> Evaluation:
    """Returns how the policy does on these prompts, sampled and greedy.

    The KL is the mean log-ratio of the samples to the reference, in nats per sequence; the policy's side of it are the
    log-probabilities of the rollout.
    """
    rollout = parts.roll_out(prompts, num_samples=num_samples, seed=seed, step=EVALUATION_STEP)
    rewards = parts.score(rollout)

    def per_prompt(values: Any) -> Floats:
        means: Floats = np.asarray(values, dtype=np.float64).reshape(len(prompts), -1).mean(axis=1)
        return means

    values = {"reward": per_prompt(rewards.sampled), "reward/greedy": per_prompt(rewards.greedy)}
    for name, own in rewards.sampled_by_function.items():
        values[f"rewards/{name}/mean"] = per_prompt(own)
    if parts.reference is not None:
        reference = total_logprobs(parts, parts.reference, rollout.samples, untruncated(parts.sampling), max_tokens)
        values["kl"] = per_prompt([sum(c.logprobs) for c in rollout.samples]) - per_prompt(reference)
    values["completions/mean_length"] = per_prompt([len(c.token_ids) for c in rollout.samples])
    values["completions/greedy_mean_length"] = per_prompt([len(c.token_ids) for c in rollout.greedy])
    values["completions/clipped_ratio"] = per_prompt([c.truncated for c in rollout.samples])
    return Evaluation(rollout, rewards, values)


@torch.no_grad()
def total_logprobs(
    parts: Components,
    scorer: CompletionScorer,
    completions: Sequence[Completion],
    sampling: Sampling,
    max_tokens: int,
) -> list[float]:
    """Returns the summed log-probability of each completion under a model, in nats."""
    totals = [0.0] * len(completions)
    lengths = [len(c.prompt.token_ids) + len(c.token_ids) for c in completions]
    for rows in split_by_tokens(lengths, max_tokens):
        batch = collate([completions[row] for row in rows], parts.tokenizer.pad_token_id, parts.accelerator.device)
        with parts.accelerator.autocast():
            sums = scorer(batch, sampling).logprobs.sum(-1).tolist()
        for row, value in zip(rows, sums, strict=True):
            totals[row] = value
    return totals


def perplexity(totals: Sequence[float], lengths: Sequence[int]) -> tuple[float, tuple[float, float]]:
    """Returns exp(-sum of log-probabilities / number of tokens) over all texts, with its 95% bootstrap interval."""
    pairs = np.stack([np.asarray(totals, dtype=np.float64), np.asarray(lengths, dtype=np.float64)], axis=1)

    def statistic(sample: Floats) -> float:
        log_likelihood, num_tokens = sample.sum(axis=0)
        return float(np.exp(-log_likelihood / num_tokens))

    return statistic(pairs), bootstrap_interval(pairs, statistic)


def bootstrap_interval(
    values: Floats, statistic: Callable[[Floats], Any] = np.mean, *, seed: int = 0, num_resamples: int = 2000
) -> tuple[float, float]:
    """Returns the 95% percentile bootstrap interval of a statistic (by default the mean) over the first axis."""
    generator = np.random.default_rng(seed)
    resampled = [statistic(values[generator.integers(len(values), size=len(values))]) for _ in range(num_resamples)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)

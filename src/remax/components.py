"""The models and functions that a run works with, and the two things the loop asks of them: completions and rewards."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from remax import data, precision
from remax.batching import collate, split_by_tokens
from remax.config import ReMaxConfig
from remax.errors import UserError
from remax.interfaces import Completion, Prompt, RewardFunction, Rollout, RolloutEngine, Sampling
from remax.logprobs import CompletionScorer, untruncated
from remax.placement import Placed
from remax.rewards import CallableReward, RewardModel, score


class Rewards(NamedTuple):
    """The rewards of a rollout of S sampled and G greedy rows, NaN where a reward is missing."""

    sampled: Tensor
    """[S] r(x, y)"""
    greedy: Tensor
    """[G] r(x, y*)"""
    sampled_by_function: dict[str, Tensor]
    """Each function's own r(x, y), unweighted, [S]."""
    metrics: dict[str, float]
    """What reward functions logged with log_metric."""
    columns: dict[str, list[Any]]
    """What they logged with log_extra, one value per sampled row."""


@dataclass
class Components:
    """A policy, what it is compared with, and what draws and scores its completions."""

    accelerator: Accelerator
    policy: Any
    reference: CompletionScorer | None
    """None when no KL is needed."""
    reference_placed: Placed | None
    """Where a reference with weights of its own rests."""
    tokenizer: Any
    engine: RolloutEngine
    reward_functions: list[RewardFunction]
    reward_weights: list[float]
    sampling: Sampling
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    model_name: str

    def hold_frozen_in_bfloat16(self) -> None:
        """Halves what frozen weights take; for a run under bfloat16 autocast, which uses them in bfloat16 anyway.

        Left as they are: a reference that is the policy with its adapter off, and reward models that were passed in
        loaded, which their owner may use elsewhere.
        """
        if self.reference is not None and self.reference.model is not self.policy:
            precision.hold_in_bfloat16(self.reference.model)
        for function in self.reward_functions:
            if isinstance(function, RewardModel) and function.own:
                precision.hold_in_bfloat16(function.model)
                function.bf16 = True

    def roll_out(
        self, prompts: Sequence[Prompt], *, num_samples: int, greedy: bool | Sequence[bool], seed: int, step: int
    ) -> Rollout:
        """Returns samples y ~ pi(.|x) and, where asked for, greedy completions y*, with their texts."""
        with self.accelerator.autocast():
            rollout = self.engine.generate(
                prompts, self.sampling, num_samples=num_samples, greedy=greedy, seed=seed, step=step
            )
        data.decode_completions(self.tokenizer, _rows(rollout))
        return rollout

    def score(self, rollout: Rollout) -> Rewards:
        """Returns the rewards of all samples and greedy completions, from one call of every reward function."""
        rows = _rows(rollout)
        scores = score(self.reward_functions, self.reward_weights, rows)
        columns = {name: values for f in self._callables() for name, values in f.pop_extra().items()}
        for name, values in columns.items():
            if len(values) != len(rows):
                raise UserError(
                    f"log_extra of column {name} got {len(values)} values: there are {len(rows)} completions, so they "
                    "cannot be told apart; log one value per completion."
                )
        num_samples = len(rollout.samples)
        total = torch.tensor(scores.total)
        return Rewards(
            total[:num_samples],
            total[num_samples:],
            {name: torch.tensor(values[:num_samples]) for name, values in scores.by_function.items()},
            {name: value for f in self._callables() for name, value in f.pop_metrics().items()},
            {name: values[:num_samples] for name, values in columns.items()},
        )

    def begin_reference(self, rollout: Rollout, args: ReMaxConfig) -> Callable[[], list[Tensor] | None]:
        """Returns a function that returns the samples' log-probabilities under the reference; None if no update needs
        them.

        Work on them may have begun. Greedy completions are never scored.

        Reward functions leave a GPU idle: there the reference runs beside them, in a thread of its own, since theirs
        may have to be the main one (signals).
        """
        if self.reference is None or args.needs_exact_kl:
            return lambda: None
        work = functools.partial(self.reference_logprobs, rollout.samples, args.micro_batch_tokens)
        if not self.overlaps:
            return work
        pool = ThreadPoolExecutor(max_workers=1)
        future = pool.submit(work)
        pool.shutdown(wait=False)
        return future.result

    @property
    def overlaps(self) -> bool:
        """Whether the reference runs while reward functions do; a reward model would only share the GPU with it."""
        return self.accelerator.device.type == "cuda" and len(self._callables()) == len(self.reward_functions)

    def reference_logprobs(self, completions: Sequence[Completion], max_tokens: int) -> list[Tensor]:
        """Returns the log-probabilities of every completion's tokens under the reference, [T] each, on the device.

        It takes the temperature, but is not truncated: no log-ratio is infinite.
        """
        assert self.reference is not None
        with self.reference_placed.on_device() if self.reference_placed else nullcontext():
            return self.token_logprobs(self.reference, completions, untruncated(self.sampling), max_tokens)

    @torch.no_grad()
    def token_logprobs(
        self, scorer: CompletionScorer, completions: Sequence[Completion], sampling: Sampling, max_tokens: int
    ) -> list[Tensor]:
        """Returns the log-probabilities of every completion's tokens under a model, [T] each, on the device.

        max_tokens: of a pass, padding included.
        """
        logprobs: list[Tensor] = [torch.empty(0)] * len(completions)
        lengths = [len(c.prompt.token_ids) + len(c.token_ids) for c in completions]
        for rows in split_by_tokens(lengths, max_tokens):
            batch = collate([completions[row] for row in rows], self.tokenizer.pad_token_id, self.accelerator.device)
            with self.accelerator.autocast():
                padded = scorer.logprobs(batch, sampling)
            for row, values in zip(rows, padded, strict=True):
                logprobs[row] = values[: len(completions[row].token_ids)]
        return logprobs

    def show_state(self, state: Any) -> None:
        """Lets reward functions see the trainer's state, as their argument trainer_state."""
        for function in self._callables():
            function.trainer_state = state

    def _callables(self) -> list[CallableReward]:
        return [function for function in self.reward_functions if isinstance(function, CallableReward)]


def _rows(rollout: Rollout) -> list[Completion]:
    return [*rollout.samples, *rollout.greedy]

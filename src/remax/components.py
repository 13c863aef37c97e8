"""The models and functions that a run works with, and the two things the loop asks of them: completions and rewards."""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from remax import data, precision
from remax.batching import collate, split_by_tokens
from remax.config import ReMaxConfig
from remax.errors import GuardStop
from remax.guards.memory import MemoryGuard
from remax.interfaces import Completion, EngineWithWeights, Prompt, RewardFunction, Rollout, RolloutEngine, Sampling
from remax.logprobs import CompletionScorer, untruncated
from remax.placement import Placed
from remax.processes import ALONE, Processes
from remax.rewards import ProgrammedReward, RewardModel
from remax.saving import merged_weights
from remax.sharding import release, shard_frozen, shards_weights
from remax.sharing import roll_out_together, score_together


class Rewards(NamedTuple):
    """The rewards of a rollout of S sampled and G greedy rows, NaN where a reward is missing."""

    sampled: Tensor
    """[S] r(x, y)"""
    greedy: Tensor
    """[G] r(x, y*)"""
    sampled_by_function: dict[str, Tensor]
    """Each function's own r(x, y), unweighted, [S]."""
    metrics: dict[str, float]
    """What reward functions logged with log_metric, and rewards/{name}/missing_fraction: the completions, greedy ones
    included, for which a function failed."""
    columns: dict[str, list[Any]]
    """What they logged with log_extra, one value per sampled row."""
    failures: Sequence[str] = ()
    """Of every function that failed, why."""


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
    rollout_batch_size: int = 0
    """Most rows that the engine decodes at once, as set; 0 for all."""
    gold_functions: list[RewardFunction] = field(default_factory=list)
    """Rewards that judge evaluations and that training never sees."""
    processes: Processes = ALONE
    """Those that work on the same steps."""
    policy_version: int = 0
    """How often the policy was updated."""
    memory: MemoryGuard = field(default_factory=MemoryGuard)
    """Does the work of all that follows again in smaller pieces where memory does not suffice."""

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

    def shard_frozen(self, policy: CompletionScorer) -> None:
        """Leaves each process with a part of the frozen models, if the launcher's settings say so and they rest on it.

        policy: the scorer that is trained.
        """
        if not shards_weights(self.accelerator):
            return
        if self.reference is not None and self.reference.model is self.policy:
            self.reference.through = policy.__call__
        elif self.reference is not None and self.reference_placed and self.reference_placed.placement == "resident":
            shard_frozen(self.reference, self.accelerator, casts=True)  # Else the first KL would not be 0.
            self.reference.through = self.reference.__call__
        for function in self.reward_functions:
            if isinstance(function, RewardModel) and function.own and function.placed.placement == "resident":
                # A classifier's head computes in float32, and would get bfloat16.
                shard_frozen(function.model, self.accelerator, casts=False)
                function.num_passes = self.processes.most

    def roll_out(
        self, prompts: Sequence[Prompt], *, num_samples: int, greedy: bool | Sequence[bool], seed: int, step: int
    ) -> Rollout:
        """Returns samples y ~ pi(.|x) and, where asked for, greedy completions y*, with their texts."""
        # The engine keeps the rows of a prompt together, and by itself to --rollout_batch_size.
        rows_of_prompt = num_samples + (greedy if isinstance(greedy, bool) else any(greedy))
        wanted = [greedy] * len(prompts) if isinstance(greedy, bool) else greedy
        own = self.processes.part(range(len(prompts)))
        whole = len(own) * rows_of_prompt
        as_set = min(self.rollout_batch_size or whole, whole)

        def draw(max_rows: int) -> Rollout:
            size = max(1, len(own) if max_rows == as_set else max_rows // rows_of_prompt)
            drawn = []
            for start in range(0, len(own), size):
                chunk = own[start : start + size]
                with self.accelerator.autocast():
                    drawn.append(
                        self.engine.generate(
                            [prompts[i] for i in chunk],
                            self.sampling,
                            num_samples=num_samples,
                            greedy=[wanted[i] for i in chunk],
                            seed=seed,
                            step=step,
                        )
                    )
            return Rollout([c for part in drawn for c in part.samples], [c for part in drawn for c in part.greedy])

        def own_part() -> Rollout:
            return self.memory.run("rollout_batch_size", as_set, draw, whole=whole, smallest=rows_of_prompt)

        with self._engine_with_weights():
            rollout = roll_out_together(self.processes, prompts, own_part)
        data.decode_completions(self.tokenizer, _rows(rollout))
        return rollout

    @contextmanager
    def _engine_with_weights(self) -> Iterator[None]:
        """Gives an engine that has weights of its own those of the policy."""
        if not isinstance(self.engine, EngineWithWeights):
            yield
            return
        policy = self.policy.get_base_model() if isinstance(self.policy, PeftModel) else self.policy
        with torch.no_grad():
            self.engine.take(merged_weights(policy), self.policy_version)
        try:
            yield
        finally:
            self.engine.release()

    def score(self, rollout: Rollout) -> Rewards:
        """Returns the rewards of all samples and greedy completions.

        Every reward function is called once, in each process with the completions of some of the prompts.
        """
        rows = _rows(rollout)
        functions = list(map(self._within_memory, self.reward_functions))
        scored = score_together(self.processes, functions, self.reward_weights, rows)
        num_samples = len(rollout.samples)
        total = torch.tensor(scored.scores.total)
        metrics = dict(scored.metrics)
        for name, number in scored.scores.num_failed.items():
            metrics[f"rewards/{name}/missing_fraction"] = number / len(rows)
        return Rewards(
            total[:num_samples],
            total[num_samples:],
            {name: torch.tensor(values[:num_samples]) for name, values in scored.scores.by_function.items()},
            metrics,
            {name: values[:num_samples] for name, values in scored.columns.items()},
            scored.failures,
        )

    def judge(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Returns the gold rewards of samples, [S], and greedy completions, [G]: added up, NaN where missing."""
        functions = list(map(self._within_memory, self.gold_functions))
        scored = score_together(self.processes, functions, [1.0] * len(functions), _rows(rollout))
        total = torch.tensor(scored.scores.total)
        return total[: len(rollout.samples)], total[len(rollout.samples) :]

    def _within_memory(self, function: RewardFunction) -> RewardFunction:
        return _WithinMemory(function, self.memory) if isinstance(function, RewardModel) else function

    def require_rewards(self, rewards: Rewards, max_missing: float, *, first: bool) -> None:
        """Stops a step of which too much has no reward; before anything was learned from it, so that it can be redone.

        first: of the run; that nothing at all has a reward is then a mistake of the user's, which the trainer tells.

        Raises:
            GuardStop: more than the fraction max_missing of the completions, greedy ones included, has no reward.
        """
        missing = torch.cat([rewards.sampled, rewards.greedy]).isnan()
        if missing.float().mean() <= max_missing or (first and missing.all()):
            return
        reasons = "; ".join(rewards.failures) or "the rewards gave no number"
        raise GuardStop(
            f"{int(missing.sum())} of the step's {len(missing)} completions have no reward, more than "
            f"--max_missing_rewards {max_missing:g} allows ({reasons}); see "
            "to that and go on (with --allow_config_change if you correct a reward's file), or allow more.",
            known_to_all=True,  # All have all rewards.
        )

    def begin_reference(self, rollout: Rollout, args: ReMaxConfig) -> "Begun":
        """Returns a function that returns the samples' log-probabilities under the reference; None if no update needs
        them.

        Work on them may have begun. Greedy completions are never scored.

        Reward functions leave a GPU idle: there the reference runs beside them, in a thread of its own, since theirs
        may have to be the main one (signals). As a context, it waits for that thread before an exception leaves.
        """
        if self.reference is None or args.needs_exact_kl:
            return Begun(lambda: None)
        work = functools.partial(self.reference_logprobs, rollout.samples, args.micro_batch_tokens)
        if not self.overlaps:
            return Begun(work)
        pool = ThreadPoolExecutor(max_workers=1)
        future = pool.submit(work)
        pool.shutdown(wait=False)
        return Begun(future.result, future)

    @property
    def overlaps(self) -> bool:
        """Whether the reference runs while reward functions do; a reward model would only share the GPU with it."""
        # A thread of its own would not keep the order of what processes exchange.
        if self.accelerator.device.type != "cuda" or self.processes.num > 1:
            return False
        return len(self._programmed()) == len(self.reward_functions)

    def reference_logprobs(self, completions: Sequence[Completion], max_tokens: int) -> list[Tensor]:
        """Returns the log-probabilities of every completion's tokens under the reference, [T] each, on the device.

        It takes the temperature, but is not truncated: no log-ratio is infinite.
        """
        assert self.reference is not None
        with self.reference_placed.on_device() if self.reference_placed else nullcontext():
            logprobs = self.token_logprobs(self.reference, completions, untruncated(self.sampling), max_tokens)
        release(self.reference)
        return logprobs

    @torch.no_grad()
    def token_logprobs(
        self, scorer: CompletionScorer, completions: Sequence[Completion], sampling: Sampling, max_tokens: int
    ) -> list[Tensor]:
        """Returns the log-probabilities of every completion's tokens under a model, [T] each, on the device.

        max_tokens: of a pass, padding included.
        """
        lengths = [len(c.prompt.token_ids) + len(c.token_ids) for c in completions]

        def score_in_passes(size: int) -> dict[int, Tensor]:
            logprobs: dict[int, Tensor] = {}
            for rows, counts in self.processes.dealt(split_by_tokens(lengths, size, self.processes.num)):
                batch = collate(
                    [completions[row] for row in rows], self.tokenizer.pad_token_id, self.accelerator.device
                )
                with self.accelerator.autocast():
                    padded = scorer.logprobs(batch, sampling)
                if counts:
                    own = zip(rows, padded, strict=True)
                    logprobs |= {row: values[: len(completions[row].token_ids)] for row, values in own}
            return logprobs

        longest = max(lengths, default=0)
        own = self.memory.run(
            "micro_batch_tokens", max_tokens, score_in_passes, whole=longest * len(lengths), smallest=longest
        )
        known = self.processes.gather_tensors(own, self.accelerator.device)
        return [known[row] for row in range(len(completions))]

    def show_state(self, state: Any) -> None:
        """Lets reward functions see the trainer's state, as their argument trainer_state."""
        for function in self._programmed():
            function.trainer_state = state

    def _programmed(self) -> list[ProgrammedReward]:
        return [function for function in self.reward_functions if isinstance(function, ProgrammedReward)]


def _rows(rollout: Rollout) -> list[Completion]:
    return [*rollout.samples, *rollout.greedy]


class Begun:
    """The reference's log-probabilities, None where none are needed; calling it returns them."""

    def __init__(
        self, result: Callable[[], list[Tensor] | None], running: "Future[list[Tensor]] | None" = None
    ) -> None:
        self._result, self._running = result, running

    def __call__(self) -> list[Tensor] | None:
        return self._result()

    def __enter__(self) -> "Begun":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # The thread may run the policy with its adapter off; nobody may save the weights meanwhile.
        if kind is not None and self._running is not None:
            wait([self._running])


class _WithinMemory:
    """A reward model whose batches are halved where memory does not suffice."""

    def __init__(self, function: RewardModel, memory: MemoryGuard) -> None:
        self.function, self.memory, self.name = function, memory, function.name

    def __call__(self, completions: Sequence[Completion]) -> list[float | None]:
        def scored(batch_size: int) -> list[float | None]:
            self.function.batch_size = batch_size
            return self.function(completions)

        return self.memory.run(
            "reward_batch_size", self.function.batch_size, scored, whole=len(completions), smallest=1
        )

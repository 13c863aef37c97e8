"""ReMax, REINFORCE, RLOO and GRPO: one update per batch, strictly on-policy; they differ in the baseline."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from remax import estimators
from remax.batching import collate, split_by_tokens
from remax.components import Components, Rewards
from remax.config import ReMaxConfig
from remax.guards.finite import NotFinite, Skipped
from remax.interfaces import Prompt, Rollout
from remax.learner import Learner
from remax.methods.agreement import agreement
from remax.methods.baselines import MAKE_BASELINE, GreedyRewards, Mixed
from remax.methods.within_memory import OnSkip, ignore, max_tokens, within_memory
from remax.metrics import Credit, StepRecord
from remax.objective import BatchLoss, policy_gradient_loss
from remax.zero import stage_of


class CriticFree:
    """REINFORCE with a baseline (Li et al., arXiv 2310.10505, Algorithm 1), r(x, y*) being one of several."""

    def __init__(self, parts: Components, args: ReMaxConfig, policy: Learner) -> None:
        """policy trains the CompletionScorer of parts.policy."""
        self.parts, self.args, self.policy = parts, args, policy
        self.on_skip: OnSkip = ignore
        self.baseline = MAKE_BASELINE[str(args.baseline)]()
        self.greedy_rewards = GreedyRewards(args.greedy_every) if args.needs_greedy else None
        self.agreement = agreement(parts, args)
        self.metrics: dict[str, float] = {}
        """Of the last credit."""

    def greedy_wanted(self, prompts: Sequence[Prompt]) -> list[bool]:
        """Returns for which prompts this step needs a greedy completion."""
        return [self.greedy_rewards is not None and self.greedy_rewards.due(prompt.index) for prompt in prompts]

    def credit(self, rollout: Rollout, rewards: Rewards) -> Credit:
        """Returns the advantage of every sample over its baseline."""
        args, prompts = self.args, rollout.samples[:: self.args.num_generations]
        drawn = {c.prompt.index: reward for c, reward in zip(rollout.greedy, rewards.greedy.tolist(), strict=True)}
        greedy = torch.full((len(prompts),), torch.nan)
        if self.greedy_rewards is not None:
            visits = [self.greedy_rewards.visit(c.prompt.index, drawn.get(c.prompt.index)) for c in prompts]
            greedy = torch.tensor(visits)
        sampled = rewards.sampled.view(len(prompts), args.num_generations)
        advantages = self._advantages(sampled, greedy)
        return Credit(advantages.flatten(), greedy.repeat_interleave(args.num_generations))

    def _advantages(self, sampled: Tensor, greedy: Tensor) -> Tensor:
        """Returns advantages [P, k] from rewards [P, k] and greedy rewards [P]."""
        args = self.args
        if args.reward_clip is not None and args.reward_clip_mode == "raw":
            sampled, greedy = (r.clamp(-args.reward_clip, args.reward_clip) for r in (sampled, greedy))
        baselines = self.baseline(sampled, greedy)
        if isinstance(self.baseline, Mixed):
            self.metrics["baseline/alpha"] = self.baseline.alpha
        self.baseline.observe(sampled, greedy)
        advantages = estimators.advantages(sampled, baselines, args.reward_clip, args.reward_clip_mode)
        return advantages / estimators.group_std(sampled) if args.method == "grpo" else advantages

    def update(self, record: StepRecord) -> None:
        """Takes one gradient step on the samples that have an advantage, and completes the record."""
        record.metrics |= self.metrics
        rows = record.trained.nonzero().flatten().tolist()
        if not rows:
            return

        def losses() -> Iterator[Tensor]:
            yield from self.losses(record, rows)
            if self.agreement is not None:
                record.metrics |= self.agreement.check()
            if not math.isfinite(self.parts.processes.sum(record.loss)):  # Rows without a gradient have a loss too.
                raise NotFinite("loss")

        def take() -> float:
            num_losses = sum(has_gradient for _, has_gradient, _ in self.micro_batches(record, rows))
            return self.policy.update(losses(), num_losses)

        fault = None
        try:
            record.grad_norm = within_memory(self.parts, self.args, record, rows, take)
        except NotFinite as error:
            record.grad_norm, fault = math.nan, error
        record.share(self.parts.processes)
        if fault is not None:
            self.on_skip(record, Skipped("policy", fault.what, rows))

    def losses(self, record: StepRecord, rows: Sequence[int]) -> Iterator[Tensor]:
        """Yields the loss of one micro-batch of these rows after the other, and records afterwards what each shows.

        Where the return is 0 at every token, the row has no gradient: it is looked at, but nothing is differentiated.
        """
        denominator = self.denominator(record, rows)
        for group, has_gradient, counts in self.micro_batches(record, rows):
            with torch.set_grad_enabled(has_gradient):
                result = self.loss(record, group, denominator)
            if has_gradient:
                yield result.loss if counts else result.loss * 0
            if counts:
                if self.agreement is not None:
                    samples = [record.rollout.samples[row] for row in group]
                    self.agreement.add(group, samples, result.logprobs)
                record.add(group, result)  # Not before it is differentiated: a GPU would have to be waited for.

    def denominator(self, record: StepRecord, rows: Sequence[int]) -> int:
        """Returns what the sum of the losses of these rows is divided by."""
        num_tokens = sum(len(record.rollout.samples[row].token_ids) for row in rows)
        return estimators.denominator(self.args.loss_aggregation, len(rows), num_tokens)

    def micro_batches(self, record: StepRecord, rows: Sequence[int]) -> Iterator[tuple[list[int], bool, bool]]:
        """Yields this process' micro-batches of these rows, whether they have a gradient, and whether they count.

        Those without a gradient come last. Those that do not count only keep pace with other processes.
        """
        samples = record.rollout.samples
        silent = set() if self.args.needs_reference else {row for row in rows if record.advantages[row] == 0}
        if len(silent) == len(rows) and stage_of(self.parts.accelerator):
            silent = set()  # DeepSpeed takes no step without a backward pass.
        for chosen in ([row for row in rows if row not in silent], sorted(silent)):
            lengths = [len(samples[row].prompt.token_ids) + len(samples[row].token_ids) for row in chosen]
            groups = split_by_tokens(lengths, max_tokens(self.parts, self.args), self.parts.processes.num)
            for group, counts in self.parts.processes.dealt(groups):
                yield [chosen[i] for i in group], chosen[0] not in silent, counts

    def loss(self, record: StepRecord, rows: list[int], denominator: int) -> BatchLoss:
        """Returns the loss of a micro-batch and what it shows."""
        args, parts, device = self.args, self.parts, self.parts.accelerator.device
        samples = [record.rollout.samples[row] for row in rows]
        batch = collate(samples, parts.tokenizer.pad_token_id, device)
        correction: dict[str, Any] = {}
        if self.agreement is not None and self.agreement.clip_max is not None:
            correction["drawn_logprobs"] = self.agreement.rollout_logprobs(samples, batch)
            correction["clip_max"] = self.agreement.clip_max
        with parts.accelerator.autocast():
            return policy_gradient_loss(
                self.policy.network,
                batch,
                record.advantages[rows].to(device),
                parts.sampling,
                args,
                denominator,
                ref_logprobs=record.ref_logprobs_of(rows, batch),
                reference=parts.reference if args.needs_exact_kl else None,
                **correction,
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next steps depend on beside weights and optimiser."""
        greedy = self.greedy_rewards.state_dict() if self.greedy_rewards else None
        return {"baseline": self.baseline.state_dict(), "greedy_rewards": greedy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.baseline.load_state_dict(state["baseline"])
        if self.greedy_rewards is not None:
            self.greedy_rewards.load_state_dict(state["greedy_rewards"])

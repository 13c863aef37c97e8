"""Proximal policy optimisation: a value model, clipped ratios, several epochs (Schulman et al., arXiv 1707.06347).

What it has that ReMax has not: a second network of the policy's size with its own optimiser, values for every token,
generalised advantage estimation, and the settings of these.

Legend: B samples that have a reward, T tokens of the longest.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remax import estimators
from remax.batching import Batch, collate, split_by_tokens
from remax.components import Components, Rewards
from remax.config import ReMaxConfig
from remax.errors import GuardStop
from remax.guards.finite import NotFinite, Skipped
from remax.interfaces import Completion, Prompt, Rollout
from remax.learner import Learner
from remax.methods.agreement import agreement
from remax.methods.within_memory import OnSkip, ignore, max_tokens, within_memory
from remax.metrics import Credit, StepRecord
from remax.objective import BatchLoss

KL_ERROR_LIMIT = 0.2
"""Largest relative error that the adaptive KL coefficient reacts to (Ziegler et al., arXiv 1909.08593, section 2.2)."""


@dataclass
class Experience:
    """What the epochs of a step have in common, [B, T] each."""

    samples: list[Completion]
    mask: Tensor
    old_logprobs: Tensor
    """Of the rollout: the policy that drew the samples."""
    log_ratios: Tensor
    """log pi - log pi_ref of the drawn tokens; 0 without a reference."""
    old_values: Tensor
    returns: Tensor
    """What the values should have been: advantages (before whitening) plus old values."""
    advantages: Tensor

    def part(self, rows: Sequence[int], width: int) -> "Experience":
        """Returns some of the rows, cut to a number of tokens."""
        tensors = {name: value[rows, :width] for name, value in vars(self).items() if name != "samples"}
        return Experience([self.samples[row] for row in rows], **tensors)


@dataclass(frozen=True)
class Update:
    """One of a step's updates: some of the samples, in one of the passes over all of them."""

    experience: Experience
    rows: Sequence[int]
    """Of the experience."""
    record: StepRecord
    rows_of_experience: Sequence[int]
    """Which rows of the record the experience has."""
    epoch: int
    number: int
    """Within the step, from 0."""

    @property
    def rows_of_record(self) -> list[int]:
        """Which rows of the record the update has."""
        return [self.rows_of_experience[row] for row in self.rows]


class PPO:
    """One step: values and reference of all samples, then num_ppo_epochs x num_mini_batches updates of both models."""

    def __init__(self, parts: Components, args: ReMaxConfig, policy: Learner, critic: Learner) -> None:
        """policy trains the CompletionScorer of parts.policy, critic a ValueModel."""
        self.parts, self.args, self.policy, self.critic = parts, args, policy, critic
        self.beta = args.beta
        self.num_steps = 0
        self.on_skip: OnSkip = ignore
        self.agreement = agreement(parts, args)

    def greedy_wanted(self, prompts: Sequence[Prompt]) -> list[bool]:
        """Returns for which prompts this step needs a greedy completion: none."""
        return [False] * len(prompts)

    def credit(self, rollout: Rollout, rewards: Rewards) -> Credit:
        """Returns the rewards, clipped if asked for: advantages come token by token, in `update`."""
        clip = self.args.reward_clip
        clipped = rewards.sampled.clone() if clip is None else rewards.sampled.clamp(-clip, clip)
        return Credit(clipped, torch.full_like(clipped, torch.nan))

    def update(self, record: StepRecord) -> None:
        """Takes all updates of a step, and completes the record."""
        self.num_steps += 1
        rows = record.trained.nonzero().flatten().tolist()
        if rows:
            self._learn(record, rows)
        self.critic.scheduler.step()

    def _learn(self, record: StepRecord, rows: Sequence[int]) -> None:
        """Takes the step's updates on these samples."""
        parts = self.parts
        experience = within_memory(parts, self.args, record, rows, lambda: self.experience(record, rows))
        record.advantages[rows] = experience.advantages[:, 0].cpu()
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.num_steps)
        updates: list[tuple[float, ...]] = []
        for epoch in range(self.args.num_ppo_epochs):
            order = torch.randperm(len(rows), generator=generator)
            for part in order.tensor_split(min(self.args.num_mini_batches, len(rows))):
                if record.stop is None:
                    update = Update(experience, part.tolist(), record, rows, epoch=epoch, number=len(updates))
                    updates.append(self._take(update))
        record.share(parts.processes)
        record.grad_norm, *measured = (sum(column) / len(updates) for column in zip(*updates, strict=True))
        record.metrics |= dict(zip(("policy/clip_fraction", "value/loss", "value/grad_norm"), measured, strict=True))
        record.metrics["value/explained_variance"] = _explained_variance(experience)
        record.metrics["beta"] = self.beta
        self._adapt_beta(experience)

    @torch.no_grad()
    def experience(self, record: StepRecord, rows: Sequence[int]) -> Experience:
        """Returns what a step's updates need of B samples, whose rewards are the record's advantages so far."""
        args, parts = self.args, self.parts
        samples = [record.rollout.samples[row] for row in rows]
        device = parts.accelerator.device
        shape = (len(samples), max(len(c.token_ids) for c in samples))
        mask = torch.zeros(shape, dtype=torch.bool, device=device)
        old, ref, values = torch.zeros((3, *shape), device=device).unbind()
        for row, own in enumerate(self._values(samples)):
            mask[row, : len(own)] = True
            values[row, : len(own)] = own
            old[row, : len(own)] = torch.tensor(samples[row].logprobs, device=device)
            ref[row] = old[row]
            if record.ref_logprobs is not None:
                ref[row, : len(own)] = record.ref_logprobs[rows[row]]
        log_ratios = old - ref
        rewards = record.advantages[list(rows)].to(device)
        token_rewards = estimators.token_rewards(rewards, log_ratios, mask, beta=self.beta)
        advantages = estimators.gae(token_rewards, values, mask, gamma=args.gamma, lam=args.lam)
        returns = advantages + values
        if args.whiten_advantages:
            advantages = estimators.whiten(advantages, mask)
        return Experience(samples, mask, old, log_ratios, values, returns, advantages)

    def _values(self, samples: Sequence[Completion]) -> list[Tensor]:
        """Returns V(x, y_<t) at the tokens of every sample, [T] each."""
        values: dict[int, Tensor] = {}
        for group, batch, counts in self._batches(samples):
            with self.parts.accelerator.autocast():
                padded = self.critic.network(batch)
            if counts:
                values |= {row: own[: len(samples[row].token_ids)] for row, own in zip(group, padded, strict=True)}
        values = self.parts.processes.gather_tensors(values, self.parts.accelerator.device)
        return [values[row] for row in range(len(samples))]

    def _take(self, update: Update) -> tuple[float, float, float, float]:
        """Updates policy and value model on some of the samples.

        Returns:
            The policy's gradient norm, the fraction of its tokens outside the clip range, the value loss and its
            gradient norm; NaN if that update was skipped.
        """
        experience, rows, record = update.experience, update.rows, update.record
        processes = self.parts.processes
        num_tokens = int(experience.mask[rows].sum())
        num_clipped = 0
        own_value_losses: list[Tensor] = []

        def policy_losses() -> Iterator[Tensor]:
            nonlocal num_clipped
            num_clipped = 0
            for loss, outside in self._policy_losses(update):
                num_clipped += outside
                yield loss
            if self.agreement is not None and update.number == 0:
                record.metrics |= self.agreement.check()

        def num_losses() -> int:
            return sum(1 for _ in self._dealt([experience.samples[row] for row in rows]))

        def value_losses() -> Iterator[Tensor]:
            own_value_losses.clear()
            for loss in self._value_losses(experience, rows):
                own_value_losses.append(loss.detach())
                yield loss

        policy_norm = self._guarded("policy", update, lambda: self.policy.update(policy_losses(), num_losses()))
        clip_fraction = value_norm = value_loss = math.nan
        if record.stop is None:
            clip_fraction = processes.sum(num_clipped) / num_tokens
            value_norm = self._guarded("value", update, lambda: self.critic.update(value_losses(), num_losses()))
        if record.stop is None:  # Read only now: a GPU would be waited for.
            value_loss = processes.sum(sum(loss.item() for loss in own_value_losses))
        return policy_norm, clip_fraction, value_loss, value_norm

    def _guarded(self, network: str, update: Update, take: Callable[[], float]) -> float:
        """Returns what an update of one of the networks returns; NaN if it had to be skipped.

        Raises:
            GuardStop: memory does not suffice for the step's first update. In a later one, when weights have moved
                already, the step ends there instead, so that its state can be saved.
        """
        record, rows = update.record, update.rows_of_record
        try:
            return within_memory(self.parts, self.args, record, rows, take)
        except NotFinite as fault:
            own = update.experience.part(update.rows, update.experience.mask.shape[1])
            tensors = {name: value for name, value in vars(own).items() if name != "samples"}
            self.on_skip(record, Skipped(network, fault.what, rows, update.number == 0, tensors))
            return math.nan
        except GuardStop as stop:
            if update.number == 0 and network == "policy":
                raise
            record.stop = stop
            return math.nan

    def losses(self, record: StepRecord, rows: Sequence[int]) -> Iterator[Tensor]:
        """Yields the policy's loss of a first pass over these rows as one mini-batch, and records what it shows."""
        update = Update(self.experience(record, rows), range(len(rows)), record, rows, epoch=0, number=0)
        for loss, _ in self._policy_losses(update):
            yield loss

    def _policy_losses(self, update: Update) -> Iterator[tuple[Tensor, int]]:
        """Yields the loss of each micro-batch and how many of its tokens lie outside the clip range.

        The first pass over the samples completes the record.
        """
        experience, rows = update.experience, update.rows
        num_tokens = int(experience.mask[rows].sum())
        for group, batch, own, counts in self.micro_batches(experience, rows):
            result, outside = self.policy_loss(own, batch, len(rows), num_tokens)
            if not counts:
                yield result.loss * 0, 0
                continue
            if update.epoch == 0:
                share = len(rows) / len(experience.samples)
                if self.agreement is not None and update.number == 0:
                    samples = [experience.samples[rows[i]] for i in group]
                    self.agreement.add([update.rows_of_record[i] for i in group], samples, result.logprobs)
                own_part = result._replace(loss=result.loss.detach() * share)
                update.record.add([update.rows_of_record[i] for i in group], own_part, untouched=update.number == 0)
            yield result.loss, outside

    def _value_losses(self, experience: Experience, rows: Sequence[int]) -> Iterator[Tensor]:
        """Yields the value model's loss of each micro-batch."""
        num_tokens = int(experience.mask[rows].sum())
        for _, batch, own, counts in self.micro_batches(experience, rows):
            loss = self.value_loss(own, batch, num_tokens)[0]
            yield loss if counts else loss * 0

    def value_loss(self, own: Experience, batch: Batch, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Returns the value model's loss of a micro-batch and the values, [B, T] detached."""
        with self.parts.accelerator.autocast():
            values = self.critic.network(batch)
        losses = estimators.value_loss(
            values, own.old_values, own.returns, own.mask, cliprange=self.args.cliprange_value
        )
        return losses.sum() / num_tokens, values.detach()

    def policy_loss(self, own: Experience, batch: Batch, num_rows: int, num_tokens: int) -> tuple[BatchLoss, int]:
        """Returns the clipped loss of a micro-batch and how many of its tokens lie outside the clip range."""
        args = self.args
        with self.parts.accelerator.autocast():
            pi = self.policy.network(batch, self.parts.sampling)
        losses = estimators.ppo_loss(pi.logprobs, own.old_logprobs, own.advantages, own.mask, cliprange=args.cliprange)
        loss = estimators.total(losses, own.mask) / estimators.denominator(args.loss_aggregation, num_rows, num_tokens)
        logprobs = pi.logprobs.detach()
        ratio = (logprobs - own.old_logprobs).masked_fill(~own.mask, 0.0).exp()
        kl = own.log_ratios.sum(-1)
        result = BatchLoss(
            loss,
            kl if self.parts.reference is not None else torch.full_like(kl, torch.nan),
            pi.entropies.sum(-1) / own.mask.sum(-1),
            (own.advantages == 0).all(-1),
            logprobs,
        )
        return result, int(((ratio - 1).abs() > args.cliprange).sum())

    def micro_batches(
        self, experience: Experience, rows: Sequence[int]
    ) -> Iterator[tuple[list[int], Batch, Experience, bool]]:
        """Yields positions in rows, their batch, what is known of them, and whether they count.

        They are this process'; those that do not count only keep pace with other processes.
        """
        for group, batch, counts in self._batches([experience.samples[row] for row in rows]):
            own = experience.part([rows[i] for i in group], batch.completion_mask.shape[1])
            yield group, batch, own, counts

    def _batches(self, samples: Sequence[Completion]) -> Iterator[tuple[list[int], Batch, bool]]:
        """Yields this process' micro-batches of the samples, with their positions, and whether they count."""
        for group, counts in self._dealt(samples):
            chosen = [samples[i] for i in group]
            yield group, collate(chosen, self.parts.tokenizer.pad_token_id, self.parts.accelerator.device), counts

    def _dealt(self, samples: Sequence[Completion]) -> list[tuple[list[int], bool]]:
        lengths = [len(c.prompt.token_ids) + len(c.token_ids) for c in samples]
        processes = self.parts.processes
        return processes.dealt(split_by_tokens(lengths, max_tokens(self.parts, self.args), processes.num))

    def _adapt_beta(self, experience: Experience) -> None:
        """Moves beta so that the KL approaches --target_kl (Ziegler et al., arXiv 1909.08593, section 2.2)."""
        if self.args.target_kl is None:
            return
        kl = experience.log_ratios.sum(-1).mean().item()
        if not math.isfinite(kl):  # max(-0.2, nan) would be -0.2
            return
        error = min(KL_ERROR_LIMIT, max(-KL_ERROR_LIMIT, kl / self.args.target_kl - 1))
        self.beta *= 1 + error * len(experience.samples) / self.args.kl_horizon

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next steps depend on beside weights and optimisers."""
        return {"beta": self.beta, "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.beta, self.num_steps = state["beta"], state["num_steps"]


def _explained_variance(experience: Experience) -> float:
    """Returns 1 - Var(returns - values) / Var(returns) over all tokens: 1 for a perfect value model."""
    returns, values = experience.returns[experience.mask], experience.old_values[experience.mask]
    return float(1 - (returns - values).var(correction=0) / (returns.var(correction=0) + 1e-12))

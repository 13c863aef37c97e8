"""What is recorded of a training step, under TRL's names where it has them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remax.batching import Batch
from remax.components import Rewards
from remax.errors import GuardStop
from remax.guards.finite import Skipped
from remax.interfaces import Completion, Rollout
from remax.objective import BatchLoss
from remax.processes import Processes


class Credit(NamedTuple):
    """What a method makes of the rewards of S samples, [S] each."""

    advantages: Tensor
    """Reward minus baseline; NaN where there is none, which leaves the sample out of the loss."""
    greedy: Tensor
    """Reward of the greedy completion of the sample's prompt; NaN where the method draws none."""


SHOWN = ("kl", "entropy", "no_signal", "logprob_difference")
"""What micro-batches show of each sample, beside their loss."""


@dataclass
class StepRecord:
    """One step's samples and what became of them. S sampled rows, in the order of rollout.samples."""

    rollout: Rollout
    rewards: Rewards
    credit: Credit
    ref_logprobs: list[Tensor] | None
    """S times [T] log-probabilities of the sample's tokens under the reference; None where the update needs none."""
    step: int = 0
    """Of the training, from 1; 0 outside of one."""
    kl: Tensor = field(init=False)
    """[S] log pi(y) - log pi_ref(y) of the whole completion, in nats; NaN without a reference."""
    entropy: Tensor = field(init=False)
    """[S] mean entropy per token, in nats."""
    no_signal: Tensor = field(init=False)
    """[S] True where no token gets a gradient."""
    logprob_difference: Tensor = field(init=False)
    """[S] largest difference between a token's log-probability in training and in the rollout, in nats."""

    loss: float = 0.0
    """The loss of the whole batch; its gradient is the point, its value says little."""
    grad_norm: float = 0.0
    """Norm of the gradient before clipping."""
    learning_rate: float = 0.0
    """Of this step."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the method measures beside."""
    skipped: list[Skipped] = field(default_factory=list)
    """The updates that were not taken, since their loss or gradient was not finite."""
    stop: GuardStop | None = None
    """What stops the run after this step, whose last updates were not taken."""

    def __post_init__(self) -> None:
        self.kl, self.entropy, self.logprob_difference = torch.full((3, len(self.advantages)), torch.nan).unbind()
        self.no_signal = torch.ones(len(self.advantages), dtype=torch.bool)
        self._seen = torch.zeros(len(self.advantages), dtype=torch.bool)

    @property
    def advantages(self) -> Tensor:
        """[S] reward minus baseline, clipped if asked for."""
        return self.credit.advantages

    def ref_logprobs_of(self, rows: Sequence[int], batch: Batch) -> Tensor | None:
        """Returns the reference's log-probabilities of some rows, [B, T] as in their batch."""
        if self.ref_logprobs is None:
            return None
        return batch.scatter(torch.cat([self.ref_logprobs[row] for row in rows]))

    def add(self, rows: list[int], result: BatchLoss, *, untouched: bool = True) -> None:
        """Takes what a micro-batch of these rows showed.

        untouched: the policy is still the one that drew the samples, so its log-probabilities have to be theirs.
        """
        self.loss += result.loss.item()
        self._seen[rows] = True
        self.kl[rows] = result.kl.float().cpu()
        self.entropy[rows] = result.entropy.float().cpu()
        self.no_signal[rows] = result.no_signal.cpu()
        if not untouched:
            return
        for row, logprobs in zip(rows, result.logprobs.float().cpu(), strict=True):
            drawn = torch.tensor(self.rollout.samples[row].logprobs)
            self.logprob_difference[row] = (logprobs[: len(drawn)] - drawn).abs().max()

    def shown(self) -> dict[str, Any]:
        """Returns what `add` was given so far, for `forget`."""
        return {"loss": self.loss} | {name: getattr(self, name).clone() for name in (*SHOWN, "_seen")}

    def forget(self, shown: Mapping[str, Any]) -> None:
        """Goes back to what had been shown by then: an attempt that broke off must not count twice."""
        self.loss = shown["loss"]
        for name in (*SHOWN, "_seen"):
            getattr(self, name).copy_(shown[name])

    def share(self, processes: Processes) -> None:
        """Adds what the other processes' micro-batches showed; each row was in one process' only."""
        parts = processes.gather(self.shown())
        self.loss = sum(part["loss"] for part in parts)
        for part in parts:
            for name in SHOWN:
                getattr(self, name)[part["_seen"]] = part[name][part["_seen"]]

    @property
    def trained(self) -> Tensor:
        """[S] True where sample and baseline have a reward: the others are left out of the loss."""
        return self.advantages.isfinite()


def step_metrics(record: StepRecord) -> dict[str, float]:
    """Returns the step's metrics: rewards over the samples that were trained on, lengths over all.

    reward/gap is the mean of reward minus greedy reward, kl is in nats per sequence, entropy in nats per token. Where
    a method draws no greedy completions, what tells of them is NaN.
    """
    metrics: dict[str, float | Tensor] = {
        "loss": record.loss,
        "grad_norm": record.grad_norm,
        "learning_rate": record.learning_rate,
    }
    metrics |= _reward_metrics(record)
    if record.trained.any():
        metrics |= _policy_metrics(record)
    metrics |= record.metrics
    lengths = _lengths(record.rollout.samples)
    metrics |= {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": torch.tensor([float(c.truncated) for c in record.rollout.samples]).mean(),
        "completions/greedy_mean_length": _lengths(record.rollout.greedy).mean(),
    }
    return {name: float(value) for name, value in metrics.items()}


def _reward_metrics(record: StepRecord) -> dict[str, Tensor]:
    rewards, greedy = record.rewards.sampled[record.trained], record.credit.greedy[record.trained]
    metrics = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(correction=0),
        "reward/greedy": greedy.mean(),
        "reward/gap": (rewards - greedy).mean(),
        "reward/missing_fraction": 1 - record.trained.float().mean(),
    }
    metrics |= {name: torch.tensor(value) for name, value in record.rewards.metrics.items()}
    for name, values in record.rewards.sampled_by_function.items():
        present = values[values.isfinite()]
        metrics |= {f"rewards/{name}/mean": present.mean(), f"rewards/{name}/std": present.std(correction=0)}
    return metrics


def _policy_metrics(record: StepRecord) -> dict[str, Tensor]:
    trained = record.trained
    lengths = _lengths(record.rollout.samples)[trained]
    differences = record.logprob_difference[trained & record.logprob_difference.isfinite()]
    metrics = {
        "entropy": (record.entropy[trained] * lengths).sum() / lengths.sum(),
        "gradient/zero_signal_fraction": record.no_signal[trained].float().mean(),
        "sampling/logprob_difference_max": differences.max() if len(differences) else torch.tensor(torch.nan),
    }
    if record.kl[trained].isfinite().any():
        metrics["kl"] = record.kl[trained].mean()
    return metrics


def _lengths(completions: list[Completion]) -> Tensor:
    return torch.tensor([len(c.token_ids) for c in completions], dtype=torch.float32)


def completion_records(record: StepRecord, step: int) -> list[dict[str, Any]]:
    """Returns one record per sample for completions.jsonl: texts sampled and greedy, rewards, advantage."""
    greedy = {completion.prompt.index: completion for completion in record.rollout.greedy}
    records = []
    for row, sample in enumerate(record.rollout.samples):
        own_greedy = greedy.get(sample.prompt.index)
        records.append(
            {
                **{name: values[row] for name, values in record.rewards.columns.items()},
                "step": step,
                "prompt_index": sample.prompt.index,
                "sample_index": sample.sample_index,
                "prompt": sample.prompt.content,
                "completion": sample.text,
                "greedy_completion": own_greedy and own_greedy.text,
                "greedy_truncated": own_greedy and own_greedy.truncated,
                "reward": record.rewards.sampled[row].item(),
                "greedy_reward": record.credit.greedy[row].item(),
                "advantage": record.advantages[row].item(),
                "rewards": {name: values[row].item() for name, values in record.rewards.sampled_by_function.items()},
                "length": len(sample.token_ids),
                "truncated": sample.truncated,
            }
        )
    return records

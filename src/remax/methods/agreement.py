"""Whether another program that draws the samples agrees with the policy that is trained on them.

Its kernels round differently, so its distribution q is not quite the policy's. The log-probabilities that it gives for
the tokens it drew are compared with those of training; what they differ by is corrected for
(estimators.importance_ratios) and limited (--max_logprob_gap).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from remax.batching import Batch
from remax.components import Components
from remax.config import ReMaxConfig
from remax.errors import GuardStop
from remax.interfaces import Completion, ForeignEngine
from remax.processes import Processes


class Agreement:
    """Compares a step's samples, micro-batch by micro-batch."""

    def __init__(self, program: str, args: ReMaxConfig, processes: Processes) -> None:
        """program: that draws the samples."""
        self.program, self.limit, self._processes = program, args.max_logprob_gap, processes
        corrects = args.vllm_importance_sampling_correction and args.method != "ppo"
        self.clip_max = args.vllm_importance_sampling_clip_max if corrects else None
        """Of the ratios that weigh the samples; None if nothing does."""
        self._differences: dict[int, Tensor] = {}
        """By row, [T] log pi - log q of its tokens."""

    def rollout_logprobs(self, samples: Sequence[Completion], batch: Batch) -> Tensor | None:
        """Returns log q of the samples' tokens, [B, T] as in their batch; None if nothing is corrected for."""
        if self.clip_max is None:
            return None
        drawn = torch.cat([torch.tensor(sample.logprobs) for sample in samples])
        return batch.scatter(drawn.to(batch.completion_mask.device))

    def add(self, rows: Sequence[int], samples: Sequence[Completion], logprobs: Tensor) -> None:
        """Takes the log-probabilities, [B, T], that training computes for these rows' samples before any update."""
        for row, sample, own in zip(rows, samples, logprobs.float().cpu(), strict=True):
            drawn = torch.tensor(sample.logprobs)
            self._differences[row] = own[: len(drawn)] - drawn.nan_to_num(nan=-math.inf)

    def check(self) -> dict[str, float]:
        """Returns the metrics of what was added by all processes, and forgets it. To be called before weights move.

        Raises:
            GuardStop: the two differ too much.
        """
        parts = self._processes.gather(self._differences)
        self._differences = {}
        known = [differences for part in parts for differences in part.values() if not differences.isnan().any()]
        if not known:
            return {}
        gaps = torch.cat(known).abs()
        gap = float(gaps.mean())
        if gap > self.limit:
            raise GuardStop(
                f"the log-probabilities that {self.program} gives for the tokens it drew are {gap:.3g} nats per token "
                f"from the policy's on average, more than --max_logprob_gap {self.limit:g} allows: the engine holds "
                "other weights than the policy, or computes otherwise (another precision, an unsupported model); the "
                "step was not taken, so see to that and go on with --resume auto.",
                known_to_all=True,
            )
        metrics = {
            "sampling/sampling_logp_difference/mean": gap,
            "sampling/sampling_logp_difference/max": float(gaps.max()),
        }
        if self.clip_max is not None:
            ratios = torch.stack([differences.sum() for differences in known]).exp().clamp(max=self.clip_max)
            for name, value in (("min", ratios.min()), ("mean", ratios.mean()), ("max", ratios.max())):
                metrics[f"sampling/importance_sampling_ratio/{name}"] = float(value)
        return metrics


def agreement(parts: Components, args: ReMaxConfig) -> Agreement | None:
    """Returns what compares the samples with the policy; None if the policy's own program draws them."""
    if not isinstance(parts.engine, ForeignEngine):
        return None
    return Agreement(parts.engine.program, args, parts.processes)

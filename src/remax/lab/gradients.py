"""The rollouts of an experiment, which all methods share, and the gradients that each makes of them.

The checkpoint never moves, so a prompt has one greedy completion, and the rollouts can be drawn before any gradient is
taken: K of them, with k samples of each of P prompts, k being the most that a method takes. A method of fewer samples
takes the first ones, which are those it would have drawn alone.
"""

import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remax.components import Components, Rewards
from remax.config import ReMaxConfig
from remax.errors import UserError
from remax.interfaces import Completion, Prompt, Rollout
from remax.lab.statistics import Floats
from remax.learner import Learner
from remax.methods import make_method, make_value_model
from remax.metrics import StepRecord

Gradients = NDArray[np.float32]

SAME = 1e-5
"""Differences of advantages below this part of their mean size are rounding."""


class Draw(NamedTuple):
    """One rollout with its rewards."""

    rollout: Rollout
    rewards: Rewards

    def of(self, args: ReMaxConfig, offsets: Tensor) -> "Draw":
        """Returns what a method with these settings sees of it, offsets [P] being added to the prompts' rewards."""
        rows = [row for row, sample in enumerate(self.rollout.samples) if sample.sample_index < args.num_generations]
        greedy = self.rollout.greedy if args.needs_greedy else []
        rewards = Rewards(
            self.rewards.sampled[rows] + offsets.repeat_interleave(args.num_generations),
            (self.rewards.greedy + offsets)[: len(greedy)] if greedy else self.rewards.greedy[:0],
            *({}, {}, {}),
        )
        return Draw(Rollout([self.rollout.samples[row] for row in rows], greedy), rewards)


def draw_all(
    parts: Components, prompts: Sequence[Prompt], *, num_samples: int, greedy: bool, seed: int, steps: Iterable[int]
) -> list[Draw]:
    """Returns one independent rollout of the prompts per step number, each scored in full.

    The greedy completions are drawn once, but scored with every rollout: the noise of a noisy reward is part of a
    gradient's variance.

    Raises:
        UserError: a rollout has no reward at all.
    """
    modes: list[Completion] = []
    if greedy:
        modes = parts.roll_out(prompts, num_samples=0, greedy=True, seed=seed, step=0).greedy
    draws = []
    for step in steps:
        samples = parts.roll_out(prompts, num_samples=num_samples, greedy=False, seed=seed, step=step).samples
        draw = Draw(Rollout(samples, modes), parts.score(Rollout(samples, modes)))
        if not draw.rewards.sampled.isfinite().any():
            raise _no_rewards(parts)
        draws.append(draw)
    return draws


def _no_rewards(parts: Components) -> UserError:
    names = ", ".join(function.name for function in parts.reward_functions)
    return UserError(
        f"the rewards ({names}) gave no number for any sample of a rollout with its baseline: there is no gradient; "
        "correct the reward function (what went wrong in it, if anything did, is in a warning above)."
    )


@dataclass(frozen=True)
class Costs:
    """What the gradients of a method took and showed beside themselves, one number per gradient, [K]."""

    no_signal: Floats
    """The part of samples that leave no trace in the gradient."""
    sampled_tokens: Floats
    greedy_tokens: Floats


class Estimator:
    """A method at a checkpoint: makes gradients of rollouts and takes no step.

    ppo's gradient is that of the first epoch, with all samples as one mini-batch and the value model as it is given.
    Baselines that learn from past batches (moving_average, mixed) see the warm-up rollouts first and then stay fixed:
    the gradients are independent, and their variance that of one step, not of the baseline's own wandering.
    """

    def __init__(self, parts: Components, args: ReMaxConfig, policy: Learner) -> None:
        """policy holds the CompletionScorer of parts.policy; its optimiser is not used."""
        self.parts, self.args = parts, args
        self.method = make_method(parts, args, policy, make_value_model(parts, args), max_steps=1)
        self.trainable = [p for p in parts.policy.parameters() if p.requires_grad]
        self._untouched = self.method.state_dict()

    def records(self, draws: Sequence[Draw], offsets: Tensor, warmup: Sequence[Draw]) -> list[StepRecord]:
        """Returns what the method makes of each rollout's rewards, offsets [P] being added to those of each prompt."""
        self.method.load_state_dict(self._untouched)
        for draw in warmup:
            self.method.credit(*draw.of(self.args, offsets))
        state = self.method.state_dict()
        records = []
        for draw in draws:
            self.method.load_state_dict(state)
            seen = draw.of(self.args, offsets)
            records.append(StepRecord(*seen, self.method.credit(*seen), None))
        return records

    def gradients(self, records: Sequence[StepRecord], out: Gradients) -> Costs:
        """Writes one gradient per record into out, [K, D], and returns what they took.

        Raises:
            UserError: no sample of a rollout has both reward and baseline.
        """
        costs = np.zeros((3, len(records)))
        for k, record in enumerate(records):
            out[k] = self._gradient(record)
            no_signal = record.no_signal[record.trained].float().mean().item()
            costs[:, k] = no_signal, _num_tokens(record.rollout.samples), _num_tokens(record.rollout.greedy)
        return Costs(*costs)

    def _gradient(self, record: StepRecord) -> Gradients:
        rows = record.trained.nonzero().flatten().tolist()
        if not rows:
            raise _no_rewards(self.parts)
        record.ref_logprobs = self.parts.begin_reference(record.rollout, self.args)()
        for loss in self.method.losses(record, rows):
            self.parts.accelerator.backward(loss)
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trainable]
        gradient: Gradients = torch.cat([piece.flatten().float() for piece in pieces]).cpu().numpy()
        for p in self.trainable:
            p.grad = None
        return gradient


def same_advantages(records: Sequence[StepRecord], others: Sequence[StepRecord]) -> bool:
    """Whether two lots of records of the same rollouts have the same advantages, so the same gradients, up to
    rounding."""
    ours, theirs = (torch.cat([record.advantages for record in lot]) for lot in (records, others))
    scale = ours[ours.isfinite()].abs().mean().item()
    return torch.allclose(ours, theirs, rtol=0.0, atol=SAME * scale, equal_nan=True)


def _num_tokens(completions: Sequence[Completion]) -> int:
    return sum(len(c.token_ids) for c in completions)


def layers_of(policy: torch.nn.Module) -> dict[str, list[slice]]:
    """Returns which columns of a gradient belong to which layer.

    A layer is a block of a list of blocks (layers.3), or a module outside of such lists (embed_tokens, norm).
    """
    layers: dict[str, list[slice]] = {}
    start = 0
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            stop = start + parameter.numel()
            layers.setdefault(_layer_name(name), []).append(slice(start, stop))
            start = stop
    return layers


def _layer_name(parameter: str) -> str:
    block = re.search(r"(\w+\.\d+)\.", parameter)
    return block.group(1) if block else parameter.rpartition(".")[0].rpartition(".")[2]


def scratch(folder: Path, num_gradients: int, num_weights: int) -> Gradients:
    """Returns room for K gradients of D weights, [K, D], in a file without a name, which leaves no trace."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype=np.float32, mode="w+", shape=(num_gradients, num_weights))

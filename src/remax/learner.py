"""A network that is trained: its weights, their optimiser and their schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_scheduler

from remax.config import OptimiserOptions
from remax.errors import UserError


class Learner:
    """Takes gradient steps on losses that come micro-batch by micro-batch."""

    def __init__(
        self, network: nn.Module, args: OptimiserOptions, accelerator: Accelerator, *, max_steps: int, rate_flag: str
    ) -> None:
        """Takes the optimiser's settings, the length of the schedule in training steps and the rate's flag, for
        errors."""
        self.trainable = [p for p in network.parameters() if p.requires_grad]
        self.max_grad_norm = args.max_grad_norm or math.inf
        self.rate_flag = rate_flag
        optimizer = adamw(network, args)
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup_steps(args, max_steps),
            num_training_steps=max_steps,
        )
        self.accelerator = accelerator
        self.network: Any
        self.optimizer: Any
        self.network, self.optimizer = accelerator.prepare(network, optimizer)

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return float(self.scheduler.get_last_lr()[0])

    def update(self, losses: Iterable[Tensor]) -> float:
        """Takes one step on the sum of the losses and returns the gradient's norm before clipping.

        Each loss is differentiated before the next one is asked for, so one micro-batch is in memory at a time.

        Raises:
            UserError: the gradient is not finite; the weights are as they were.
        """
        for loss in losses:
            self.accelerator.backward(loss)
        norm = float(self.accelerator.clip_grad_norm_(self.trainable, self.max_grad_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise UserError(
                f"--{self.rate_flag} is {self.learning_rate:.3g} at this step: the gradient is not finite, and a step "
                "with it would destroy the weights; set a lower rate, or more --warmup_steps."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def adamw(network: nn.Module, args: OptimiserOptions) -> torch.optim.Optimizer:
    """Returns AdamW over the trainable weights; biases and norms (vectors) do not decay."""
    trainable = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
    )


def warmup_steps(args: OptimiserOptions, max_steps: int) -> int:
    """Returns the steps of warm-up; a setting below 1 is a fraction of the run."""
    return math.ceil(args.warmup_steps * max_steps) if args.warmup_steps < 1 else int(args.warmup_steps)

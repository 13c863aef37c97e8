"""A network that is trained: its weights, their optimiser and their schedule."""

import math
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import get_scheduler

from remax.config import OptimiserOptions
from remax.errors import UserError
from remax.guards.finite import NotFinite
from remax.guards.memory import is_out_of_memory
from remax.head import gradients_in_place
from remax.optimisers import make_optimizer
from remax.sharding import release
from remax.zero import configure, stage_of
from remax.zero import update as update_by_zero


class Learner:
    """Takes gradient steps on losses that come micro-batch by micro-batch."""

    def __init__(
        self, network: nn.Module, args: OptimiserOptions, accelerator: Accelerator, *, max_steps: int, rate_flag: str
    ) -> None:
        """Takes the optimiser's settings, the length of the schedule in training steps and the rate's flag, for
        errors."""
        # torch takes a first step that was skipped for a schedule that is called in the wrong order.
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
        self.max_grad_norm = args.max_grad_norm or math.inf
        self.rate_flag, self.optim = rate_flag, args.optim
        optimizer = make_optimizer(network, args)
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup_steps(args, max_steps),
            num_training_steps=max_steps,
        )
        self.accelerator = accelerator
        self.network: Any
        self.optimizer: Any
        if stage_of(accelerator):
            configure(accelerator, args.max_grad_norm)
            accelerator.deepspeed_engine_wrapped = None  # It would warn of a second one, such as PPO's value model.
        self.network, self.optimizer = accelerator.prepare(network, optimizer)
        self.module = accelerator.unwrap_model(self.network)
        """The network without what Accelerate put around it; sharded, its weights are others now."""
        self.trainable = [p for p in self.module.parameters() if p.requires_grad]

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return float(self.scheduler.get_last_lr()[0])

    def update(self, losses: Iterable[Tensor], num_losses: int) -> float:
        """Takes one step on the sum of the losses and returns the gradient's norm before clipping.

        Each loss is differentiated before the next one is asked for, so one micro-batch is in memory at a time. Without
        any the step is that of a loss of zero: momentum and weight decay go on.

        With several processes the sum goes over all of them, and each has to have the same number of losses.

        Raises:
            NotFinite: the loss or its gradient is not finite; the weights and the optimiser are as they were.
            UserError: memory does not suffice for the optimiser's step.

        Whatever is raised, no gradient is left over: the same update can be taken again.
        """
        if stage_of(self.accelerator):
            return update_by_zero(self.network, losses, num_losses, self.accelerator)
        num_processes = self.accelerator.num_processes
        try:
            total = torch.zeros((), device=self.accelerator.device)
            # An engine that gathers gradients has to see them; and it takes their mean, where a sum is wanted.
            with gradients_in_place() if num_processes == 1 else nullcontext():
                remaining = iter(losses)
                for number in range(1, num_losses + 1):
                    with self._communicates(number == num_losses):
                        loss = next(remaining)
                        self.accelerator.backward(loss * num_processes)
                    total += loss.detach()
                for _ in remaining:  # What comes after the last loss: passes without a gradient.
                    raise AssertionError("more losses than were announced")
            self._zero_missing_gradients()
            norm = _number(nn.utils.clip_grad_norm_(self.trainable, self.max_grad_norm))
            loss_is_finite = math.isfinite(float(self.accelerator.reduce(total, "sum")))
            if not (loss_is_finite and math.isfinite(norm)):
                raise NotFinite("gradient" if loss_is_finite else "loss")
            release(self.module)
            self._step()
        finally:
            self.optimizer.zero_grad()
        return norm

    def _communicates(self, last: bool) -> AbstractContextManager[Any]:
        """Where every process has all weights, gradients are exchanged once, after the last micro-batch.

        Where they are sharded, after each one: otherwise every process would hold the whole gradient.
        """
        wrapped = isinstance(self.network, DistributedDataParallel)
        return nullcontext() if last or not wrapped else self.accelerator.no_sync(self.network)

    def _step(self) -> None:
        """Takes the optimiser's step. Out of memory, it cannot be taken again: some weights may have moved already."""
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"--optim is {self.optim}: memory does not suffice for its step, which takes the same for every batch; "
                "set a smaller one, such as adamw_torch_8bit, or --use_peft (`remax plan` shows what would fit)."
            ) from error

    def _zero_missing_gradients(self) -> None:
        """Gives every weight a gradient if there is none at all: an optimiser leaves out weights that have none."""
        if all(weight.grad is None for weight in self.trainable):
            for weight in self.trainable:
                weight.grad = torch.zeros_like(weight)


def _number(norm: Any) -> float:
    """Returns a norm, of sharded gradients too."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def warmup_steps(args: OptimiserOptions, max_steps: int) -> int:
    """Returns the steps of warm-up; a setting below 1 is a fraction of the run."""
    return math.ceil(args.warmup_steps * max_steps) if args.warmup_steps < 1 else int(args.warmup_steps)

"""The processes that train together: how they share work and results, and agree when something goes wrong in one.

Every process has the same settings, prompts and order of prompts. Each rolls out, scores and differentiates its part of
a step; what comes of it is gathered, so that every process knows the whole step and takes the same decisions.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor

from remax.errors import GuardStop, UserError
from remax.zero import load_whole

PATIENCE = timedelta(hours=2)
"""How long a process waits for another one, such as for the one that writes a large model. One that ends ends all."""

T = TypeVar("T")


class ProcessFailed(RuntimeError):
    """Another process cannot go on, so this one cannot either; the message names it and its reason."""


class Processes:
    """This process among those that train together."""

    def __init__(self, index: int = 0, num: int = 1) -> None:
        self.index, self.num = index, num

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.index == 0

    # Work -------------------------------------------------------------------------------------------------------------

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this process' part, of consecutive items; the sizes of the parts differ by one at most."""
        return items[len(items) * self.index // self.num : len(items) * (self.index + 1) // self.num]

    def dealt(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """Returns every num-th item and whether it counts: all processes get the same number, at least one.

        Whoever has none left gets the last one of all again, which does not count: passes through a network that is
        shared have to be taken by all processes or by none.
        """
        own = [(item, True) for item in items[self.index :: self.num]]
        return own + [(item, False) for item in items[-1:]] * (-(-len(items) // self.num) - len(own))

    # Results ----------------------------------------------------------------------------------------------------------

    def gather(self, own: T) -> list[T]:
        """Returns the values of all processes; to be called by all of them."""
        if self.num == 1:
            return [own]
        values: list[Any] = [None] * self.num
        torch.distributed.all_gather_object(values, own)
        return values

    def gather_tensors(self, own: Mapping[int, Tensor], device: torch.device) -> dict[int, Tensor]:
        """Returns the tensors of all processes by their numbers, on this process' device."""
        if self.num == 1:
            return dict(own)
        # Cloned: a view would be sent with all that it is a part of.
        parts = self.gather({number: tensor.cpu().clone() for number, tensor in own.items()})
        return {number: tensor.to(device) for part in parts for number, tensor in part.items()}

    def sum(self, own: float) -> float:
        """Returns the sum of the values of all processes."""
        return sum(self.gather(own))

    def most(self, own: int) -> int:
        """Returns the largest of the values of all processes."""
        return max(self.gather(own))

    def each(self, work: Callable[[], T]) -> list[T]:
        """Returns what the work of every process gives. If it fails in one, it fails in all.

        Raises:
            UserError, GuardStop: as in the first process that raised one.
            ProcessFailed: another process raised something else.
        """
        if self.num == 1:
            return [work()]
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        outcomes = self.gather((result, None if failure is None else (type(failure), str(failure))))
        for index, (_, failed) in enumerate(outcomes):
            if failed is not None:
                self._raise(index, *failed, own=failure)
        return [outcome[0] for outcome in outcomes]  # type: ignore[misc]

    def together(self, work: Callable[[], T]) -> T:
        """Returns what the work gives in this process. If it fails in one, it fails in all, see `each`.

        For work whose result cannot be sent to others.
        """
        results: list[T] = []
        self.each(lambda: results.append(work()))
        return results[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Returns what the work gives, which only the main process does.

        Raises: see `each`.
        """
        return self.each(work if self.is_main else lambda: None)[0]  # type: ignore[return-value]

    def _raise(self, index: int, kind: type, message: str, own: Exception | None) -> None:
        if issubclass(kind, UserError | GuardStop):
            error = kind(message)
            error.known_to_all = True
            raise error from own
        if own is not None:
            raise own
        raise ProcessFailed(f"process {index} failed ({kind.__name__}: {message})")


ALONE = Processes()


def join_processes() -> Processes:
    """Returns this process among those that its launcher started, having waited for the others."""
    # By itself Accelerate takes every process that has no GPU for a lone one.
    device = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = _num_started() > 1 and (device is None or device.type == "mps")
    if on_cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        state = PartialState(backend="gloo", timeout=PATIENCE)  # With cpu=True it would leave DeepSpeed out.
    else:
        state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes)


def leave_processes() -> None:
    """Ends the connection to the other processes, when nothing is left to be done together.

    A group that somebody else has made is left alone: vLLM ends its own.
    """
    if PartialState().distributed_type != DistributedType.NO and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _num_started() -> int:
    """Returns how many processes a launcher says that it has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def make_accelerator(bf16: bool, output_dir: str | None = None, *, processes: Processes = ALONE) -> Accelerator:
    """Returns the device and precision of a run.

    processes: those that work together.

    Raises:
        UserError: more processes were started than work together.
    """
    # The precision of a former run in this process would be kept otherwise; transformers' Trainer does the same.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", project_dir=output_dir)
    load_whole(accelerator)
    if _num_started() > processes.num:
        raise UserError(
            f"{_num_started()} processes were started: this command works in one, and the others would "
            "write over it; start one process (`remax train`, `sft`, `reward` and `dpo` take several)."
        )
    return accelerator

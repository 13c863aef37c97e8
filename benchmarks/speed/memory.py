"""The memory and the operations of a step, counted from its tensors."""

import contextlib
import gc
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from remax.compare.measure import UNKNOWN_OPERATIONS, LiveTensors, _OneModule, num_bytes
from remax.trainer import ReMaxTrainer


@contextlib.contextmanager
def watch(report: dict[str, Any], live: LiveTensors | None = None) -> Iterator[None]:
    """Counts into the report: bytes of the tensors alive before, at the peak of what is done inside, and operations."""
    report["static_bytes"] = alive_bytes()
    counter: Any = FlopCounterMode(display=False, custom_mapping=UNKNOWN_OPERATIONS)
    counter.mod_tracker = _OneModule()
    live = live or LiveTensors()
    with live, counter:
        yield
    report |= {"live_bytes": report["static_bytes"] + live.peak, "flops": counter.get_total_flops()}


def alive_bytes() -> int:
    """Returns the bytes of all tensors of this process."""
    gc.collect()
    is_tensor = _IsTensor()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [thing for thing in gc.get_objects() if is_tensor[type(thing)]]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _IsTensor(dict[type, bool]):
    """Whether a class is a tensor's; remembered, since a process has a million objects of few classes."""

    def __missing__(self, kind: type) -> bool:
        self[kind] = issubclass(kind, Tensor)
        return self[kind]


def static_bytes(trainer: ReMaxTrainer) -> int:
    """Returns the bytes of weights and optimiser state; other trainers of this process hold memory too."""
    reference = trainer.parts.reference
    frozen = num_bytes(reference.parameters()) if reference is not None else 0
    optimizer = getattr(trainer.policy.optimizer, "optimizer", trainer.policy.optimizer)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return num_bytes(trainer.policy.trainable) + frozen + num_bytes(states)


class BesideGradients:
    """The peak bytes of what a step makes beside its gradients, each counted out from when it was made.

    Gradients and activations are not all there at once: to subtract all gradients from the peak of the sum would hide
    as much of the activations as gradients come later.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.live = Recorded()
        self.peak = 0

    def __enter__(self) -> "BesideGradients":
        self.handles = [
            self.optimizer.register_step_pre_hook(self._before_update),
            self.optimizer.register_step_post_hook(self._after_update),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _before_update(self, *args: Any) -> None:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.gradients = {own.untyped_storage().data_ptr(): own.untyped_storage().nbytes() for own in gradients}
        self.births = {address: self.live.births[address] for address in self.gradients}

    def _after_update(self, *args: Any) -> None:
        """Here, while the gradients still are alive: what follows makes nothing any more."""
        totals = np.array(self.live.totals)
        for address, size in self.gradients.items():
            totals[self.births[address] :] -= size
        self.peak = int(totals.max())


class Recorded(LiveTensors):  # type: ignore[no-untyped-call]
    """LiveTensors with its total after every operation, and the operation that made what lies at an address."""

    def __init__(self) -> None:
        super().__init__()
        self.totals: list[int] = []
        self.births: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation."""
        known = set(self.known)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for address in self.known - known:
            self.births[address] = len(self.totals)
        self.totals.append(self.total)
        return result

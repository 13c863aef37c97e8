"""Faults, injected where they happen in earnest: in the layers of a model while it is used."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def allocate_too_much() -> None:
    """Lets torch's own allocator fail: four petabytes."""
    torch.empty(2**50)


class OutOfMemory:
    """Fails in the n-th call of a module (from 1; 0: in every one) among those for which `when` holds."""

    def __init__(self, module: nn.Module, at_call: int, when: Callable[[], bool] = lambda: True) -> None:
        self.at_call, self.when = at_call, when
        self.calls = 0
        self.hook = module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if self.when():
            self.calls += 1
            if self.at_call in (0, self.calls):
                allocate_too_much()


class NaNLayer:
    """Gives NaN while it is on, in passes that are differentiated; changes no weight."""

    def __init__(self, module: nn.Module) -> None:
        self.on = False
        self.hook = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * torch.nan if self.on and torch.is_grad_enabled() else output


def in_gradient() -> bool:
    return torch.is_grad_enabled()


def not_in_gradient() -> bool:
    return not torch.is_grad_enabled()

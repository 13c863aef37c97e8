"""torch.compile for the pass that is differentiated, and what it needs of a machine."""

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from remax.errors import UserError


def compile_layers(model: Any) -> None:
    """Lets the model's layers run compiled code when they are to be differentiated; it is made at their first run.

    Layers, not the whole model: all share one graph, and what is around them decides without tracing whether attention
    needs a mask. A rollout, which has a cache and no gradients, runs the layers as they are; saving notices nothing.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = _compiled_where_differentiated(layer.forward)


def _compiled_where_differentiated(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(forward)

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return chosen


def check_compiler(setting: str, *, instead: str) -> None:
    """Raises UserError if there is no C++ compiler, which torch.compile calls, on CUDA too, for what runs on the CPU.

    setting: what was set, as "--flag is value". instead: what to set on a machine without a compiler.
    """
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if sys.platform != "win32" and shutil.which(name) is None:
        raise UserError(
            f"{setting}: that compiles code, and there is no C++ compiler {name} on this machine; install one (or name "
            f"yours in the environment variable CXX), or set {instead}."
        )

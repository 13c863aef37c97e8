"""Rollouts of a policy whose weights the processes hold in parts: each gathers all of them for the time of a rollout.

Gathered layer by layer, every token would cost as much traffic as a whole pass, and every process would have to decode
as long as the slowest; gathered once, a rollout takes its traffic once, and processes decode on their own.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from remax.interfaces import Prompt, Rollout, RolloutEngine, Sampling


class GatheredEngine:
    """Another engine, on a model of its own that has weights only during a rollout."""

    def __init__(self, policy: Any, make: Callable[[Any], RolloutEngine], device: torch.device, *, half: bool) -> None:
        """policy: whole still, from which only the architecture is taken. make: makes the engine that decodes.

        half: whether linear layers get their weights in bfloat16, as autocast has them anyway.
        """
        base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        with torch.device("meta"):
            self._model: Any = type(base)(base.config)
        for name, buffer in base.named_buffers():
            owner, _, own_name = name.rpartition(".")
            self._model.get_submodule(owner).register_buffer(own_name, buffer.to(device, copy=True), persistent=False)
        self._model.requires_grad_(False).eval()
        self._empty = dict(self._model.state_dict())
        linear = [name for name, module in self._model.named_modules() if type(module) is nn.Linear]
        self._half = {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")} if half else set()
        self._device = device
        self._engine = make(self._model)

    def take(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes all weights, by the names that they are saved under; to be called by all processes."""
        own = {name: tensor.to(self._device, self._dtype(name, tensor)) for name, tensor in weights}
        self._model.load_state_dict(own, assign=True)
        self._model.tie_weights()

    def release(self) -> None:
        """Gives the memory of the weights back."""
        self._model.load_state_dict(self._empty, assign=True)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        num_samples: int,
        greedy: bool | Sequence[bool],
        seed: int,
        step: int,
    ) -> Rollout:
        """Returns completions, see RolloutEngine."""
        return self._engine.generate(prompts, sampling, num_samples=num_samples, greedy=greedy, seed=seed, step=step)

    def _dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        return torch.bfloat16 if name in self._half and tensor.dtype == torch.float32 else tensor.dtype

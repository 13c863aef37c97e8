"""A key-value cache with room for the tokens to come: a new token is written in place.

transformers' DynamicCache copies all keys and values for every new token, which was more than half of the time of a
rollout on a CPU.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, [rows, heads, tokens, head size], as views of larger tensors."""

    keys: Tensor
    values: Tensor
    room_for = 0
    """How many tokens may come after the prompt; set before the first one is read."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends the states of new tokens and returns those of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._key_room, self._value_room = (
                _extended(key_states, self.room_for),
                _extended(value_states, self.room_for),
            )
            length = 0
        else:
            length = self.keys.shape[-2]
        end = length + key_states.shape[-2]
        assert end <= self._key_room.shape[-2], "more tokens than there was room made for"
        self._key_room[:, :, length:end] = key_states
        self._value_room[:, :, length:end] = value_states
        self.keys, self.values = self._key_room[:, :, :end], self._value_room[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows given by index, which may repeat."""
        length = self.keys.shape[-2]
        self._key_room, self._value_room = self._key_room[indices], self._value_room[indices]
        self.keys, self.values = self._key_room[:, :, :length], self._value_room[:, :, :length]


def make_cache(config: Any, num_new_tokens: int) -> Any:
    """Returns an empty cache for a prompt and num_new_tokens tokens after it.

    Layers of another kind than full attention (sliding windows) keep transformers' own implementation.
    """
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = roomy = RoomyLayer()
            roomy.room_for = num_new_tokens
    return cache


def _extended(states: Tensor, num_tokens: int) -> Tensor:
    """Returns an uninitialised tensor like states with room for more tokens."""
    rows, heads, length, size = states.shape
    return torch.empty(rows, heads, length + num_tokens, size, dtype=states.dtype, device=states.device)

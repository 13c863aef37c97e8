"""A key-value cache with room for the tokens to come: a new token is written in place.

transformers' DynamicCache copies all keys and values for every new token, which was more than half of the time of a
rollout on a CPU.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, [rows, heads, tokens, head size], as views of larger tensors."""

    keys: Tensor
    values: Tensor
    room_for = 0
    """How many tokens may come after the prompt; set before the first one is read."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends the states of new tokens and returns those of all."""
        # Under autocast the rotary embedding makes float32 keys, which attention would cast again for every token.
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._key_room = _extended(key_states, self.room_for)
            self._value_room = _extended(value_states, self.room_for)
            end = key_states.shape[-2]
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
        room_left = self._key_room.shape[-2] - length
        # Only what is written is copied, and it is copied by index_select, several times faster than by indexing.
        self._key_room = _extended(self.keys.index_select(0, indices), room_left)
        self._value_room = _extended(self.values.index_select(0, indices), room_left)
        self.keys, self.values = self._key_room[:, :, :length], self._value_room[:, :, :length]


class FixedLayer(StaticLayer):  # type: ignore[misc]
    """Keys and values of one layer at fixed addresses, as views of larger tensors.

    Where the next token goes is a number on the device, so that a recorded step can be replayed. All layers share it,
    and whoever runs the steps advances it.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, num_columns: int, position: Tensor) -> None:
        """Starts with the given rows, which may repeat, of a prompt's keys and values; position is a scalar tensor."""
        super().__init__(max_cache_len=num_columns)
        self.cumulative_length = position
        self.dtype, self.device = keys.dtype, keys.device
        # Zeros: what is not written yet gets no weight in attention, and no weight times NaN would be NaN.
        self._key_room = keys.new_zeros(len(rows), keys.shape[1], num_columns, keys.shape[3])
        self._value_room = values.new_zeros(len(rows), values.shape[1], num_columns, values.shape[3])
        self._key_room[:, :, : keys.shape[2]] = keys[rows]
        self._value_room[:, :, : values.shape[2]] = values[rows]
        self.keys, self.values = self._key_room, self._value_room
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the states of one token and returns those of all columns that take part."""
        self.keys.index_copy_(2, self.cumulative_length.view(1), key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.cumulative_length.view(1), value_states)
        return self.keys, self.values

    def take_part(self, num_rows: int, num_columns: int) -> None:
        """Shows the first rows and columns, and no others."""
        self.max_cache_len = num_columns
        self.keys = self._key_room[:num_rows, :, :num_columns]
        self.values = self._value_room[:num_rows, :, :num_columns]

    def move(self, rows: Tensor) -> None:
        """Fills the first rows with the given ones, in place."""
        self._key_room[: len(rows)] = self._key_room[rows]
        self._value_room[: len(rows)] = self._value_room[rows]


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
    """Returns the states in a larger tensor with room for more tokens, uninitialised."""
    rows, heads, length, size = states.shape
    room = states.new_empty(rows, heads, length + num_tokens, size)
    room[:, :, :length] = states
    return room

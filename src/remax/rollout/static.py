"""Decoding at fixed addresses: a step whose launches are recorded once, as a CUDA graph, and replayed for every token.

From Python, the thousand small kernels of a step take longer to launch than to run. A recording cannot change a shape
or an address, so keys and values lie in tensors of full size, whatever changes from step to step is a number on the
device, and the rows and columns that take part shrink and grow in few stages, each with a recording of its own.

Legend: R rows (one per completion), N slots that take part in a step, of which the first S are sampled and the others
greedy, W columns of the longest prompt, T completion length, V vocabulary.
"""

import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from remax.interfaces import Sampling
from remax.rollout.cache import FixedLayer
from remax.rollout.draw import choose

Forward = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""From token_ids [N, 1], attention_mask [N, columns], position_ids [N, 1] and a cache to the logits [N, V]."""

_STEPS_BETWEEN_LOOKS = 8
"""How often the host looks who has finished: looking makes it wait, and the device then waits for the next launch."""
_MIN_COLUMNS = 64
"""A stage of columns has no fewer than this, and none of four stages fewer than a fourth of the completion length."""


class StaticBatch:
    """R rows that are decoded together, each behind its own copy of its prompt's keys and values."""

    def __init__(
        self,
        forward: Forward,
        cache: Any,
        num_padding: Tensor,
        prompt_of_row: Tensor,
        noise: Tensor,
        sampling: Sampling,
    ) -> None:
        """Takes the layers out of the prompts' cache, one by one.

        num_padding [P, 1] of the prompts, prompt_of_row [R], noise [S, T] of the sampled rows, which come first.
        """
        num_rows, device = len(prompt_of_row), prompt_of_row.device
        num_sampled, length = noise.shape
        self._forward, self._sampling = forward, sampling
        self._width = cache.layers[0].keys.shape[-2]
        room = _rounded_up(self._width + length, 8)
        self._columns_of_stage = max(_MIN_COLUMNS, _rounded_up(length, 32) // 4)
        self._sizes = stages(num_sampled, num_rows - num_sampled)
        self._size = self._sizes[0]
        self._columns = room
        self._taking_part: tuple[tuple[int, int], int] | None = None
        self._length = length
        self._steps = Recordings(_recorder(device))

        self._eos = torch.tensor(sampling.eos_token_ids, dtype=torch.long, device=device)
        # What a slot knows. A slot without a row is one of row R, which is nobody's.
        self._row = torch.arange(num_rows, device=device)
        self._token = torch.zeros_like(self._row)
        self._unfinished = torch.ones_like(self._row, dtype=torch.bool)
        self._num_padding = num_padding[prompt_of_row]
        self._attention_mask = (torch.arange(room, device=device) >= self._num_padding).long()
        # What the whole batch knows.
        self._t = torch.zeros(1, dtype=torch.long, device=device)
        self._position = torch.tensor(self._width, device=device)
        self._noise = torch.zeros(num_rows + 1, length, dtype=noise.dtype, device=device)
        self._noise[:num_sampled] = noise
        self._tokens = torch.zeros(num_rows + 1, length, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(self._tokens.shape, device=device)
        self._layers: list[FixedLayer] = []
        while cache.layers:
            prompt = cache.layers.pop(0)
            self._layers.append(FixedLayer(prompt.keys, prompt.values, prompt_of_row, room, self._position))
        self._cache = Cache(layers=self._layers)

    def decode(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the tokens and log-probabilities, [R, T] each, whatever follows an EOS.

        logits [R, V] that follow the prompts.
        """
        self._choose(logits)
        for t in range(1, self._length):
            if t % _STEPS_BETWEEN_LOOKS == 1 and not self._keep_unfinished():
                break
            num_stages = -(-t // self._columns_of_stage)
            self._take_part(_rounded_up(self._width, 8) + num_stages * self._columns_of_stage)
            self._steps.run((self._size, self._columns), self._step)
        return self._tokens[:-1], self._logprobs[:-1]

    def _step(self) -> None:
        """Reads the last token of every slot and chooses the next. Everything that changes is changed in place."""
        num_slots = sum(self._size)
        position_ids = (self._position - self._num_padding[:num_slots]).clamp(min=0)
        attention_mask = self._attention_mask[:num_slots, : self._columns]
        logits = self._forward(self._token[:num_slots, None], attention_mask, position_ids, self._cache)
        self._choose(logits)
        self._position += 1

    def _choose(self, logits: Tensor) -> None:
        row = self._row[: sum(self._size)]
        token, logprob = choose(logits, self._sampling, self._noise[row[: self._size[0]], self._t])
        self._tokens[row, self._t], self._logprobs[row, self._t] = token, logprob
        self._token[: len(row)] = token
        self._unfinished[: len(row)] &= (token[:, None] != self._eos).all(-1)
        self._t += 1

    def _take_part(self, columns: int) -> None:
        """Lets the first columns and the slots of the present size take part in the coming steps."""
        columns = min(columns, self._attention_mask.shape[1])
        if (self._size, columns) == self._taking_part:
            return
        self._taking_part, self._columns = (self._size, columns), columns
        for layer in self._layers:
            layer.take_part(sum(self._size), self._columns)

    def _keep_unfinished(self) -> bool:
        """Moves to the smallest size that holds all unfinished rows; returns whether there are any."""
        num_sampled, num_greedy = self._size
        unfinished = [
            slot for slot, goes_on in enumerate(self._unfinished[: num_sampled + num_greedy].tolist()) if goes_on
        ]
        sampled = [slot for slot in unfinished if slot < num_sampled]
        greedy = [slot for slot in unfinished if slot >= num_sampled]
        size = [s for s in self._sizes if s[0] >= len(sampled) and s[1] >= len(greedy)][-1]
        if size != self._size:
            nobody = [-1]
            self._move(sampled + nobody * (size[0] - len(sampled)) + greedy + nobody * (size[1] - len(greedy)))
            self._size = size
        return len(unfinished) > 0

    def _move(self, slots: list[int]) -> None:
        """Fills the first slots with what is in the given ones; -1 makes a slot nobody's."""
        index = torch.tensor(slots, device=self._row.device)
        is_nobody, index = index < 0, index.clamp(min=0)
        for values in (self._row, self._token, self._unfinished, self._num_padding, self._attention_mask):
            values[: len(index)] = values[index]
        self._row[: len(index)][is_nobody] = len(self._tokens) - 1
        self._unfinished[: len(index)][is_nobody] = False
        for layer in self._layers:
            layer.move(index)


class Recordings:
    """Runs steps: on CUDA each shape is run once to warm up, then recorded, then replayed; elsewhere simply run.

    A step must be a function without arguments and result, change tensors in place, and advance nothing before it has
    read everything: a step that is broken off can be run again.
    """

    def __init__(self, recorder: "_CudaRecorder | None") -> None:
        self._recorder = recorder
        self._replays: dict[Hashable, Callable[[], None] | None] = {}

    def run(self, shape: Hashable, step: Callable[[], None]) -> None:
        """Takes one step. shape: whatever of the step is not on the device."""
        if self._recorder is None:
            step()
        elif shape not in self._replays:
            self._replays[shape] = None
            if not self._recorder.warm_up(step):
                self._recorder = None
        else:
            replay = self._replays[shape] or self._recorder.record(step)
            self._replays[shape] = replay
            if replay is None:
                self._recorder = None
            (replay or step)()


class _CudaRecorder:
    """What of it only runs on CUDA. All recordings share one pool of memory, for only one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _recording_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], None]) -> bool:
        """Takes a step, so that libraries have loaded what they need; returns whether it can be recorded."""
        mode = torch.cuda.get_sync_debug_mode()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        records = True
        try:
            torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(self._stream):
                step()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            records = False
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(self._stream)
        if not records:
            warnings.warn(
                "This model waits for the device within a step: decoding goes on without CUDA graphs.", stacklevel=2
            )
            step()
        return records

    def record(self, step: Callable[[], None]) -> Callable[[], None] | None:
        """Returns the step as one launch, without taking it; None if it cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        # A cast that autocast remembers from outside would not be made again, nor belong to the recording's memory.
        autocast = torch.autocast(
            "cuda",
            dtype=torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        current = torch.cuda.current_stream()
        try:
            with autocast, torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                step()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # Leaving a broken recording raises before it would do that itself.
            torch.cuda.synchronize()
            cause = error.__context__ or error
            if isinstance(cause, torch.cuda.OutOfMemoryError):
                raise cause from None
            reason = str(cause).splitlines()[0]
            warnings.warn(f"Decoding goes on without CUDA graphs, for recording one failed: {reason}", stacklevel=2)
            return None
        return graph.replay


@functools.cache
def _recording_stream(device: torch.device) -> Any:
    """Returns one stream for all recordings: each stream has blocks of memory of its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _recorder(device: torch.device) -> _CudaRecorder | None:
    return _CudaRecorder(device) if device.type == "cuda" else None


def stages(num_sampled: int, num_greedy: int) -> list[tuple[int, int]]:
    """Returns the numbers of sampled and greedy slots that a batch can have: all, 3/4, 1/2, 3/8, 1/4, ... of them."""
    sizes, share = [(num_sampled, num_greedy)], 1.0
    while max(sizes[-1]) > 1:
        for part in (0.75 * share, 0.5 * share):
            size = (_ceil(part * num_sampled), _ceil(part * num_greedy))
            if size != sizes[-1]:
                sizes.append(size)
        share /= 2
    return sizes


def _ceil(number: float) -> int:
    return int(-(-number // 1))


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit

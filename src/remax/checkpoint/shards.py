"""Weights and optimiser states that processes hold in parts: written in parts, read by any number of processes.

Each process writes a file of safetensors: with FSDP2 its parts and their places in the whole, with DeepSpeed the whole
tensors that fall to it. torch.distributed.checkpoint puts them together again, for others or for one process alone.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from remax import zero
from remax.sharding import whole

FOLDER = "shards"


# Writing --------------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, learners: Mapping[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """Writes this process' parts of weights and optimiser states.

    Returns by learner and weight's number what an optimiser holds beside tensors of its weights' shapes, such as counts
    of steps; whole. To be called by all processes.

    Raises:
        OSError: it could not be written.
    """
    tensors: dict[str, Tensor] = {}
    others = {}
    for name, learner in learners.items():
        share = _dealt if zero.is_engine(learner.network) else _cut
        own, others[name] = share(name, learner)
        tensors |= own
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise OSError(_reason(error)) from error
    return others


def _reason(error: CheckpointException) -> str:
    return next((str(failure[0]) for failure in error.failures.values()), str(error))


def _cut(name: str, learner: Any) -> tuple[dict[str, Tensor], dict[int, dict[str, Any]]]:
    """Returns this process' parts of all tensors, and the others."""
    tensors = {_weight(name, key): parameter.detach() for key, parameter in _trainable(learner)}
    states, others = learner.optimizer.state_dict()["state"], defaultdict[int, dict[str, Any]](dict)
    for number, parameter in enumerate(_parameters(learner)):
        for key, value in states.get(number, {}).items():
            if _is_like(parameter, value):
                tensors[_state(name, number, key)] = value
            else:
                others[number][key] = whole(value.detach()).cpu() if isinstance(value, Tensor) else value
    return tensors, dict(others)


def _dealt(name: str, learner: Any) -> tuple[dict[str, Tensor], dict[int, dict[str, Any]]]:
    """Returns all of the tensors that fall to this process, and the others.

    DeepSpeed's parts end anywhere in a tensor. So every tensor is put together, one after the other, and goes to one
    process' memory in the end.
    """
    engine, accelerator = learner.network, learner.accelerator
    names = {parameter: key for key, parameter in _trainable(learner)}
    trained = zero.trained(engine)
    owners = deal([zero.shape_of(weight).numel() for weight, _ in trained], accelerator.num_processes)
    tensors, others = {}, defaultdict[int, dict[str, Any]](dict)
    for number, (weight, vector) in enumerate(trained):
        is_own = owners[number] == accelerator.process_index
        values = whole(weight)
        if is_own:
            tensors[_weight(name, names[weight])] = values.cpu()
        for key, value in zero.state_of(engine, weight, vector):
            if not _is_like(weight, value):
                # A clone: weights of one vector share their count, which others would then count up for each of them.
                others[number][key] = value.cpu().clone() if isinstance(value, Tensor) else value
            elif is_own:
                tensors[_state(name, number, key)] = value.cpu()
    return tensors, dict(others)


def deal(sizes: Sequence[int], num_processes: int) -> list[int]:
    """Returns for every item the process that gets it, such that all get about the same: the largest go first."""
    loads, owners = [0] * num_processes, [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        owners[item] = loads.index(min(loads))
        loads[owners[item]] += sizes[item]
    return owners


# Reading --------------------------------------------------------------------------------------------------------------


def read_shards(folder: Path, learners: Mapping[str, Any], others: Mapping[str, Mapping[int, Any]]) -> None:
    """Puts weights and optimiser states back, however many processes wrote them; to be called by all processes.

    others: what `write_shards` returned.

    Raises:
        KeyError, ValueError: the parts are those of other networks.
    """
    reader = _Reader(folder)
    saved = reader.read_metadata().state_dict_metadata
    keys = {name: _state_keys(name, saved) for name in learners}
    shapes: dict[str, torch.Size] = {}
    for name, learner in learners.items():
        shapes |= {_weight(name, key): zero.shape_of(parameter) for key, parameter in _trainable(learner)}
        for number, parameter in enumerate(_parameters(learner)):
            shapes |= {_state(name, number, key): zero.shape_of(parameter) for key in keys[name][number]}
    if wrong := shapes.keys() ^ saved.keys():
        raise KeyError(min(wrong))
    if wrong := {key for key, shape in shapes.items() if shape != reader.about(key).size}:
        raise ValueError(f"{min(wrong)} has another shape")
    if wrong := {key for key in shapes if not _is_covered(reader.about(key))}:
        raise ValueError(f"{min(wrong)} lacks a part")
    for name, learner in learners.items():
        read = _read_whole if zero.is_engine(learner.network) else _read_cut
        read(name, learner, reader, keys[name], others[name])


def _is_covered(about: TensorStorageMetadata) -> bool:
    """Whether the parts of a tensor, which do not overlap, are all of it."""
    return sum(chunk.sizes.numel() for chunk in about.chunks) == about.size.numel()


def _read_cut(
    name: str, learner: Any, reader: "_Reader", keys: Mapping[int, Sequence[str]], others: Mapping[int, Any]
) -> None:
    """Reads this process' parts of all tensors."""
    tensors = {_weight(name, key): parameter.detach() for key, parameter in _trainable(learner)}
    states: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(_parameters(learner)):
        states[number] = dict(others.get(number, {}))
        for key in keys[number]:
            dtype = reader.about(_state(name, number, key)).properties.dtype
            part = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            states[number][key] = tensors[_state(name, number, key)] = part
    reader.fill(tensors)
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": states, "param_groups": groups})


def _read_whole(
    name: str, learner: Any, reader: "_Reader", keys: Mapping[int, Sequence[str]], others: Mapping[int, Any]
) -> None:
    """Reads all tensors, one after the other, of which DeepSpeed keeps this process' parts."""

    def states_of(number: int) -> Iterator[tuple[str, Any]]:
        tensors = ((key, reader.whole(_state(name, number, key))) for key in keys[number])
        return chain(tensors, others.get(number, {}).items())

    names = {parameter: key for key, parameter in _trainable(learner)}
    zero.put_weights(learner.network, lambda parameter: reader.whole(_weight(name, names[parameter])))
    zero.put_states(learner.network, states_of)


class _Reader(HuggingFaceStorageReader):
    """Reads parts of several processes; looks only once at what there is."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._metadata = super().read_metadata()

    def read_metadata(self) -> Metadata:
        return self._metadata

    def about(self, key: str) -> TensorStorageMetadata:
        """Returns shape and type of a tensor."""
        about = self._metadata.state_dict_metadata[key]
        assert isinstance(about, TensorStorageMetadata)
        return about

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Reads this process' parts of tensors into them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That one process alone reads it is as it should be.
            try:
                load(tensors, storage_reader=self)
            except CheckpointException as error:  # which is no Exception
                raise OSError(_reason(error)) from error

    def whole(self, key: str) -> Tensor:
        """Returns all of a tensor."""
        tensor = torch.empty(self.about(key).size, dtype=self.about(key).properties.dtype)
        self.fill({key: tensor})
        return tensor


def part_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Returns this process' part of a whole tensor, cut as a parameter is cut."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


# Names ----------------------------------------------------------------------------------------------------------------


def _trainable(learner: Any) -> list[tuple[str, Tensor]]:
    return [(key, parameter) for key, parameter in learner.module.named_parameters() if parameter.requires_grad]


def _parameters(learner: Any) -> list[Tensor]:
    """Returns the weights that are trained in the order of their numbers."""
    if zero.is_engine(learner.network):
        return [weight for weight, _ in zero.trained(learner.network)]
    return [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]


def _is_like(parameter: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == zero.shape_of(parameter) and value.dim() > 0


def _weight(name: str, key: str) -> str:
    return f"{name}/weights/{key}"


def _state(name: str, number: int, key: str) -> str:
    return f"{name}/optimizer/{number}/{key}"


def _state_keys(name: str, saved: Iterable[str]) -> dict[int, list[str]]:
    """Returns by a weight's number what of its optimiser's state is saved."""
    prefix, keys = f"{name}/optimizer/", defaultdict[int, list[str]](list)
    for full in saved:
        if full.startswith(prefix):
            number, _, key = full.removeprefix(prefix).partition("/")
            keys[int(number)].append(key)
    return keys

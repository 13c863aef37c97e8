"""Weights and optimiser states that processes hold in parts: written in parts, read by any number of processes.

Each process writes a file of safetensors with its parts and their places in the whole; torch.distributed.checkpoint
puts them together again for another number of processes, or for one alone.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from remax.sharding import whole

FOLDER = "shards"


def write_shards(folder: Path, learners: Mapping[str, Any]) -> None:
    """Writes this process' parts of weights and optimiser states; to be called by all processes.

    Raises:
        OSError: it could not be written.
    """
    tensors = dict(_weights(learners))
    for name, number, parameter, state in _states(learners):
        tensors |= {_key(name, number, key): t for key, t in state.items() if _is_cut_like(parameter, t)}
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        reasons = [str(failure[0]) for failure in error.failures.values()]
        raise OSError(reasons[0] if reasons else str(error)) from error


def other_states(learner: Any) -> dict[int, dict[str, Any]]:
    """Returns what an optimiser holds beside tensors of its parameters' shapes, such as counts of steps; whole.

    To be called by all processes.
    """
    others: dict[int, dict[str, Any]] = {}
    for _, number, parameter, state in _states({"": learner}):
        kept = {key: value for key, value in state.items() if not _is_cut_like(parameter, value)}
        others[number] = {key: whole(v.detach()).cpu() if isinstance(v, Tensor) else v for key, v in kept.items()}
    return others


def read_shards(folder: Path, learners: Mapping[str, Any], others: Mapping[str, Mapping[int, Any]]) -> None:
    """Puts weights and optimiser states back, however many processes wrote them; to be called by all processes.

    others: by learner, what `other_states` returned.

    Raises:
        KeyError, ValueError: the parts are those of other networks.
    """
    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    tensors = dict(_weights(learners))
    states: dict[str, dict[int, dict[str, Any]]] = {}
    for name, learner in learners.items():
        states[name] = {number: dict(state) for number, state in others[name].items()}
        for number, parameter in enumerate(_parameters(learner)):
            prefix = _key(name, number, "")
            for key in [key for key in saved if key.startswith(prefix)]:
                about = saved[key]
                assert isinstance(about, TensorStorageMetadata)
                tensors[key] = torch.zeros_like(parameter, dtype=about.properties.dtype, requires_grad=False)
                states[name].setdefault(number, {})[key.removeprefix(prefix)] = tensors[key]
    if wrong := tensors.keys() ^ saved.keys():
        raise KeyError(min(wrong))
    if wrong := {key for key, tensor in tensors.items() if tensor.shape != saved[key].size}:  # type: ignore[union-attr]
        raise ValueError(f"{min(wrong)} has another shape")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That one process alone reads it is as it should be.
        load(tensors, storage_reader=reader)
    for name, learner in learners.items():
        groups = learner.optimizer.state_dict()["param_groups"]
        learner.optimizer.load_state_dict({"state": states[name], "param_groups": groups})


def part_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Returns this process' part of a whole tensor, cut as a parameter is cut."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def _weights(learners: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, learner in learners.items():
        for key, parameter in learner.module.named_parameters():
            if parameter.requires_grad:
                yield f"{name}/weights/{key}", parameter.detach()


def _states(learners: Mapping[str, Any]) -> Iterator[tuple[str, int, Tensor, Mapping[str, Any]]]:
    """Yields the optimiser's state of every parameter, with the learner's name and the parameter's number."""
    for name, learner in learners.items():
        states = learner.optimizer.state_dict()["state"]
        for number, parameter in enumerate(_parameters(learner)):
            yield name, number, parameter, states.get(number, {})


def _parameters(learner: Any) -> list[Tensor]:
    return [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]


def _is_cut_like(parameter: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0


def _key(name: str, number: int, key: str) -> str:
    return f"{name}/optimizer/{number}/{key}"

"""What is saved of a ReMaxTrainer, and how it is put back.

    policy.safetensors       the trainable weights (of LoRA: the adapter)
    value_model.safetensors  likewise, with PPO
    shards/                  instead of these and of the optimisers, where processes hold parts of them (shards.py)
    training.pt              optimisers, position in their schedules, the method's own state, random generators; holds
                             nothing but tensors and plain values, and is read with weights_only=True
    state.json               step, counts, best evaluation, length of every file of lines, settings, fingerprints

The data order and the sampling noise are functions of the seed and the step, so the step is all of their state.
"""

import functools
import hashlib
import json
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from remax import sharding, zero
from remax.checkpoint import shards
from remax.checkpoint.files import FACTS, write_json
from remax.checkpoint.shards import FOLDER as SHARDS
from remax.checkpoint.shards import part_like
from remax.errors import UserError
from remax.interfaces import Prompt
from remax.models import adapter_is_new, short_reason
from remax.sharding import whole

TRAINING = "training.pt"
VALUES_PER_TENSOR = 64
"""How many values of every weight a fingerprint looks at."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a trainer at the end of a step."""

    weights: Mapping[str, Mapping[str, Tensor]]
    """By network and parameter."""
    training: Mapping[str, Any]
    facts: Mapping[str, Any]
    shards: Path | None = None
    """Where the parts of the processes are, which hold weights and optimiser states then."""

    def write(self, folder: Path) -> None:
        """Writes its files."""
        if self.shards is not None:
            self.shards.rename(folder / SHARDS)
        for name, tensors in self.weights.items():
            save_file(dict(tensors), folder / f"{name}.safetensors")
        with (folder / TRAINING).open("wb") as file:
            torch.save(self.training, file)
        write_json(folder / FACTS, self.facts)


def capture(
    trainer: Any, facts: Mapping[str, Any], *, copies: bool, shards: Path | None = None, others: Any = None
) -> Snapshot:
    """Returns the state of a trainer between two steps.

    copies: in the host's memory, so that training may go on while it is written; else it has to be written first.
    shards: where weights and optimiser states have been written in parts; others: what `write_shards` returned then.
    """
    keep = _copied if copies else _detached
    networks = _networks(trainer) if shards is None else {}
    return Snapshot(
        {name: {key: keep(p) for key, p in _trainable(network)} for name, network in networks.items()},
        {
            "learners": {
                name: {
                    "optimizer": _mapped(learner.optimizer.state_dict()["state"], keep) if not others else others[name],
                    "num_steps": learner.scheduler.last_epoch,
                }
                for name, learner in _learners(trainer).items()
            },
            "parts": _mapped({name: part.state_dict() for name, part in _stateful(trainer).items()}, keep),
            "generators": _generators(),
        },
        {
            **facts,
            "step": trainer.state.global_step,
            "epoch": trainer.state.epoch,
            "max_steps": trainer.max_steps,
            "num_tokens": trainer.num_tokens,
            "best_metric": trainer.state.best_metric,
            "best_step": trainer.state.best_global_step,
        },
        shards,
    )


def is_sharded(trainer: Any) -> bool:
    """Whether this process holds only parts of the weights that are trained, or of the optimiser's states."""
    by_zero = any(zero.is_engine(learner.network) for learner in _learners(trainer).values())
    return by_zero or any(sharding.is_sharded(network) for network in _networks(trainer).values())


def write_shards(trainer: Any, folder: Path) -> dict[str, Any]:
    """Writes this process' parts of weights and optimiser states, and returns by learner what no part holds.

    To be called by all processes.

    Raises:
        OSError: they could not be written.
    """
    return shards.write_shards(folder, _learners(trainer))


def num_bytes(trainer: Any) -> int:
    """Returns how much memory a copied snapshot takes, at most."""
    weights = sum(p.nbytes for network in _networks(trainer).values() for _, p in _trainable(network))
    states = [learner.optimizer.state_dict()["state"] for learner in _learners(trainer).values()]
    sizes: list[int] = []
    _mapped(states, lambda tensor: sizes.append(tensor.nbytes))
    return weights + sum(sizes)


def restore(trainer: Any, checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Puts a trainer that has not begun into the state of a checkpoint, but for the random generators.

    Raises:
        UserError: the checkpoint is of another model or method.
    """
    learners, in_parts = _learners(trainer), (checkpoint / SHARDS).is_dir()
    networks = {} if in_parts else _networks(trainer)
    for name, network in networks.items():
        _restore_weights(network, learners[name], checkpoint / f"{name}.safetensors")
    training = _load(checkpoint)
    with _reading(checkpoint):
        optimizers = {name: training["learners"][name]["optimizer"] for name in learners}
        if in_parts:
            shards.read_shards(checkpoint / SHARDS, learners, optimizers)
        for name, learner in learners.items():
            if not in_parts:
                _restore_optimizer(learner, optimizers[name])
            _restore_schedule(learner, training["learners"][name]["num_steps"])
        for name, part in _stateful(trainer).items():
            if name in training["parts"]:
                part.load_state_dict(training["parts"][name])
        trainer.num_tokens = facts["num_tokens"]
        state = trainer.state
        state.global_step, state.epoch = facts["step"], facts["epoch"]
        state.best_metric, state.best_global_step = facts["best_metric"], facts["best_step"]


def restore_generators(checkpoint: Path) -> None:
    """Puts the random generators of Python, numpy and torch into the state of a checkpoint."""
    saved = _load(checkpoint)
    with _reading(checkpoint):
        generators = saved["generators"]
        random.setstate(generators["python"])
        name, keys, *rest = generators["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(generators["torch"])
    # On as many GPUs as both machines have; no number of ours comes from these.
    for index, state in zip(range(torch.cuda.device_count()), generators["cuda"], strict=False):
        torch.cuda.set_rng_state(state, index)


def fingerprints(trainer: Any) -> dict[str, str]:
    """Returns what tells other models and prompts from those of the run, of a trainer that has not begun."""
    parts = trainer.parts
    prints = {"the model": fingerprint(parts.policy, without="lora_" if adapter_is_new(parts.policy) else None)}
    prints |= {"the prompts": _digest_of_prompts(parts.prompts)}
    if parts.eval_prompts:
        prints["the evaluation prompts"] = _digest_of_prompts(parts.eval_prompts)
    for function in parts.reward_functions:
        if isinstance(model := getattr(function, "model", None), nn.Module):
            prints[f"the reward model {function.name}"] = fingerprint(model)
        if digest := getattr(function, "source_digest", ""):
            prints[f"the file of the reward {function.name}"] = digest
    return prints


def fingerprint(network: nn.Module, without: str | None = None) -> str:
    """Returns a digest of names, shapes and a few values of all weights but those whose names have a part."""
    digest = hashlib.sha256()
    for name, parameter in network.named_parameters():
        if without is None or without not in name:
            values = whole(parameter).flatten()
            some = values[:: max(1, len(values) // VALUES_PER_TENSOR)].float().cpu()
            digest.update(f"{name} {tuple(zero.shape_of(parameter))}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def digest_of_values(values: Iterable[Any]) -> str:
    """Returns a digest of plain values, nested or not."""
    digest = hashlib.sha256()
    for value in values:
        # What JSON does not know may name its address in memory, which is another one every time.
        digest.update(json.dumps(value, default=lambda unknown: type(unknown).__name__).encode())
    return digest.hexdigest()[:16]


def _networks(trainer: Any) -> dict[str, nn.Module]:
    critic = getattr(trainer.method, "critic", None)
    return {"policy": trainer.parts.policy} | ({} if critic is None else {"value_model": critic.module})


def _learners(trainer: Any) -> dict[str, Any]:
    critic = getattr(trainer.method, "critic", None)
    return {"policy": trainer.policy} | ({} if critic is None else {"value_model": critic})


def _stateful(trainer: Any) -> dict[str, Any]:
    """What remembers something from step to step beside weights and optimisers."""
    parts = {"method": trainer.method, "guards": getattr(trainer, "guards", None)}
    return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}


def _trainable(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p.detach().contiguous()) for name, p in network.named_parameters() if p.requires_grad]


def _restore_weights(network: nn.Module, learner: Any, file: Path) -> None:
    own = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with _reading(file.parent):
        saved = load_file(file) if file.exists() else {}
    shapes = {name: zero.shape_of(parameter) for name, parameter in own.items()}
    if shapes != {name: tensor.shape for name, tensor in saved.items()}:
        raise UserError(
            f"--resume names {file.parent}: its {file.stem} has other weights than the one that is trained here; "
            "resume with the --model and the settings of that run."
        )
    if zero.is_engine(learner.network):
        names: dict[Tensor, str] = {parameter: name for name, parameter in own.items()}
        zero.put_weights(learner.network, lambda parameter: saved[names[parameter]])
        return
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(part_like(parameter, saved[name]))


def _restore_optimizer(learner: Any, saved: Mapping[int, Any]) -> None:
    """Puts back what the optimiser has learned. Rates and betas are those of the settings, which may be changed."""
    if zero.is_engine(learner.network):
        zero.put_states(learner.network, lambda number: saved.get(number, {}).items())
        return
    groups = learner.optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]
    states = {number: _mapped(own, functools.partial(part_like, parameters[number])) for number, own in saved.items()}
    learner.optimizer.load_state_dict({"state": states, "param_groups": groups})


def _restore_schedule(learner: Any, num_steps: int) -> None:
    if num_steps:
        # Every schedule is a function of the step alone. _step_count only keeps torch from a warning.
        vars(learner.scheduler).update(last_epoch=num_steps - 1, _step_count=num_steps + 1)
        learner.scheduler.step()


def _load(checkpoint: Path) -> dict[str, Any]:
    """Returns training.pt. Nothing in it can run code; torchao's states of one byte are known once it is imported."""
    with _reading(checkpoint):
        state: dict[str, Any] = torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True)
    return state


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Says in one sentence what is wrong with files whose checksums are right: somebody made them up."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--resume names {checkpoint}: it could not be read just now ({short_reason(error)}); try again, or set "
            "another one."
        ) from error
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError | torch.OutOfMemoryError):
            raise
        raise UserError(
            f"--resume names {checkpoint}: it cannot be read ({type(error).__name__}), so it is none that remax wrote; "
            "set another one."
        ) from error


def _generators() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(name), np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _mapped(value: Any, keep: Callable[[Tensor], Any]) -> Any:
    """Returns nested dictionaries and lists with every tensor replaced; the containers are always new."""
    if isinstance(value, Tensor):
        return keep(value)
    if isinstance(value, dict):
        return {key: _mapped(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, keep) for item in value)
    return value


def _detached(tensor: Tensor) -> Tensor:
    return tensor if is_traceable_wrapper_subclass(tensor) else tensor.detach().cpu()


def _copied(tensor: Tensor) -> Tensor:
    if is_traceable_wrapper_subclass(tensor):
        # torchao's states of one byte: their own .to() would share memory with the original.
        names, context = tensor.__tensor_flatten__()
        copied = {name: _copied(getattr(tensor, name)) for name in names}
        whole: Tensor = type(tensor).__tensor_unflatten__(copied, context, tensor.shape, tensor.stride())
        return whole
    return tensor.detach().to("cpu", copy=True)


def _digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    return digest_of_values([prompt.index, prompt.token_ids, prompt.columns] for prompt in prompts)

"""What a skipped update leaves behind, so that it can be taken apart later.

OUT/dumps/step-000007/
    state.json               cause, step, settings, and what is text or a list: prompts and completions
    samples.safetensors      of the update's samples: log-probabilities, rewards, advantages, reference
    policy.safetensors       the trainable weights as they were before the update (of LoRA: the adapter)
    value_model.safetensors  likewise, if the value model's update was skipped
    manifest.json            sizes and checksums
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from remax.checkpoint.files import FACTS, problem_of, read_facts, write_checkpoint, write_json
from remax.errors import UserError
from remax.guards.finite import Skipped
from remax.metrics import StepRecord

FOLDER = "dumps"
MAX_DUMPS = 3
"""A run keeps no more: each has the size of the weights, and the first ones show where it begins."""
NUMBERS = "numbers"
"""Stands for a list of whole numbers from 0 among the kinds."""
KINDS: dict[str, tuple[Any, ...]] = {
    "step": (int,),
    "seed": (int,),
    "cause": (str,),
    "network": (str,),
    "micro_batch_tokens": (int,),
    "config": (dict,),
    "sampling": (dict,),
    "samples": (list,),
}
KINDS_OF_CONFIG = {"model": (str, type(None)), "reward_model": (str, type(None))}
KINDS_OF_SAMPLING: dict[str, tuple[Any, ...]] = {
    "max_completion_length": (int,),
    "eos_token_ids": (NUMBERS,),
    "temperature": (float, int),
    "top_p": (float, int),
    "top_k": (int,),
}
KINDS_OF_SAMPLE: dict[str, tuple[Any, ...]] = {
    "row": (int,),
    "prompt_index": (int,),
    "sample_index": (int,),
    "prompt": (str, list),
    "prompt_ids": (NUMBERS,),
    "completion": (str,),
    "completion_ids": (NUMBERS,),
    "truncated": (bool,),
}


@dataclass(frozen=True)
class Dump:
    """A skipped update as it was read."""

    path: Path
    facts: Mapping[str, Any]
    samples: Mapping[str, Tensor]

    def weights(self, name: str) -> dict[str, Tensor]:
        """Returns the weights of a network by parameter.

        Raises:
            UserError: the dump has none.
        """
        return _load(self.path, f"{name}.safetensors")


def write_dump(
    folder: Path,
    record: StepRecord,
    skipped: Skipped,
    weights: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
) -> Path | None:
    """Writes a dump into a run's folder and returns where; None if the run has as many as it keeps.

    weights: of the networks, by the name of their file and by parameter.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    path = folder / FOLDER / f"step-{record.step:06d}"
    others = [other for other in (folder / FOLDER).glob("step-*") if other != path]
    if len(others) >= MAX_DUMPS:
        return None
    shutil.rmtree(path, ignore_errors=True)  # Of a run that went back to a checkpoint before this step.
    samples = [record.rollout.samples[row] for row in skipped.rows]
    texts = [
        {
            "row": row,
            "prompt_index": sample.prompt.index,
            "sample_index": sample.sample_index,
            "prompt": sample.prompt.content,
            "prompt_ids": sample.prompt.token_ids,
            "completion": sample.text,
            "completion_ids": sample.token_ids,
            "truncated": sample.truncated,
        }
        for row, sample in zip(skipped.rows, samples, strict=True)
    ]
    about = {
        "step": record.step,
        "cause": skipped.cause,
        "network": skipped.network,
        "first_update": skipped.first,
        "learning_rate": record.learning_rate,
    }

    def fill(partial: Path) -> None:
        save_file(_tensors(record, skipped), partial / "samples.safetensors")
        for name, own in weights.items():
            save_file({key: tensor.cpu() for key, tensor in own.items()}, partial / f"{name}.safetensors")
        write_json(partial / FACTS, {**about, **facts, "samples": texts})

    write_checkpoint(path, fill)
    return path


def _tensors(record: StepRecord, skipped: Skipped) -> dict[str, Tensor]:
    """Returns the numbers of the update's samples; those of tokens one after the other, row by row."""
    rows = list(skipped.rows)
    logprobs = [value for row in rows for value in record.rollout.samples[row].logprobs]
    tensors = {
        "logprobs": torch.tensor(logprobs),
        "rewards": record.rewards.sampled[rows],
        "advantages": record.advantages[rows],
    }
    if record.ref_logprobs is not None:
        tensors["ref_logprobs"] = torch.cat([record.ref_logprobs[row] for row in rows])
    tensors |= {f"experience/{name}": value for name, value in skipped.tensors.items()}
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def read_dump(path: str) -> Dump:
    """Returns a dump, having made sure that nothing in it has changed.

    Raises:
        UserError: it is none, or not as it was written.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"--dump is {path}: there is no such folder; set one in the dumps of a run.")
    problem = problem_of(folder)
    if problem is None and not (folder / "samples.safetensors").is_file():
        problem = "samples.safetensors is missing"
    if problem is not None:
        raise UserError(f"--dump is {path}: {problem}, so it is no dump that can be replayed; set another one.")
    try:
        facts = read_facts(folder)
    except (ValueError, RecursionError):
        facts = {}
    tensors = _load(folder, "samples.safetensors")
    if not (_are_facts(facts) and _are_of(facts["samples"], tensors)):
        raise UserError(f"--dump is {path}: that is something else than a dump; set a folder in the dumps of a run.")
    return Dump(folder, facts, tensors)


def _load(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError):
        raise UserError(f"--dump is {folder}: its {name} is missing or cannot be read; set another one.") from None


def _are_facts(facts: Any) -> bool:
    """Whether state.json has what a replay reads, of the right kinds: its checksum says not who wrote it."""
    return (
        _has(facts, KINDS)
        and _has({"model": None, "reward_model": None, **facts["config"]}, KINDS_OF_CONFIG)
        and _has(facts["sampling"], KINDS_OF_SAMPLING)
        and facts["sampling"].keys() == KINDS_OF_SAMPLING.keys()
        and len(facts["samples"]) > 0
        and all(_has(s, KINDS_OF_SAMPLE) and s["prompt_ids"] and s["completion_ids"] for s in facts["samples"])
    )


def _has(content: Any, kinds: Mapping[str, tuple[Any, ...]]) -> bool:
    return isinstance(content, dict) and all(
        name in content and (type(content[name]) in known or (NUMBERS in known and _are_numbers(content[name])))
        for name, known in kinds.items()
    )


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**31 for item in value)


def _are_of(samples: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors have the shapes of these samples."""
    lengths = [len(sample["completion_ids"]) for sample in samples]
    shapes = {"logprobs": (sum(lengths),), "rewards": (len(samples),), "advantages": (len(samples),)}
    if "ref_logprobs" in tensors:
        shapes["ref_logprobs"] = (sum(lengths),)
    padded = [tensor for name, tensor in tensors.items() if name.startswith("experience/")]
    return (
        all(name in tensors and tuple(tensors[name].shape) == shape for name, shape in shapes.items())
        and all(t.dim() == 2 and len(t) == len(samples) and t.shape[1] >= max(lengths) for t in padded)
        and all(
            t.dtype == torch.bool if name == "experience/mask" else t.is_floating_point() for name, t in tensors.items()
        )
    )

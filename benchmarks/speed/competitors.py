"""Who competes: our methods, TRL's trainers and the authors' schedule, each under its own training loop."""

import tempfile
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import trl.trainer.utils
from benchmarks.speed.authors import train as train_like_authors
from benchmarks.speed.cases import BETA, Setting
from benchmarks.speed.process import StepCallback, Steps
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from remax import ReMaxConfig, ReMaxTrainer
from remax.progress import PlainLines

ENDLESS = 100_000
"""Steps of the schedules of learning rates; nobody takes that many."""
NO_KL = {"kl_mode": "none"}
OURS: dict[str, dict[str, Any]] = {
    "remax": {},
    "reinforce": {"method": "reinforce"},
    "remax, no KL": NO_KL,
    "reinforce, no KL": {"method": "reinforce", **NO_KL},
}
TRL = {"trl rloo": (RLOOConfig, RLOOTrainer), "trl grpo": (GRPOConfig, GRPOTrainer)}
AUTHORS = "authors' schedule"


def our_settings(setting: Setting, **method: Any) -> dict[str, Any]:
    """Returns the settings of one of our trainers that are not the defaults, or matter here."""
    case = setting.case
    return {
        "batch_size": case.num_prompts,
        "max_completion_length": case.max_completion_length,
        "beta": BETA,
        "micro_batch_tokens": case.micro_batch_tokens,
        "max_steps": ENDLESS,
        "log_completions": False,
        "logging_steps": ENDLESS,
        "report_to": ["none"],
        **method,
    }


def trl_settings(setting: Setting) -> dict[str, Any]:
    """Returns the settings of TRL's trainers: its defaults but for what follows.

    Float32 without gradient checkpointing, as ours; all completions from one call, one update, micro-batches
    of as many tokens as ours; no logs, no saving.
    """
    case = setting.case
    return {
        "per_device_train_batch_size": 2 * case.num_prompts // case.micro_batches,
        "gradient_accumulation_steps": case.micro_batches,
        "num_generations": 2,
        "num_iterations": 1,
        "max_completion_length": case.max_completion_length,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "beta": BETA,
        "learning_rate": 1e-6,
        "max_steps": ENDLESS,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "shuffle_dataset": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }


def settings(name: str, setting: Setting) -> dict[str, Any]:
    """Returns the settings of a competitor."""
    if name in OURS:
        return our_settings(setting, **OURS[name])
    if name in TRL:
        return trl_settings(setting)
    return {"beta": BETA, "batch_size": setting.case.num_prompts, "gamma": 0.99, "kl": "one_step"}


def our_trainer(
    setting: Setting,
    reward: Any,
    *,
    callbacks: Any = None,
    reward_processing_classes: Any = None,
    **method: Any,
) -> ReMaxTrainer:
    """Returns a trainer of ours whose completions have the planned lengths."""
    trainer = ReMaxTrainer(
        str(setting.folder),
        reward,
        ReMaxConfig(output_dir=tempfile.mkdtemp(), **our_settings(setting, **method)),
        train_dataset=Dataset.from_dict({"prompt": setting.prompts()}),
        processing_class=setting.tokenizer(),
        reward_processing_classes=reward_processing_classes,
        callbacks=callbacks,
        view=PlainLines(),
    )
    setting.plan().attach(trainer.parts.policy)
    return trainer


def train_ours(steps: Steps, setting: Setting, method: dict[str, Any]) -> None:
    trainer = our_trainer(setting, steps.reward, callbacks=[StepCallback(steps)], **method)
    steps.inner_meter = trainer.meter
    trainer.train()


def narrow_tile(vocab_size: int) -> Any:
    """Lets TRL's language-model head allocate no wider tiles of logits than the vocabulary, which it does otherwise.

    On a CPU nobody would ever touch the rest: without this, half a gigabyte would be held against it. Only while a
    step is watched; times are those of TRL as it is.
    """
    width = min(trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE, vocab_size)
    return patch.object(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", width)


def train_trl(steps: Steps, setting: Setting, config: Callable[..., Any], trainer_class: Callable[..., Any]) -> None:
    trainer = trainer_class(
        str(setting.folder),
        steps.reward,
        config(output_dir=tempfile.mkdtemp(), **trl_settings(setting)),
        train_dataset=Dataset.from_dict({"prompt": setting.prompts()}),
        processing_class=setting.tokenizer(),
        callbacks=[StepCallback(steps)],
    )
    setting.plan().attach(trainer.model)
    if hasattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE"):  # of TRL 1.16
        steps.while_watched = lambda: narrow_tile(setting.case.shape.vocab_size)
    trainer.train()


def train(steps: Steps, name: str, setting: Setting) -> None:
    """Trains a competitor, step by step, until it is stopped."""
    if name in OURS:
        train_ours(steps, setting, OURS[name])
    elif name in TRL:
        train_trl(steps, setting, *TRL[name])
    else:
        train_like_authors(steps, setting)

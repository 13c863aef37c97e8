"""What all settings share: unknown names are refused, values have their field's type, groups check themselves."""

import difflib
import functools
import math
import os
import types
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from remax.errors import UserError
from remax.untrusted import shown

FOREIGN_NAMES = {
    "per_device_train_batch_size": "batch_size (prompts per step, over all processes)",
    "generation_batch_size": "batch_size (prompts per step, over all processes)",
    "per_device_eval_batch_size": "reward_batch_size and rollout_batch_size",
    "gradient_accumulation_steps": "micro_batch_tokens (the batch is cut into pieces of that many tokens)",
    "model_init_kwargs": "dtype and attn_implementation, or pass a loaded model",
    "warmup_ratio": "warmup_steps (a number below 1 is a fraction of the run)",
    "eval_strategy": "eval_steps",
    "load_best_model_at_end": "save_best_model",
    "loss_type": "method (grpo, dr_grpo, ...) and loss_aggregation",
    "kl_coef": "beta",
    "lr": "learning_rate",
    "max_length": "max_prompt_length and max_completion_length",
    "response_length": "max_completion_length",
    "peft_config": "use_peft with lora_r, lora_alpha and lora_target_modules",
    "disable_dropout": "nothing (dropout is always off)",
    "num_iterations": "num_ppo_epochs with --method ppo (the other methods take one update per batch)",
    "steps_per_generation": "num_mini_batches with --method ppo (the other methods take one update per batch)",
    "epsilon": "cliprange with --method ppo (the others are on-policy, so there is no ratio to clip)",
    "scale_rewards": "method (grpo divides by the group's standard deviation, dr_grpo does not)",
    "gae_lambda": "lam",
    "vf_coef": "value_learning_rate (the value model has an optimiser of its own)",
    "init_kl_coef": "beta",
    "adap_kl_ctrl": "target_kl",
    "critic_model": "value_model",
    "critic_learning_rate": "value_learning_rate",
    "whiten_rewards": "whiten_advantages",
    "reward_model_path": "reward_model",
    "model_name_or_path": "model",
    "dataset_name": "train_dataset",
    "vllm_max_model_len": "vllm_max_model_length",
    "accelerate_config": "for remax train, sft, reward and dpo, the commands that work in several processes (and plan)",
    "num_processes": "for remax train, sft, reward and dpo, the commands that work in several processes (and plan)",
    "hub_token": "the environment variable HF_TOKEN, or hf auth login (a token is never a setting)",
    "hub_strategy": "push_to_hub (once, when the run is finished)",
    "use_vllm": "rollout_engine (vllm)",
    "use_transformers_paged": "rollout_engine (paged)",
    "use_transformers_continuous_batching": "rollout_engine (paged)",
    "resume_from_checkpoint": "resume (auto, or a checkpoint's path)",
    "overwrite_output_dir": "resume (or delete the folder: a run is never overwritten)",
    "save_strategy": "save_steps (0 for the last one alone, -1 for none)",
    "logging_strategy": "logging_steps",
    "log_level": "logging_steps (how often a step is told)",
    "do_sample": "nothing (samples are always drawn; temperature, top_p and top_k say how)",
    "num_generations_eval": "num_eval_prompts (evaluations draw one sample of each prompt, and the greedy completion)",
    "eval_on_start": "eval_dataset (with it, every run is evaluated at its start)",
    "greater_is_better": "metric_for_best_model (larger is always better)",
    "sync_ref_model": "nothing (the reference stays the policy as it was given)",
    "mask_truncated_completions": "nothing (cut completions are trained on; the alarm of max_truncated watches them)",
    "epsilon_high": "cliprange with --method ppo (the others are on-policy, so there is no ratio to clip)",
    "delta": "cliprange with --method ppo (the others are on-policy, so there is no ratio to clip)",
    "reward_clip_range": "reward_clip with reward_clip_mode",
    "normalize_advantages": "method (grpo divides by the group's standard deviation), or whiten_advantages with ppo",
    "min_p": "nothing (top_p and top_k are here; the distribution that is sampled is the one that is differentiated)",
    "repetition_penalty": "nothing (the distribution that is sampled is the one that is differentiated)",
    "generation_kwargs": "temperature, top_p and top_k",
    "num_completions_to_print": "logging_steps (completions.jsonl has all of them)",
    "shuffle_dataset": "seed (the order is shuffled by it)",
    "data_seed": "seed",
    "cast_lm_head_to_fp32": "nothing (log-probabilities are always in float32)",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "fp16": "bf16",
    "deepspeed": "accelerate_config (zero2 or zero3)",
    "fsdp": "accelerate_config (fsdp2)",
    "use_liger_kernel": "nothing (log-probabilities are computed in chunks by themselves)",
    "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
    "trust_remote_code": "nothing (code from downloads is never run)",
    "log_unique_prompts": "log_completions",
    "optim_args": "optim",
    "lr_scheduler_kwargs": "lr_scheduler_type and warmup_steps",
    "disable_tqdm": "nothing (a terminal gets a panel, a file plain lines)",
    "use_cpu": "nothing (the device is found; hide GPUs with CUDA_VISIBLE_DEVICES)",
    "remove_unused_columns": "nothing (reward functions get every column)",
    "logging_dir": "output_dir",
}
"""Settings of TRL and other libraries, and what they are called here."""
LARGEST_WHOLE_NUMBER = 2**63 - 1


def nearest(name: object, known: list[str]) -> str:
    """Returns advice for an unknown setting: our word for it, or the most similar name."""
    if isinstance(name, str) and name in FOREIGN_NAMES:
        ours = FOREIGN_NAMES[name]
        return f"there is {ours} for it here" if ours.startswith("nothing") else f"here it is {ours}"
    close = difflib.get_close_matches(shown(name), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}" if close else "see --help for all settings"


class Options:
    """Base of all groups of settings: refuses unknown names, then lets every group check its own fields."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in kwargs:
            if name not in known:
                raise UserError(
                    f"{cls.__name__} has no setting {shown(name)}: it would be ignored; {nearest(name, known)}."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        hints = _hints(type(self))  # type: ignore[arg-type]
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if value is not None or f.default is not None:  # None may stand for what another setting decides
                object.__setattr__(self, f.name, _typed(f.name, value, hints[f.name]))
        for group in type(self).__mro__:
            if check := vars(group).get("_check"):
                check(self)

    def _require(self, condition: bool, name: str, consequence: str, instead: str) -> None:
        """Raises UserError with the project's one sentence for a bad setting unless the condition holds."""
        if not condition:
            raise UserError(f"--{name} is {shown(getattr(self, name))}: {consequence}; set {instead}.")

    def _check(self) -> None:
        """Checks the group's own fields."""


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Returns the value as the type that a field has: a path as text, a single text as a list of one.

    Raises:
        UserError: it is of another type, or none of the choices.
    """
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        if not isinstance(value, str) or value not in choices:
            close = difflib.get_close_matches(shown(value), choices, n=1)
            advice = f"did you mean {close[0]}" if close else f"set one of {', '.join(choices)}"
            raise UserError(f"--{name} is {shown(value)}: that is not one of {', '.join(choices)}; {advice}.")
        return value
    if get_origin(hint) is list:
        (item_hint,) = get_args(hint)
        if not isinstance(value, list | tuple | str):
            raise UserError(f"--{name} is {shown(value, spelled=repr)}: that is no list; put it in [ ].")
        return [_typed(name, item, item_hint) for item in ([value] if isinstance(value, str) else value)]
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise UserError(
                f"--{name} is {shown(value, spelled=repr)}: that is no mapping; write `name: value` lines under it."
            )
        return {key if isinstance(key, str) else shown(key): item for key, item in value.items()}
    if hint is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        words = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
        raise UserError(f"--{name} is {shown(value, spelled=repr)}: that is not {words[hint]}; set one.")
    if isinstance(value, str) and not _is_storable(value):
        raise UserError(f"--{name} is {shown(value)}: it holds what no file can (NUL, half a character); leave it out.")
    if hint in (int, float) and not _is_number(value):
        raise UserError(f"--{name} is {shown(value)}: that is not a number that can be counted with; set another.")
    return value


def _is_storable(text: str) -> bool:
    """Whether a text can be a path and be written in UTF-8: every setting comes into a file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _is_number(value: float) -> bool:
    """Whether every library can count with it."""
    return abs(value) <= LARGEST_WHOLE_NUMBER if isinstance(value, int) else not math.isnan(value)

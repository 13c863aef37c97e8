"""What the supervised stages share: settings for TRL's trainers, and how models, tokenizers and data are prepared."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import datasets
import torch
from accelerate import PartialState
from peft import PeftModel

from remax.config import DPOConfig, RewardConfig, SFTConfig
from remax.data import check_tokenizer, eos_token_ids, load_preferences
from remax.errors import UserError
from remax.models import (
    add_adapter,
    check_model_exists,
    load_policy,
    load_tokenizer,
    quiet,
    short_reason,
)
from remax.optimisers import check_optimiser
from remax.rewards import reward_input_ids
from remax.stages.batches import division

StageConfig = SFTConfig | RewardConfig | DPOConfig


class ArgumentsClass(Protocol):
    """SFTConfig, RewardConfig or DPOConfig of TRL."""

    def __call__(self, **kwargs: Any) -> Any: ...


def say(line: str) -> None:
    """Prints a line once, whatever the number of processes."""
    if PartialState().is_main_process:
        print(line, flush=True)


@contextmanager
def quiet_training() -> Iterator[None]:
    """Silences the progress bars of transformers and datasets; warnings of TRL are let through."""
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with quiet():
            yield
    finally:
        if bars:
            datasets.enable_progress_bars()


def trainer_arguments(arguments_class: ArgumentsClass, config: StageConfig, **own: Any) -> Any:
    """Returns the arguments of a TRL trainer, every setting taken from our config and none left to TRL's defaults.

    Raises:
        UserError: the optimiser or the precision is not available.
    """
    size, per_step = division(config.batch_size, config.micro_batch_size, PartialState().num_processes)
    check_optimiser(config)
    try:
        with quiet_training():
            arguments = arguments_class(
                output_dir=config.output_dir,
                seed=config.seed,
                data_seed=config.seed,
                per_device_train_batch_size=size,
                per_device_eval_batch_size=size,
                gradient_accumulation_steps=per_step,
                max_steps=config.max_steps,
                num_train_epochs=config.num_train_epochs,
                optim=config.optim,
                # As in `optimisers`: small updates of bfloat16 weights would vanish otherwise.
                optim_args="bf16_stochastic_round=True" if config.optim == "adamw_torch_8bit" else None,
                learning_rate=config.learning_rate,
                lr_scheduler_type=config.lr_scheduler_type,
                warmup_steps=config.warmup_steps,
                weight_decay=config.weight_decay,
                adam_beta1=config.adam_beta1,
                adam_beta2=config.adam_beta2,
                adam_epsilon=config.adam_epsilon,
                max_grad_norm=config.max_grad_norm,
                bf16=config.bf16,
                gradient_checkpointing=config.gradient_checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
                use_cpu=not torch.accelerator.is_available(),
                average_tokens_across_devices=True,
                ddp_find_unused_parameters=False,
                report_to=["none"],  # StageRun tells the trackers.
                # Every step; MetricsLog thins out what the terminal shows.
                logging_steps=1,
                # The default would write the last finite loss in place of one that is not.
                logging_nan_inf_filter=False,
                # It is written into the config of the model that is saved; TRL turns the cache off by itself.
                use_cache=True,
                save_strategy="no",  # Saving decides when.
                eval_strategy="no",
                disable_tqdm=True,
                **own,
            )
    except ValueError as error:
        raise UserError(f"--bf16 is {config.bf16}: {short_reason(error)}; set what this machine can do.") from error
    # One process drives one device: TRL refuses the DataParallel that transformers would choose for several.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def name_of(model: Any) -> str:
    """Returns the name or path of a model that is given by name or loaded."""
    return model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def tokenizer_for(model: Any, processing_class: Any) -> Any:
    """Returns the tokenizer that was given, or the one beside the model, having checked that it has an EOS.

    Raises:
        UserError: there is no such model, or no usable tokenizer.
    """
    if isinstance(model, str):
        check_model_exists(model, flag="--model")
    tokenizer = processing_class or load_tokenizer(name_of(model), flag="--model")
    check_tokenizer(tokenizer, flag="--model")
    return tokenizer


def load_pairs(dataset: Any, *, flag: str) -> Any:
    """Returns the preference pairs of a dataset, and says how many were dropped because they prefer nothing.

    Raises:
        UserError: they cannot be used.
    """
    dataset, num_identical = load_preferences(dataset, flag=flag)
    if num_identical:
        say(f"{num_identical} pairs of {flag} were dropped: chosen and rejected are the same.")
    return dataset


def short_pairs(
    dataset: Any, tokenizer: Any, max_length: int, *, flag: str
) -> list[tuple[dict[str, Any], list[int], list[int]]]:
    """Returns row, chosen and rejected sequence of the pairs of which both have at most max_length tokens.

    The sequences are finished: see `rewards.text.reward_input_ids`. Says how many pairs were dropped.

    Raises:
        UserError: no pair is left.
    """
    pairs = []
    for row in dataset.with_format(None):
        prompt = row.get("prompt", "")
        chosen, rejected = (reward_input_ids(tokenizer, prompt, row[side], True) for side in ("chosen", "rejected"))
        if max(len(chosen), len(rejected)) <= max_length:
            pairs.append((row, chosen, rejected))
    if not pairs:
        raise UserError(
            f"--max_length is {max_length}: no pair of {flag} is that short; set a larger one or a model with more "
            "positions."
        )
    if dropped := len(dataset) - len(pairs):
        say(f"{dropped} of {len(dataset)} pairs of {flag} were dropped: over {max_length} tokens.")
    return pairs


def ids_of_prompt(tokenizer: Any, prompt: Any) -> list[int]:
    """Returns a prompt, a text or messages, as the policy is asked to continue it: nothing ends it."""
    if isinstance(prompt, str):
        return reward_input_ids(tokenizer, prompt, "", False)
    if not prompt:
        return []
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def shared_length(*sequences: Sequence[Any]) -> int:
    """Returns how many items at their start all sequences share."""
    shared = 0
    for items in zip(*sequences, strict=False):
        if any(item != items[0] for item in items):
            break
        shared += 1
    return shared


def policy_to_train(model: Any, config: StageConfig) -> Any:
    """Returns the language model that is given by name or loaded, with a new LoRA adapter if one is wanted.

    Raises:
        UserError: it cannot be loaded, or is a reward model.
    """
    if isinstance(model, str):
        return load_policy(model, config, flag="--model")
    name = type(base_of(model)).__name__
    if "ForSequenceClassification" in name:
        raise UserError(f"--model is a {name}: that is a reward model, which cannot write; pass a language model.")
    return add_adapter(model, config) if config.use_peft and not isinstance(model, PeftModel) else model


def base_of(model: Any) -> Any:
    """Returns the transformers model inside a PEFT model; its layers carry the adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def all_stop_ids(model: Any, tokenizer: Any, learned: Sequence[int]) -> list[int]:
    """Returns what ends a completion: what the model knows already, and what it has learned."""
    return sorted({*eos_token_ids(base_of(model).generation_config, tokenizer), *learned})


def position_limit(model: Any, config: StageConfig) -> int:
    """Returns the longest example in tokens: --max_length or, if that is less, what the model has positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or config.max_length
    if positions < config.max_length:
        say(f"The model has {positions} positions: examples are limited to that instead of {config.max_length} tokens.")
    return int(min(positions, config.max_length))

"""What the supervised stages share: settings for TRL's trainers, the run's folder, and one line per step."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import datasets
import torch
import transformers
from accelerate import PartialState
from transformers.integrations import get_available_reporting_integrations

from remax.config import RewardConfig, SFTConfig
from remax.data import check_tokenizer
from remax.errors import UserError
from remax.models import check_model_exists, load_tokenizer, quiet, short_reason
from remax.recording import RunFolder

StageConfig = SFTConfig | RewardConfig


class ArgumentsClass(Protocol):
    """SFTConfig or RewardConfig of TRL."""

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
        UserError: the batch cannot be divided, or a tracker or the precision is not available.
    """
    num_processes = PartialState().num_processes
    if config.batch_size % num_processes:
        raise UserError(
            f"--batch_size is {config.batch_size}: it cannot be divided over {num_processes} processes; "
            f"set a multiple of {num_processes}."
        )
    share = config.batch_size // num_processes
    micro_batch_size = min(config.micro_batch_size or share, share)
    if share % micro_batch_size:
        raise UserError(
            f"--micro_batch_size is {config.micro_batch_size}: the {share} examples of a process and step cannot be "
            f"divided into equal pieces; set a divisor of {share}."
        )
    _check_trackers(config.report_to)
    try:
        with quiet_training():
            arguments = arguments_class(
                output_dir=config.output_dir,
                seed=config.seed,
                data_seed=config.seed,
                per_device_train_batch_size=micro_batch_size,
                per_device_eval_batch_size=micro_batch_size,
                gradient_accumulation_steps=share // micro_batch_size,
                max_steps=config.max_steps,
                num_train_epochs=config.num_train_epochs,
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
                report_to=config.report_to or ["none"],
                # Every step; MetricsLog thins out what the terminal shows.
                logging_steps=1,
                # The default would write the last finite loss in place of one that is not.
                logging_nan_inf_filter=False,
                # It is written into the config of the model that is saved; TRL turns the cache off by itself.
                use_cache=True,
                save_strategy="no",
                eval_strategy="no",
                disable_tqdm=True,
                **own,
            )
    except ValueError as error:
        raise UserError(f"--bf16 is {config.bf16}: {short_reason(error)}; set what this machine can do.") from error
    # One process drives one device: TRL refuses the DataParallel that transformers would choose for several.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _check_trackers(report_to: list[str]) -> None:
    available = [*get_available_reporting_integrations(), "none"]
    for name in report_to:
        if name not in available or (name == "none" and len(report_to) > 1):
            raise UserError(
                f"--report_to is {report_to}: {name} is no tracker that is installed here; set some of "
                f"{', '.join(available[:-1])}, or none alone."
            )


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


def position_limit(model: Any, config: StageConfig) -> int:
    """Returns the longest example in tokens: --max_length or, if that is less, what the model has positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or config.max_length
    if positions < config.max_length:
        say(f"The model has {positions} positions: examples are limited to that instead of {config.max_length} tokens.")
    return int(min(positions, config.max_length))


def train(
    make_trainer: Callable[[], Any], folder: RunFolder, config: StageConfig, run_config: Mapping[str, Any]
) -> tuple[Any, float]:
    """Makes a TRL trainer, writes the run's folder while it trains, and returns it and the mean training loss.

    Raises:
        UserError: no example is left to train on, and nothing was written; or the loss is not finite any more.
    """
    with quiet_training():
        try:
            trainer = make_trainer()
            if len(trainer.train_dataset) == 0:
                raise UserError(
                    f"--max_length is {config.max_length}: no example of --train_dataset is left; set a larger one."
                )
        except BaseException:
            folder.discard()  # transformers creates the folder early
            raise
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            folder.create(run_config)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(MetricsLog(folder, config.logging_steps, config.learning_rate))
        result = trainer.train()
    return trainer, float(result.training_loss)


def run_settings(config: StageConfig, model: Any, run_config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Returns what config.yaml records."""
    return run_config or {"model": name_of(model), **dataclasses.asdict(config)}


def write_evaluation(folder: RunFolder, metrics: Mapping[str, float]) -> None:
    """Writes eval.json."""
    if PartialState().is_main_process:
        (folder.path / "eval.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


class MetricsLog(transformers.TrainerCallback):  # type: ignore[misc]
    """Writes every step to metrics.jsonl and the mean of the last few to the terminal; stops a run that diverges."""

    def __init__(self, folder: RunFolder, logging_steps: int, learning_rate: float) -> None:
        self.folder = folder
        self.logging_steps = logging_steps
        self.learning_rate = learning_rate
        self.window: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Takes one step's metrics; summaries without a loss are not for here."""
        if not logs or "loss" not in logs:
            return
        step = state.global_step
        if state.is_world_process_zero:
            self.folder.append("metrics.jsonl", [{"step": step, **logs}])
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"--learning_rate is {self.learning_rate}: the loss is {logs['loss']} at step {step}, nothing is "
                "learned from here on; set a smaller one."
            )
        self.window.append(logs)
        if step % self.logging_steps == 0 or step == state.max_steps:
            say(f"step {step}/{state.max_steps}" + "".join(self._means()))
            self.window.clear()

    def _means(self) -> Iterator[str]:
        for key, name in {"loss": "loss", "accuracy": "accuracy", "mean_token_accuracy": "token accuracy"}.items():
            if key in self.window[0]:
                yield f"  {name} {sum(logs[key] for logs in self.window) / len(self.window):.4f}"

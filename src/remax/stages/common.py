"""What the supervised stages share: settings for TRL's trainers, the run's folder, and one line per step."""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import datasets
import torch
import transformers
from accelerate import PartialState
from peft import PeftModel
from transformers.integrations import get_available_reporting_integrations

from remax.cards import model_card
from remax.checkpoint.run import Run
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
from remax.recording import RunFolder
from remax.rewards import reward_input_ids
from remax.saving import save_model
from remax.stages.saving import Saving, naming_failures, naming_misfits, stage_fingerprints

StageConfig = SFTConfig | RewardConfig | DPOConfig

SHOWN = {
    "loss": "loss",
    "accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "mean_token_accuracy": "token accuracy",
}
"""The metrics of TRL that the terminal shows, and what they are called there."""


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
        UserError: the batch cannot be divided, or a tracker, the optimiser or the precision is not available.
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
    check_optimiser(config)
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
                report_to=config.report_to or ["none"],
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


def position_limit(model: Any, config: StageConfig) -> int:
    """Returns the longest example in tokens: --max_length or, if that is less, what the model has positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or config.max_length
    if positions < config.max_length:
        say(f"The model has {positions} positions: examples are limited to that instead of {config.max_length} tokens.")
    return int(min(positions, config.max_length))


def open_run(config: StageConfig, settings: Mapping[str, Any], *, kind: str) -> Run:
    """Returns the run that a stage begins or goes on with; nothing is written yet.

    Raises:
        UserError: the folder cannot be used, or holds no run to go on with.
    """
    return Run(RunFolder(config.output_dir, resumes=config.resume != "none"), config, settings, kind=kind)


def finished_metrics(run: Run) -> dict[str, float]:
    """Returns, and says, what a finished run has measured."""
    say(f"The run in {run.folder.path} is finished: nothing is left to do.")
    metrics = {"loss": statistics.fmean(line["loss"] for line in run.folder.read("metrics.jsonl"))}
    file = run.folder.path / "eval.json"
    quality = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return metrics | {f"eval/{name}": value for name, value in quality.items()}


def train(
    make_trainer: Callable[[], Any], model: Any, run: Run, config: StageConfig, run_config: Mapping[str, Any]
) -> tuple[Any, Any, float]:
    """Makes a TRL trainer of the model, and writes the run's folder while it trains.

    Returns:
        The trainer, the trained model and the mean training loss.

    Raises:
        UserError: no example is left to train on, and nothing was written; or the loss is not finite any more.
        Interrupted: Ctrl-C or SIGTERM came; the step was finished, the state is saved.
    """
    folder, checkpoint, begun = run.folder, run.start.checkpoint, False
    base = base_of(model)
    own_forward = vars(base).get("forward")
    trainer = None
    with quiet_training():
        try:
            trainer = make_trainer()
            if len(trainer.train_dataset) == 0:
                raise UserError(
                    f"--max_length is {config.max_length}: no example of --train_dataset is left; set a larger one."
                )
            run.check_same(stage_fingerprints(base, trainer.train_dataset))
            PartialState().wait_for_everyone()
            if PartialState().is_main_process:
                run.begin(run_config, signals=PartialState().num_processes == 1)
            begun = True
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.add_callback(MetricsLog(folder, config.logging_steps, config.learning_rate))
            trainer.add_callback(Saving(run, trainer))
            trainer._save_checkpoint = naming_failures(trainer._save_checkpoint, folder)
            for name in ("_load_from_checkpoint", "_load_optimizer_and_scheduler"):
                setattr(trainer, name, naming_misfits(getattr(trainer, name), checkpoint))
            trainer.create_model_card = lambda *args, **kwargs: None  # With every checkpoint, into the run's folder.
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except BaseException:
            if not begun:
                folder.discard_empty()  # transformers creates the folder early
            elif checkpoint is None and trainer is not None and trainer.state.global_step == 0:
                folder.discard()
            raise
        finally:
            run.end()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    # TRL puts a forward of its own on the model, which must not outlive the trainer.
    vars(base).pop("forward", None)
    if own_forward is not None:
        base.forward = own_forward
    # Not what TRL returns: it forgets the steps before a checkpoint.
    losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    return trainer, model, statistics.fmean(losses)


def run_settings(config: StageConfig, model: Any, run_config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Returns what config.yaml records."""
    return run_config or {"model": name_of(model), **dataclasses.asdict(config)}


def write_evaluation(folder: RunFolder, metrics: Mapping[str, float]) -> None:
    """Writes eval.json."""
    if PartialState().is_main_process:
        with folder.writing("eval.json"):
            (folder.path / "eval.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def save_policy(
    model: Any,
    tokenizer: Any,
    stop_ids: Sequence[int],
    folder: RunFolder,
    *,
    base_name: str,
    title: str,
    lines: Sequence[str],
) -> None:
    """Writes OUT/model with its model card. stop_ids: what ends a completion beside what the model knows already."""
    if PartialState().is_main_process:
        ids = sorted({*eos_token_ids(base_of(model).generation_config, tokenizer), *stop_ids})
        card = model_card(base_model=base_name, title=title, lines=lines)
        with folder.writing("model"):
            save_model(model, tokenizer, folder.model, eos_token_ids=ids, card=card)
    say(f"The model is in {folder.model}.")


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
        for key, name in SHOWN.items():
            if key in self.window[0]:
                yield f"  {name} {sum(logs[key] for logs in self.window) / len(self.window):.4f}"

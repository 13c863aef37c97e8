"""The run of a stage: its folder, trackers and place on the hub, and one line per step.

Several processes train together as transformers' Trainer does it (DDP); the first one alone writes and tells.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import accelerate
import transformers

from remax.cards import stage_card
from remax.checkpoint.run import Run
from remax.errors import UserError
from remax.hub import find_destination, push
from remax.launch import check_launcher
from remax.processes import Processes, join_processes
from remax.recording import RunFolder
from remax.saving import save_model
from remax.stages.common import StageConfig, base_of, name_of, quiet_training, say
from remax.stages.saving import Saving, naming_failures, naming_misfits, stage_fingerprints
from remax.trackers import Trackers

SHOWN = {
    "loss": "loss",
    "accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "mean_token_accuracy": "token accuracy",
}
"""The metrics of TRL that the terminal and the model card show, and what they are called there."""


class StageRun:
    """What surrounds the training of a stage."""

    def __init__(self, config: StageConfig, model: Any, run_config: Mapping[str, Any] | None, *, kind: str) -> None:
        """Finds out where the training begins and what it needs; changes nothing yet.

        model: what is trained, by name or loaded. run_config: what config.yaml records; by default config.

        Raises:
            UserError: the folder, a tracker, the hub or the launcher's settings cannot be used, or the folder holds no
                run to go on with.
        """
        check_launcher(config)
        self.config, self.kind, self.base_name = config, kind, name_of(model)
        self.settings = run_config or {"model": self.base_name, **dataclasses.asdict(config)}
        self.processes = processes = join_processes()
        self.folder = processes.together(self._open_folder)
        self.run = Run(self.folder, config, self.settings, kind=kind, processes=processes)
        self.destination = processes.on_main(lambda: find_destination(config, self.folder.path))
        self.trackers = processes.together(lambda: Trackers(config, self.folder, say=say))
        self.num_steps = int(self.run.start.facts.get("step", 0))

    def _open_folder(self) -> RunFolder:
        config, processes = self.config, self.processes
        if config.batch_size < processes.num:
            raise UserError(
                f"--batch_size is {config.batch_size}: {processes.num} processes share the examples of a step, so some "
                f"would have none; set --batch_size {processes.num} or more, or start fewer processes."
            )
        return RunFolder(config.output_dir, resumes=config.resume != "none", writes=processes.is_main)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.run.finished

    def finished_metrics(self) -> dict[str, float]:
        """Returns, and says, what a finished run has measured; pushes its model, if that is wanted."""
        say(f"The run in {self.folder.path} is finished: nothing is left to do.")
        metrics = {"loss": statistics.fmean(line["loss"] for line in self.folder.read("metrics.jsonl"))}
        file = self.folder.path / "eval.json"
        quality = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.push()
        return metrics | {f"eval/{name}": value for name, value in quality.items()}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around training, measuring and saving: no other run gets the folder, and trackers hear how it ends."""
        try:
            yield
        except BaseException as error:
            self.trackers.finish(error)
            raise
        finally:
            self.run.end()
        self.trackers.finish()

    def train(self, make_trainer: Callable[[], Any], model: Any) -> tuple[Any, Any, float]:
        """Makes a TRL trainer of the model, and writes the run's folder while it trains.

        Returns:
            The trainer, the trained model and the mean training loss.

        Raises:
            UserError: a tracker cannot be started, and nothing was written; or the loss is not finite any more.
            Interrupted: Ctrl-C or SIGTERM came; the step was finished, the state is saved.
        """
        base, begun = base_of(model), False
        trainer: Any = None
        own_forward = vars(base).get("forward")
        with quiet_training():
            try:
                trainer = self.processes.together(make_trainer)
                self.processes.together(lambda: self.run.check_same(stage_fingerprints(base, trainer.train_dataset)))
                self.run.begin(self.settings)
                begun = True
                self.processes.on_main(lambda: self._start_trackers(trainer))
                self._follow(trainer)
                checkpoint = self.run.start.checkpoint
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            except BaseException as error:
                self.trackers.finish(error)
                if not begun:
                    self.folder.discard_empty()  # transformers creates the folder early
                elif self.run.start.checkpoint is None and trainer.state.global_step == 0:
                    self.folder.discard()
                raise
            finally:
                self.run.signals.give_back()  # From here on Ctrl-C stops at once.
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        # TRL puts a forward of its own on the model, which must not outlive the trainer.
        vars(base).pop("forward", None)
        if own_forward is not None:
            base.forward = own_forward
        self.num_steps = trainer.state.global_step
        # Not what TRL returns: it forgets the steps before a checkpoint.
        losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
        return trainer, model, statistics.fmean(losses)

    def _start_trackers(self, trainer: Any) -> None:
        self.trackers.start(trainer.accelerator, self.settings, step=self.num_steps, max_steps=0)

    def _follow(self, trainer: Any) -> None:
        """Has the trainer write to the run's folder, and nowhere else."""
        checkpoint = self.run.start.checkpoint
        if self.processes.num > 1:  # Dropout would leave out the same units for the examples of every process.
            accelerate.utils.set_seed(self.config.seed, device_specific=True)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(MetricsLog(self, trainer.batches.num_steps))
        trainer.add_callback(Saving(self.run, trainer))
        trainer._save_checkpoint = self._together(naming_failures(trainer._save_checkpoint, self.folder))
        for name in ("_load_from_checkpoint", "_load_optimizer_and_scheduler"):
            setattr(trainer, name, self._together(naming_misfits(getattr(trainer, name), checkpoint)))
        trainer.create_model_card = lambda *args, **kwargs: None  # With every checkpoint, into the run's folder.

    def _together(self, work: Callable[..., None]) -> Callable[..., None]:
        """Returns what fails in all processes if the work fails in one."""
        return lambda *args, **kwargs: self.processes.together(lambda: work(*args, **kwargs))

    def record_quality(self, quality: Mapping[str, float]) -> None:
        """Writes eval.json."""

        def write() -> None:
            with self.folder.writing("eval.json"):
                (self.folder.path / "eval.json").write_text(json.dumps(quality, indent=2) + "\n", encoding="utf-8")

        self.processes.on_main(write)
        self.trackers.log({f"eval/{name}": value for name, value in quality.items()}, self.num_steps)

    def save(
        self,
        model: Any,
        tokenizer: Any,
        *,
        title: str,
        lines: Sequence[str],
        eos_token_ids: Sequence[int] = (),
        task: str = "text-generation",
    ) -> None:
        """Writes OUT/model with its model card. eos_token_ids: what ends a completion of a language model."""

        def write() -> None:
            card = stage_card(
                self.base_name,
                title,
                lines,
                self.settings,
                curve=self.folder.read("metrics.jsonl"),
                shown=SHOWN,
                task=task,
            )
            with self.folder.writing("model"):
                save_model(model, tokenizer, self.folder.model, eos_token_ids=eos_token_ids, card=card)

        self.processes.on_main(write)

    def push(self) -> None:
        """Uploads the final model, if that is wanted.

        Raises:
            PushFailed: all is done and written, but that did not work.
        """
        if self.destination is not None and self.processes.is_main:  # Nobody waits: an upload may take an hour.
            destination, message = self.destination, f"Model after {self.num_steps} steps of remax {self.kind}"
            address = push(self.folder.model, destination, message=message)
            say(f"The model is at {address}.")


class MetricsLog(transformers.TrainerCallback):  # type: ignore[misc]
    """Writes every step to metrics.jsonl and the mean of the last few to the terminal; stops a run that diverges."""

    def __init__(self, run: StageRun, steps_per_epoch: int) -> None:
        self.processes: Processes = run.processes
        self.steps_per_epoch = steps_per_epoch
        self.folder, self.trackers, self.config = run.folder, run.trackers, run.config
        self.window: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Takes one step's metrics; summaries without a loss are not for here."""
        if logs and "loss" in logs:
            self.processes.together(lambda: self._take(logs, state.global_step, state.max_steps))

    def _take(self, logs: Mapping[str, float], step: int, max_steps: int) -> None:
        epoch = step / self.steps_per_epoch  # transformers counts micro-batches.
        line = {"step": step, **logs, "epoch": epoch, "num_processes": self.processes.num}
        self.folder.append("metrics.jsonl", [line])
        self.trackers.log(line, step)
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"--learning_rate is {self.config.learning_rate}: the loss is {logs['loss']} at step {step}, nothing "
                "is learned from here on; set a smaller one."
            )
        self.window.append(dict(logs))
        if step % self.config.logging_steps == 0 or step == max_steps:
            say(f"step {step}/{max_steps}" + "".join(self._means()))
            self.window.clear()

    def _means(self) -> Iterator[str]:
        for key, name in SHOWN.items():
            if key in self.window[0]:
                yield f"  {name} {sum(logs[key] for logs in self.window) / len(self.window):.4f}"

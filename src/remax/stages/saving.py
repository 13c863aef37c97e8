"""Checkpoints of the supervised stages: transformers' own, sealed and rotated like those of `remax train`."""

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from remax.checkpoint.files import FACTS, FOLDER, path_of, publish, rotate, write_json
from remax.checkpoint.run import Run
from remax.checkpoint.state import digest_of_values, fingerprint
from remax.errors import UserError
from remax.models import short_reason
from remax.recording import RunFolder

PICKLE = "training_args.bin"
"""What transformers writes beside its state and nobody reads; a pickle."""
ROWS = 64
"""How many rows a fingerprint of a dataset looks at."""


class Saving(transformers.TrainerCallback):  # type: ignore[misc]
    """Has the state saved when it is time to, and makes a checkpoint of what transformers wrote."""

    def __init__(self, run: Run, trainer: Any) -> None:
        """trainer: TRL's, which from now on writes into OUT/checkpoints: elsewhere in OUT are the user's own files."""
        self.run, self.trainer = run, trainer
        self.written = run.folder.path / FOLDER
        self.received: signal.Signals | None = None
        trainer._get_output_dir = lambda trial=None: str(self.written)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the folder back, now that the state of the checkpoint is restored."""
        if self.run.start.checkpoint is not None:
            self.run.go_back()
            # TRL's own count would begin at 0 again.
            lines = self.run.folder.read("metrics.jsonl")
            self.trainer._total_train_tokens = int(lines[-1].get("num_tokens", 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decides whether the state is saved after this step, in all processes alike."""
        received = self.run.signals.received
        ended = state.global_step >= state.max_steps or received is not None
        told = self.run.processes.gather((self.run.due(state.global_step, ended=ended), received))
        control.should_save = any(due for due, _ in told)
        # What a process hears of from here on, the others do not know yet: that is for the next step.
        self.received = next((number for _, number in told if number is not None), None)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seals what was written.

        Raises:
            Interrupted: Ctrl-C or SIGTERM came during the step.
        """
        step = state.global_step
        self.run.processes.on_main(lambda: self._seal(step, ended=step >= state.max_steps))
        if self.received is not None:
            self.run.signals.received = self.received
            self.run.raise_if_stopped(step)

    def _seal(self, step: int, *, ended: bool) -> None:
        folder = self.run.folder
        written = self.written / f"checkpoint-{step}"
        with folder.writing(f"the checkpoint of step {step}"):
            (written / PICKLE).unlink(missing_ok=True)
            write_json(written / FACTS, {**self.run.facts(), "step": step, "ended": ended})
            publish(written, path_of(folder.path, step))
            rotate(folder.path, self.run.options.save_total_limit, None)


def naming_failures(save: Callable[..., None], folder: RunFolder) -> Callable[..., None]:
    """Returns a trainer's _save_checkpoint whose failures on a full disk are one sentence, a UserError."""

    def named(*args: Any, **kwargs: Any) -> None:
        with folder.writing("a checkpoint"):
            try:
                save(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # What torch.save makes of an error of the system.
                raise OSError(str(error)) from error

    return named


def naming_misfits(load: Callable[..., None], checkpoint: Path | None) -> Callable[..., None]:
    """Returns a trainer's method that loads from the checkpoint; what does not fit is one sentence, a UserError."""

    def named(*args: Any, **kwargs: Any) -> None:
        try:
            load(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"--resume names {checkpoint}: its state does not fit the model that is trained here "
                f"({short_reason(error)}); resume with the --model and the settings of that run."
            ) from error

    return named


def stage_fingerprints(model: Any, rows: Any) -> Mapping[str, str]:
    """Returns what tells another model or other examples from those of the run."""
    some = [rows[index] for index in range(0, len(rows), max(1, len(rows) // ROWS))]
    return {"the model": fingerprint(model, without="lora_"), "the examples": digest_of_values([len(rows), *some])}

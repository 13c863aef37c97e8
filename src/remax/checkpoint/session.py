"""ReMaxTrainer.train's hold on its folder: when its state is saved, and how it is put back."""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from remax.checkpoint import state
from remax.checkpoint.files import FOLDER, path_of
from remax.checkpoint.run import Run
from remax.checkpoint.writer import Writer
from remax.config.checkpoint import CheckpointOptions
from remax.errors import UserError
from remax.processes import ALONE, Processes
from remax.recording import RunFolder


class Session(Run):
    """Saves a ReMaxTrainer's state after its steps, and puts it back at the start."""

    def __init__(
        self,
        folder: RunFolder,
        options: CheckpointOptions,
        config: Mapping[str, Any],
        *,
        free_memory: Callable[[], int],
        processes: Processes = ALONE,
    ) -> None:
        """Finds out where the training begins; changes nothing yet.

        free_memory: returns the bytes of the host's memory that are left.

        Raises:
            UserError: see `find_start`.
        """
        super().__init__(folder, options, config, kind="train", processes=processes)
        self.writer = Writer(folder.path, options.save_total_limit, print)
        self.free_memory = free_memory
        self._unsaved: UserError | None = None

    def restore(self, trainer: Any) -> dict[str, float]:
        """Puts the trainer into the state of the checkpoint, if there is one, and returns the last step's metrics."""
        self.writer.say = trainer.view.note
        if self.start.checkpoint is None:
            return {}
        state.restore(trainer, self.start.checkpoint, self.start.facts)
        self.go_back()
        trainer.control.should_training_stop = self.start.ended
        steps, evaluations = self.folder.read("metrics.jsonl"), self.folder.read("eval.jsonl")
        history = sorted(steps + evaluations, key=lambda line: line["step"])
        trainer.state.log_history = [{k: v for k, v in line.items() if v is not None} for line in history]
        return self.last_metrics()

    def restore_generators(self) -> None:
        """Puts the random generators where they were; the last thing before the first step."""
        if self.start.checkpoint is not None:
            state.restore_generators(self.start.checkpoint)

    def last_metrics(self) -> dict[str, float]:
        """Returns the metrics of the last step that was taken."""
        last = (self.folder.read("metrics.jsonl") or [{}])[-1]
        return {name: math.nan if value is None else value for name, value in last.items()}

    def after_step(self, trainer: Any, *, ended: bool) -> None:
        """Saves the state if it is time to.

        Raises:
            Interrupted: Ctrl-C or SIGTERM came during the step.
            UserError: they came, and the state could not be saved.
        """
        step = trainer.state.global_step
        received = [signal for signal in self.processes.gather(self.signals.received) if signal is not None]
        stopped = bool(received)
        if stopped:  # Every process stops after this step, whichever of them has heard of it by now.
            self.signals.received = received[0]
        if self.due(step, ended=ended or stopped):
            try:
                self.save(trainer, ended=ended, background=not (ended or stopped))
            except UserError as error:
                if stopped:
                    raise
                if ended:
                    self._unsaved = error  # The model may still find room.
                else:
                    trainer.view.note(f"Warning: {error}")
            if stopped:
                self.raise_if_stopped(step)

    def check_saved(self) -> None:
        """Raises UserError if the last state of the run could not be saved."""
        if self._unsaved is not None:
            raise self._unsaved

    def save_before_stop(self, trainer: Any, *, ended: bool) -> None:
        """Saves the state because a guard stops the run, and says where, or why not.

        No checkpoint is deleted for it: the guard's message names one to go back to.
        """
        if self.options.save_steps >= 0:
            try:
                saved = self.save(trainer, ended=ended, rotates=False)
                trainer.view.note(f"The state is saved in {saved}; --resume auto goes on from there.")
            except UserError as error:
                trainer.view.note(f"Warning: {error}")

    def save(self, trainer: Any, *, ended: bool = False, background: bool = False, rotates: bool = True) -> Path:
        """Saves the state between two steps and returns where; in the background, if memory suffices for a copy.

        rotates: deletes the oldest ones beyond the limit; in the background always.

        Raises:
            UserError: it could not be written; a failure that only shows in the background is warned of there.
        """
        others = self._write_shards(trainer) if state.is_sharded(trainer) else None
        self.processes.on_main(lambda: self._save(trainer, others, ended=ended, background=background, rotates=rotates))
        return path_of(self.folder.path, trainer.state.global_step)

    def _save(self, trainer: Any, others: Any, *, ended: bool, background: bool, rotates: bool) -> None:
        step, best_step = trainer.state.global_step, trainer.state.best_global_step
        self.writer.wait()  # Its copy is given back before there is another one.
        background = background and others is None and self.free_memory() > 2 * state.num_bytes(trainer)
        with self.folder.writing(f"the checkpoint of step {step}"):
            facts = {**self.facts(), "ended": ended}
        shards = None if others is None else self._shards
        snapshot = state.capture(trainer, facts, copies=background, shards=shards, others=others)
        if background:
            self.writer.begin(step, best_step, snapshot.write)
        else:
            self.writer.write(step, best_step, snapshot.write, rotates=rotates)

    @property
    def _shards(self) -> Path:
        """Where processes write their parts of a checkpoint, before it takes them in."""
        return self.folder.path / FOLDER / ".shards.partial"

    def _write_shards(self, trainer: Any) -> dict[str, Any]:
        """Writes the parts of all processes beside the checkpoint, which is not there yet."""

        def clear() -> None:
            self.writer.wait()
            shutil.rmtree(self._shards, ignore_errors=True)

        self.processes.on_main(clear)
        with self.folder.writing("the checkpoint"):
            try:
                return state.write_shards(trainer, self._shards)
            except OSError:  # In all processes. What is left takes the room that the model may still find.
                shutil.rmtree(self._shards, ignore_errors=True)
                raise

    def end(self, *, at_once: bool = False) -> None:
        """Lets the folder go; unless at once, when nothing is being written any more. May be called twice."""
        try:
            if not at_once:
                self.writer.wait()
        finally:
            super().end()

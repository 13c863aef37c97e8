"""What the trainings of all commands have in common: their folder, the place to begin, the signals that stop them."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from remax.checkpoint.changes import changes, refuse_changes
from remax.checkpoint.files import (
    FOLDER,
    RUN,
    contents,
    list_checkpoints,
    path_of,
    remove,
    remove_partials,
    step_of,
    write_json,
)
from remax.checkpoint.lock import RunLock
from remax.checkpoint.signals import StopSignals
from remax.checkpoint.start import Start, find_start
from remax.config.checkpoint import CheckpointOptions
from remax.errors import UserError
from remax.processes import ALONE, Processes
from remax.recording import RunFolder


class Run:
    """A training's hold on its folder."""

    def __init__(
        self,
        folder: RunFolder,
        options: CheckpointOptions,
        config: Mapping[str, Any],
        *,
        kind: str,
        processes: Processes = ALONE,
    ) -> None:
        """Finds out where the training begins; changes nothing yet.

        processes: those that train together; only the main one looks into the folder and writes there.

        Raises:
            UserError: see `find_start`.
        """
        self.folder, self.options, self.config, self.kind = folder, options, config, kind
        self.processes = processes
        self._seen = self._look()
        self.start: Start = processes.on_main(lambda: find_start(folder, options, config, kind=kind))
        self.lock = RunLock(folder.path)
        self.signals = StopSignals()
        self.fingerprints: Mapping[str, str] = {}
        self._run_config: Mapping[str, Any] = {}

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.start.finished

    def check_same(self, fingerprints: Mapping[str, str]) -> None:
        """Raises UserError if models or prompts are not those that the run began with, unless that is allowed."""
        self.fingerprints = fingerprints
        before = self.start.facts.get("fingerprints", {})
        refuse_changes(
            changes(before, fingerprints),
            self.folder.path,
            self.options.resume,
            allowed=self.options.allow_config_change,
        )

    def begin(self, run_config: Mapping[str, Any], *, signals: bool = True) -> None:
        """Takes the folder, or creates it; where the run goes on, `go_back` has to follow. signals: wait for saving.

        Raises:
            UserError: another run has it, or has written there since this one looked where to begin.
        """
        self._run_config = run_config
        self.processes.on_main(self._take_folder)
        if signals and self.options.save_steps >= 0:
            self.signals.catch()

    def _take_folder(self) -> None:
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.lock.acquire()
        try:
            if self._look() != self._seen:
                raise UserError(
                    f"--output_dir is {self.folder.path}: another run wrote there meanwhile, so this one would "
                    "begin at the wrong place; start it again."
                )
            with self.folder.writing("the start of a run"):
                self._prepare()
        except BaseException:
            self.lock.release()
            raise

    def _look(self) -> tuple[Any, ...]:
        """Returns what `find_start` goes by."""
        return self.folder.held, self.folder.model.exists(), contents(self.folder.path)

    def _prepare(self) -> None:
        if self.start.over:
            print(f"The run in {self.folder.path} left no checkpoint: it begins again.")
            self.folder.clear()
        remove_partials(self.folder.path)
        self.folder.check()
        if self.start.checkpoint is None:
            self._write_settings()

    def _write_settings(self) -> None:
        if self.options.save_steps >= 0:  # Before anything else: without it, nobody could go on after a kill.
            (self.folder.path / FOLDER).mkdir(exist_ok=True)
            write_json(self.folder.path / FOLDER / RUN, {"kind": self.kind, "config": dict(self.config)})
        self.folder.write_config(self._run_config)

    def end(self, *, at_once: bool = False) -> None:
        """Lets the folder go; may be called twice."""
        try:
            self.signals.give_back()
        finally:
            self.lock.release()

    def facts(self) -> dict[str, Any]:
        """Returns what every checkpoint's state.json has, and makes sure that the lines up to here stay written."""
        return {
            "kind": self.kind,
            "config": dict(self.config),
            "fingerprints": dict(self.fingerprints),
            "lengths": self.folder.lengths(),
            "versions": versions(),
        }

    def last_checkpoint(self) -> Path | None:
        """Returns the newest checkpoint that is there."""
        checkpoints = list_checkpoints(self.folder.path)
        return checkpoints[-1] if checkpoints else None

    def due(self, step: int, *, ended: bool) -> bool:
        """Whether the state is to be saved after this step. ended: no step follows, for whatever reason."""
        every = self.options.save_steps
        return every >= 0 and (ended or (every > 0 and step % every == 0))

    def raise_if_stopped(self, step: int) -> None:
        """Raises Interrupted if Ctrl-C or SIGTERM came during the step, whose state has been saved."""
        if self.signals.received is not None:
            saved = path_of(self.folder.path, step)
            raise self.signals.interruption(
                f"stopped after step {step}, with its state saved in {saved}; go on with the same command and "
                "--resume auto."
            )

    def go_back(self) -> None:
        """Puts the folder back to where it was at the checkpoint, if there is one, whose state has been restored.

        Only then: what is deleted here would be lost to a run whose state does not fit.

        Raises:
            UserError: something could not be written.
        """
        checkpoint = self.start.checkpoint
        if checkpoint is not None:
            self.processes.on_main(lambda: self._go_back_in_folder(checkpoint))

    def _go_back_in_folder(self, checkpoint: Path) -> None:
        with self.folder.writing("the start of a run"):
            self._go_back(checkpoint)
            self._write_settings()

    def _go_back(self, checkpoint: Path) -> None:
        for newer in list_checkpoints(self.folder.path):
            if step_of(newer) > step_of(checkpoint):
                print(f"{newer} is deleted: its steps are taken again.")
                remove(newer)
        self.folder.rewind(self.start.facts["lengths"])
        before, now = self.start.facts["versions"], versions()
        if other := [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]:
            print(f"The run had other versions ({', '.join(other)}): numbers may differ in their last digits.")
        print(f"Going on from {checkpoint}.")


def versions() -> dict[str, str]:
    """Returns the versions on which the last bits of a run depend."""
    return {name: version(name) for name in ("remax-rlhf", "torch", "transformers")}

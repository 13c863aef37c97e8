"""What --resume means for a folder as it is found."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remax.checkpoint.changes import changes, refuse_changes
from remax.checkpoint.files import FACTS, FOLDER, RUN, is_begun, list_checkpoints, problem_of, read_facts, step_of
from remax.checkpoint.lock import RunLock
from remax.config.checkpoint import CheckpointOptions
from remax.errors import UserError
from remax.recording import RunFolder


@dataclass(frozen=True)
class Start:
    """Where a training begins."""

    checkpoint: Path | None = None
    """What to go on from; None for the beginning."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The checkpoint's state.json."""
    ended: bool = False
    """No step is left to take."""
    finished: bool = False
    """Nothing is left to do: the model is there, too."""
    over: bool = False
    """The folder holds a run that left no checkpoint, to be begun again."""


def find_start(folder: RunFolder, options: CheckpointOptions, config: Mapping[str, Any], *, kind: str) -> Start:
    """Returns where the training that these settings ask for begins; changes nothing in the folder.

    config: the settings to compare with those of the run. kind: the command, of which the run in the folder must be.

    Raises:
        UserError: a run is going on there, is of other settings or of another command, or has no usable checkpoint.
    """
    RunLock(folder.path).check_free()
    if options.resume == "none" or (options.resume == "auto" and folder.held is None):
        return Start()
    if folder.held == FOLDER and not is_begun(folder.path):  # Killed before it wrote anything.
        return Start(over=True)
    if folder.held is None:
        raise UserError(
            f"--resume is {options.resume}: there is no training in {folder.path} to go on with; correct --output_dir, "
            "or set --resume auto, which begins one where there is none."
        )
    run = _read_run(folder, options, kind)
    checkpoint = _usable(folder, options)
    facts = read_facts(checkpoint) if checkpoint else {}
    found = changes(facts.get("config", run["config"]), config)
    refuse_changes(found, folder.path, options.resume, allowed=options.allow_config_change)
    if checkpoint is None:
        if folder.model.exists() and found:
            raise UserError(
                f"--resume is {options.resume}: the run in {folder.path} has ended and its checkpoints are gone, so it "
                "cannot go on with other settings; set a new --output_dir."
            )
        there = folder.model.exists()
        return Start(ended=there, finished=there, over=not there)
    ended = facts["ended"] and not {change.split(":")[0] for change in found} & {"max_steps", "num_train_epochs"}
    return Start(checkpoint, facts, ended=ended, finished=ended and not found and folder.model.exists())


def _read_run(folder: RunFolder, options: CheckpointOptions, kind: str) -> dict[str, Any]:
    """Returns run.json."""
    try:
        run: dict[str, Any] = json.loads((folder.path / FOLDER / RUN).read_text(encoding="utf-8"))
        found, _ = str(run["kind"]), dict(run["config"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"--resume is {options.resume}: {folder.path} holds no training with checkpoints ({folder.held} is "
            f"there, {FOLDER}/{RUN} is not readable); set a new --output_dir, or delete that one."
        ) from None
    if found != kind:
        raise UserError(
            f"--output_dir is {folder.path}: it holds a run of `remax {found}`, which `remax {kind}` cannot go on "
            "with; set a new folder."
        )
    return run


def _usable(folder: RunFolder, options: CheckpointOptions) -> Path | None:
    """Returns the checkpoint to go on from, having named those that are damaged; None if there are none at all."""
    known = list_checkpoints(folder.path)
    if options.resume != "auto":
        wanted = Path(options.resume).absolute()
        if wanted not in [checkpoint.absolute() for checkpoint in known]:
            advice = f"one of {', '.join(map(str, known))}, or auto" if known else "auto"
            raise UserError(f"--resume is {options.resume}: that is no checkpoint of {folder.path}; set {advice}.")
        known = [checkpoint for checkpoint in known if step_of(checkpoint) == step_of(wanted)]
    damaged = []
    for checkpoint in reversed(known):
        if (problem := _problem(folder, checkpoint)) is None:
            return checkpoint
        damaged.append(f"{checkpoint} ({problem})")
        print(f"The checkpoint {checkpoint} cannot be used: {problem}.")
    if damaged:
        raise UserError(
            f"--resume is {options.resume}: no usable checkpoint is left ({'; '.join(damaged)}); set another one, or "
            f"delete {folder.path} to begin again."
        )
    return None


def _problem(folder: RunFolder, checkpoint: Path) -> str | None:
    """Returns why a checkpoint cannot be used; None if it can."""
    if problem := problem_of(checkpoint):
        return problem
    try:
        facts = read_facts(checkpoint)
        kinds = {"step": int, "ended": bool, "config": dict, "lengths": dict, "fingerprints": dict, "versions": dict}
        if all(isinstance(facts[name], kind) for name, kind in kinds.items()):
            return folder.shorter_than(facts["lengths"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return f"{FACTS} cannot be read"

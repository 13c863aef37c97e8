"""Folders of checkpoints: written completely or not at all, verified by checksum, rotated.

OUT/checkpoints/
    run.json               which command the run is of, and its settings
    step-000200/           manifest.json has size and sha256 of every other file; state.json tells what it is of
    .step-000300.partial/  being written; worthless once its process is gone
    .shards.partial/       likewise, the parts of several processes
    checkpoint-300/        likewise, by transformers
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
FACTS = "state.json"
RUN = "run.json"
FORMAT = 1
"""Of the folder and of what is in it; another one is not read."""


def path_of(folder: Path, step: int) -> Path:
    """Returns where the checkpoint of a step is in a run's folder."""
    return folder / FOLDER / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """Returns the step of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run's folder, oldest first, whatever state they are in."""
    names = re.compile(r"step-\d{6,}")
    found = [path for path in (folder / FOLDER).glob("step-*") if names.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def write_checkpoint(path: Path, fill: Callable[[Path], None]) -> None:
    """Creates a checkpoint out of the files that fill writes into the folder it is given.

    Raises:
        OSError, or what fill raises: nothing of it is left, and other checkpoints are as they were.
    """
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        publish(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def publish(partial: Path, path: Path) -> None:
    """Makes a checkpoint of a folder that is complete: it appears under its name once all of it is on the disk."""
    give_usual_rights(partial)
    files = sorted(file for file in partial.rglob("*") if file.is_file() and file != partial / MANIFEST)
    entries = {}
    for file in files:
        sync(file)
        entries[file.relative_to(partial).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest_of(file)}
    write_json(partial / MANIFEST, {"format": FORMAT, "files": entries})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(path)
    sync(path.parent)


def problem_of(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint; None if every file in it is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {str(manifest['format'])[:20]}, not {FORMAT}"
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if FACTS not in files:
            return f"{MANIFEST} does not list {FACTS}"
        for name, (size, digest) in files.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if digest_of(file) != digest:
                return f"{name} has changed since it was written (sha256)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    return None


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """Returns state.json of a checkpoint that was found to be in order."""
    facts: dict[str, Any] = json.loads((checkpoint / FACTS).read_text(encoding="utf-8"))
    return facts


def rotate(folder: Path, limit: int, best_step: int | None) -> None:
    """Deletes all checkpoints but the newest and, as one of limit, that of the best evaluation."""
    checkpoints = list_checkpoints(folder)
    best = [checkpoint for checkpoint in checkpoints[:-1] if step_of(checkpoint) == best_step]
    kept = best + checkpoints[-max(1, limit - len(best)) :]
    for checkpoint in checkpoints:
        if checkpoint not in kept:
            remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint; a process that dies meanwhile leaves no half of it that looks like one."""
    partial = _partial(checkpoint)
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def remove_partials(folder: Path) -> None:
    """Deletes what processes left that died while they wrote or deleted a checkpoint; nothing outside of FOLDER."""
    ours = re.compile(r"\.step-\d{6,}\.partial|\.shards\.partial|checkpoint-\d+")
    for path in (folder / FOLDER).glob("*"):
        if ours.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def is_begun(folder: Path) -> bool:
    """Whether anything is in FOLDER but what a process left that was killed while it wrote run.json."""
    return any(not path.name.startswith(".") for path in (folder / FOLDER).iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """Returns run.json and the manifests, which are others once another run has written in the folder."""
    found = {}
    for name in [RUN, *(f"{checkpoint.name}/{MANIFEST}" for checkpoint in list_checkpoints(folder))]:
        found[name] = b""
        with suppress(OSError):
            found[name] = (folder / FOLDER / name).read_bytes()
    return found


def digest_of(file: Path) -> str:
    """Returns the sha256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file at once, and waits until it is on the disk."""
    partial = _partial(path)
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def give_usual_rights(folder: Path) -> None:
    """Gives every file in a folder the rights of a new one: safetensors writes its own for their owner alone."""
    new = folder / ".new"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def sync_tree(folder: Path) -> None:
    """Waits until a folder with everything in it would survive a loss of power."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""What a run leaves behind: its folder, its metrics line by line, its completions, its model card."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from remax.errors import UserError
from remax.untrusted import harmless_json

RUN_FILES = ("metrics.jsonl", "config.yaml", "evaluation.json", "eval.jsonl", "model", "checkpoints")
"""What tells that a folder holds a run."""
LINES = ("metrics.jsonl", "completions.jsonl", "eval.jsonl", "eval_completions.jsonl", "alarms.jsonl")
"""What grows line by line."""
LEFT_BY_A_RUN = (
    *LINES,
    "config.yaml",
    "provenance.json",
    "report.html",
    "eval.json",
    "model",
    "best_model",
    "dumps",
    "tensorboard",
    "runs",
    "trackers.json",
    "wandb",
    "checkpoints",
)
"""What is deleted where a run begins again; last what tells that one did."""


class RunFolder:
    """The output directory of one run."""

    def __init__(self, output_dir: str, *, resumes: bool = False, writes: bool = True) -> None:
        """Checks that the folder can take a run; creates nothing yet.

        resumes: it may hold one already. writes: False for a process that only follows the one that writes here;
        nothing is checked or changed then.

        Raises:
            UserError: there is a file at that path, nothing can be written there, or the folder holds a run already.
        """
        self.path = Path(output_dir)
        self.resumes, self.writes = resumes, writes
        self.check()
        self._before = set(self.path.iterdir()) if self.path.exists() else None

    def check(self) -> None:
        """Raises UserError if the folder cannot take the run."""
        if not self.writes:
            return
        output_dir = self.path
        ancestor = next(parent for parent in (self.path.absolute(), *self.path.absolute().parents) if parent.exists())
        if not os.access(ancestor, os.W_OK) or (not ancestor.is_dir() and ancestor != self.path.absolute()):
            raise UserError(f"--output_dir is {output_dir}: nothing can be written in {ancestor}; set another folder.")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output_dir is {output_dir}: that is a file; set the path of a new folder.")
        if self.held is not None and not self.resumes:
            resumable = any((output_dir / "checkpoints").glob("step-*"))
            raise UserError(
                f"--output_dir is {output_dir}: it already holds a run ({self.held}), which would be overwritten; "
                f"set a new folder, {'go on with --resume auto, ' if resumable else ''}or delete that one."
            )

    @property
    def held(self) -> str | None:
        """What tells that the folder holds a run; None if it does not."""
        return next((name for name in RUN_FILES if (self.path / name).exists()), None)

    @property
    def model(self) -> Path:
        """Where the final model goes, in Hugging Face format."""
        return self.path / "model"

    @property
    def best_model(self) -> Path:
        """Where the weights with the best evaluation go."""
        return self.path / "best_model"

    def create(self, config: Mapping[str, Any]) -> None:
        """Creates the folder, if it is not there, and writes config.yaml."""
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_config(config)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes config.yaml, which `--config` reads back, without what was meant for one start of the run."""
        lasting = {name: value for name, value in config.items() if name not in ("resume", "allow_config_change")}
        text = yaml.safe_dump(lasting, sort_keys=False, allow_unicode=True)
        (self.path / "config.yaml").write_text(text, encoding="utf-8")

    def discard_empty(self) -> None:
        """Takes back a folder in which nothing was written yet."""
        if self._before is None:
            with suppress(OSError):
                self.path.rmdir()

    def discard(self) -> None:
        """Takes back what the run made: one that fails before its first step is done leaves nothing half-written."""
        if not self.writes:
            return
        if self._before is None:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for entry in set(self.path.iterdir()) - self._before:
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()

    def clear(self) -> None:
        """Deletes what a former run left."""
        for name in LEFT_BY_A_RUN:
            entry = self.path / name
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        self._before = set(self.path.iterdir())

    def append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends one JSON object a line; numbers that are not finite become null, which every JSON reader takes.

        Raises:
            UserError: the disk does not take it.
        """
        if not self.writes:
            return
        with self.writing(name), (self.path / name).open("a", encoding="utf-8") as file:
            for record in records:
                text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, default=str)
                file.write(harmless_json(text) + "\n")

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Says in one sentence what a full or broken disk did not take: a UserError."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"--output_dir is {self.path}: {name} could not be written ({reason}); free space, and go on from the "
                "last checkpoint with --resume auto."
            ) from error

    def read(self, name: str) -> list[dict[str, Any]]:
        """Returns the lines of a file; none if there is no such file."""
        file = self.path / name
        if not file.exists():
            return []
        with file.open(encoding="utf-8") as lines:  # Not splitlines, which also splits inside of texts.
            return [json.loads(line) for line in lines]

    def lengths(self) -> dict[str, int]:
        """Returns the bytes of every file of lines, having made sure that they would survive a loss of power."""
        lengths = {}
        for name in LINES:
            if (self.path / name).exists():
                with (self.path / name).open("rb") as file:
                    os.fsync(file.fileno())
                    lengths[name] = os.fstat(file.fileno()).st_size
        return lengths

    def shorter_than(self, lengths: Mapping[str, int]) -> str | None:
        """Returns which file of lines has lost some since it had these lengths; None if none has."""
        for name, length in lengths.items():
            file = self.path / name
            if not file.exists() or file.stat().st_size < length:
                return f"{file} is shorter than it was then"
        return None

    def rewind(self, lengths: Mapping[str, int]) -> None:
        """Takes back all lines that were written since the files had these lengths."""
        for name in LINES:
            if (self.path / name).exists():
                os.truncate(self.path / name, lengths.get(name, 0))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file at once: whoever reads it sees all of it or none. Numbers that are not finite become null."""
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    partial.write_text(harmless_json(text) + "\n", encoding="utf-8")
    partial.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

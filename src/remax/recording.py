"""What a run leaves behind: its folder, its metrics line by line, its completions, its model card."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from remax.errors import UserError

RUN_FILES = ("metrics.jsonl", "config.yaml", "evaluation.json", "eval.jsonl", "model")
"""What tells that a folder holds a run."""


class RunFolder:
    """The output directory of one run."""

    def __init__(self, output_dir: str) -> None:
        """Checks that the folder can take a run; creates nothing yet.

        Raises:
            UserError: there is a file at that path, nothing can be written there, or the folder holds a run already.
        """
        self.path = Path(output_dir)
        self._check()
        self._before = set(self.path.iterdir()) if self.path.exists() else None

    def _check(self) -> None:
        output_dir = self.path
        ancestor = next(parent for parent in (self.path.absolute(), *self.path.absolute().parents) if parent.exists())
        if not os.access(ancestor, os.W_OK) or (not ancestor.is_dir() and ancestor != self.path.absolute()):
            raise UserError(f"--output_dir is {output_dir}: nothing can be written in {ancestor}; set another folder.")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output_dir is {output_dir}: that is a file; set the path of a new folder.")
        held = next((name for name in RUN_FILES if (self.path / name).exists()), None)
        if held is not None:
            raise UserError(
                f"--output_dir is {output_dir}: it already holds a run ({held}), which would be overwritten; "
                "set a new folder, or delete that one."
            )

    @property
    def model(self) -> Path:
        """Where the final model goes, in Hugging Face format."""
        return self.path / "model"

    @property
    def best_model(self) -> Path:
        """Where the weights with the best evaluation go."""
        return self.path / "best_model"

    def create(self, config: Mapping[str, Any]) -> None:
        """Creates the folder, if it is not there, and writes config.yaml, which `--config` reads back."""
        self._check()
        self.path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        (self.path / "config.yaml").write_text(text, encoding="utf-8")

    def discard(self) -> None:
        """Takes back what the run made: one that fails before its first step is done leaves nothing half-written."""
        if self._before is None:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for entry in set(self.path.iterdir()) - self._before:
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()

    def append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends one JSON object a line; numbers that are not finite become null, which every JSON reader takes."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, default=str) + "\n")

    def write_model_card(
        self, folder: Path, *, base_model: str, title: str, lines: Iterable[str], task: str = "text-generation"
    ) -> None:
        """Writes the README.md that the Hugging Face hub shows for a model."""
        front = {"library_name": "transformers", "tags": ["remax"], "pipeline_tag": task}
        if not Path(base_model).exists() and "/" in base_model:
            front["base_model"] = base_model
        versions = ", ".join(f"{name} {version(name)}" for name in ("remax-rlhf", "transformers", "torch", "trl"))
        body = [
            "---",
            yaml.safe_dump(front).strip(),
            "---",
            f"# {title}",
            "",
            *lines,
            "",
            f"Made with {versions}. The exact settings are in `config.yaml` of the run.",
            "",
        ]
        (folder / "README.md").write_text("\n".join(body), encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file at once: whoever reads it sees all of it or none. Numbers that are not finite become null."""
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

"""How a run was made, as its folder remembers it."""

import json
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from remax.errors import UserError
from remax.provenance import FILE, command_line, read_starts, record_start
from remax.recording import RunFolder


def test_every_start_is_kept_with_its_command_versions_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.create({})
    monkeypatch.setattr(sys, "argv", ["/usr/bin/remax", "train", "--model", "a b"])
    record_start(folder, 0)
    record_start(folder, 7, num_processes=2)
    first, second = read_starts(folder.path)
    assert (first["step"], first["num_processes"], second["step"], second["num_processes"]) == (0, 1, 7, 2)
    assert shlex.split(first["command"]) == ["remax", "train", "--model", "a b"]
    assert first["versions"]["torch"] == version("torch")
    assert first["directory"] == str(Path.cwd())
    assert first["hardware"]["cpu"]
    assert first["date"].endswith("+00:00")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/x/remax/__main__.py", "train", "-q"], ["remax", "train", "-q"]),
        (["scripts/own.py", "--n", "1"], ["python", "scripts/own.py", "--n", "1"]),
        ([""], ["remax"]),
        (["-c"], ["python", "-c"]),
    ],
)
def test_the_command_can_be_run_again(argv: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == expected


def test_what_cannot_be_read_is_nothing(tmp_path: Path) -> None:
    assert read_starts(tmp_path) == []
    for content in ("", "{", "[]", '{"starts": 1}', '{"starts": [1, {"step": 3}]}', "[" * 100_000, "\0"):
        (tmp_path / FILE).write_text(content)
        assert read_starts(tmp_path) == ([{"step": 3}] if "step" in content else [])


def test_a_process_that_only_follows_writes_nothing(tmp_path: Path) -> None:
    following: Any = SimpleNamespace(writes=False, path=tmp_path)
    record_start(following, 0)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_nothing_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.create({})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("remax.provenance.write_json", full)
    with pytest.raises(UserError, match=r"provenance.json could not be written \(No space left on device\)"):
        record_start(folder, 0)
    assert json.loads((folder.path / "config.yaml").read_text()) == {}

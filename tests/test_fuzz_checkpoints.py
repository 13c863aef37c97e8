"""Checkpoints with flipped bits, missing ends and foreign contents: the damaged one is named, an intact one is used."""

import contextlib
import json
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors import SafetensorError

from fuzzing import fuzz, outcome
from remax.checkpoint.files import MANIFEST, digest_of, list_checkpoints, write_json
from remax.checkpoint.start import Start, find_start
from remax.errors import UserError
from remax.recording import RunFolder
from test_security import Exploit
from toy_training import lively, make_trainer

STEPS = 3
ALLOWED = {"allow_config_change": True}
SETTINGS = {"max_steps": STEPS, "save_steps": 1, "save_total_limit": STEPS}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trainer of a run that has a checkpoint of every step."""
    trainer = make_trainer(tmp_path_factory.mktemp("run") / "out", lively, **SETTINGS)
    trainer.train()
    assert len(list_checkpoints(trainer.folder.path)) == STEPS
    return trainer


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {
        file.relative_to(checkpoint).as_posix(): file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()
    }


def damage(file: Path, kind: str, place: float, bit: int, garbage: bytes) -> None:
    content = file.read_bytes()
    at = min(int(place * len(content)), len(content) - 1)
    if kind == "flipped":
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
    elif kind == "truncated":
        file.write_bytes(content[:at])
    elif kind == "garbage":
        file.write_bytes(garbage)
    elif kind == "longer":
        file.write_bytes(content + garbage)
    elif kind == "inside":
        file.write_bytes(content[:at] + garbage + content[at:])
    else:
        file.unlink()


def test_a_damaged_checkpoint_is_never_used(ended: Any, tmp_path: Path, capsys: Any) -> None:
    folder = ended.folder.path
    whole = {path.name: contents(path) for path in list_checkpoints(folder)}
    files = sorted(str(path.relative_to(folder)) for path in (folder / "checkpoints").rglob("*") if path.is_file())
    files += ["metrics.jsonl", "completions.jsonl", "config.yaml"]
    # The newest ones are what a run would go on from, the manifests what it believes.
    likely = [name for name in files if "step-000003" in name or MANIFEST in name or "run.json" in name]
    kinds = st.sampled_from(["flipped", "flipped", "flipped", "truncated", "garbage", "longer", "inside", "deleted"])
    one = st.tuples(
        st.sampled_from([*files, *likely]), kinds, st.floats(0, 1), st.integers(0, 7), st.binary(min_size=1, max_size=9)
    )
    args = ended.args
    config = json.loads((folder / "checkpoints" / "run.json").read_text())["config"]
    copy = tmp_path / "copy"

    def check(damages: list[tuple[Any, ...]]) -> None:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("model", "best_model"))
        for name, *how in damages:
            if (copy / name).exists() and (copy / name).stat().st_size:
                damage(copy / name, *how)
        before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        options = type(args)(**{**vars(args), "output_dir": str(copy), "resume": "auto"})
        start = outcome(lambda: find_start(RunFolder(str(copy), resumes=True), options, config, kind="train"))
        printed = capsys.readouterr().out
        assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before, "it only looks"
        if start is None:
            return
        assert isinstance(start, Start)
        used = start.checkpoint
        for path in reversed(list_checkpoints(copy)):
            if path == used:
                own = contents(path)
                manifests = (json.loads(own.pop(MANIFEST)), json.loads(whole[path.name][MANIFEST]))
                assert own == {name: content for name, content in whole[path.name].items() if name != MANIFEST}
                assert manifests[0] == manifests[1]
                break
            assert f"The checkpoint {path} cannot be used" in printed

    fuzz("damaged checkpoints", st.lists(one, min_size=1, max_size=4), check)


@pytest.mark.parametrize("name", ["training.pt", "policy.safetensors", "state.json"])
def test_a_checkpoint_with_foreign_contents_runs_nothing(name: str, ended: Any, tmp_path: Path) -> None:
    """As one that was downloaded may be: its checksums are right, and what it holds is a pickle of somebody's code."""
    copy, marker = tmp_path / "out", tmp_path / "marker"
    shutil.copytree(ended.folder.path, copy)
    newest = list_checkpoints(copy)[-1]
    torch.save(Exploit(marker), newest / name)
    manifest = json.loads((newest / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": (newest / name).stat().st_size, "sha256": digest_of(newest / name)}
    write_json(newest / MANIFEST, manifest)

    with contextlib.suppress(UserError, UnpicklingError, SafetensorError):  # or an older one is used
        trainer = make_trainer(copy, lively, **{**SETTINGS, "max_steps": STEPS + 1, "resume": "auto", **ALLOWED})
        trainer.train()
    assert not marker.exists()

"""Checkpoints: written completely or not at all, verified, rotated; changes of settings, and what is beside them."""

import contextlib
import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from remax import saving
from remax.checkpoint import files, state
from remax.checkpoint.changes import changes
from remax.checkpoint.files import list_checkpoints, path_of, problem_of, rotate, write_checkpoint
from remax.checkpoint.start import find_start
from remax.config import ReMaxConfig
from remax.errors import GuardStop, UserError
from remax.recording import RunFolder
from toy_training import lively, make_trainer

CONFIG = {"learning_rate": 0.1, "output_dir": "out", "logging_steps": 1}


def write(folder: Path, step: int, **facts: Any) -> Path:
    """Writes a checkpoint with some content and returns its path."""

    def fill(partial: Path) -> None:
        (partial / "weights.bin").write_bytes(random.Random(step).randbytes(5000))
        plain = {"kind": "train", "ended": False, "config": CONFIG, "lengths": {}, "fingerprints": {}, "versions": {}}
        files.write_json(partial / "state.json", {**plain, "step": step, **facts})

    write_checkpoint(path_of(folder, step), fill)
    return path_of(folder, step)


def begun(folder: Path, *steps: int, **run: Any) -> RunFolder:
    """Returns the folder of a run that has these checkpoints."""
    for step in steps:
        write(folder, step)
    (folder / "checkpoints").mkdir(exist_ok=True)
    files.write_json(folder / "checkpoints" / "run.json", {"kind": "train", "config": CONFIG, **run})
    return RunFolder(str(folder), resumes=True)


def start_of(folder: RunFolder, config: Any = None, **options: Any) -> Any:
    args = ReMaxConfig(**{"output_dir": str(folder.path), "resume": "auto", **options})
    return find_start(folder, args, config or CONFIG, kind="train")


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = path_of(tmp_path, 7)

    def fill(partial: Path) -> None:
        (partial / "a").write_text("a")
        assert not path.exists()
        assert list_checkpoints(tmp_path) == []
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_checkpoint(path, fill)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert problem_of(write(tmp_path, 7)) is None
    assert list_checkpoints(tmp_path) == [path]


def test_everything_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = files.sync, Path.rename
    monkeypatch.setattr(files, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(f"rename {to.name}"), rename(self, to))[1])
    write(tmp_path, 3)
    partial = ".step-000003.partial"
    assert events == [
        *(".state.json.partial", partial, "state.json", "weights.bin", ".manifest.json.partial", partial),
        *("rename step-000003", "checkpoints"),
    ]


def damages() -> dict[str, Callable[[Path], None]]:
    def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
        return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))  # type: ignore[return-value]

    flip = lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]  # noqa: E731
    return {
        "a bit of weights.bin": edit("weights.bin", flip),
        "a bit of state.json": edit("state.json", flip),
        "weights.bin cut": edit("weights.bin", lambda data: data[:-1]),
        "weights.bin longer": edit("weights.bin", lambda data: data + b"x"),
        "weights.bin gone": lambda path: (path / "weights.bin").unlink(),
        "state.json gone": lambda path: (path / "state.json").unlink(),
        "manifest gone": lambda path: (path / "manifest.json").unlink(),
        "manifest cut": edit("manifest.json", lambda data: data[:100]),
        "manifest empty": edit("manifest.json", lambda data: b""),
        "manifest of another kind": edit("manifest.json", lambda data: b"[1, 2]"),
        "manifest without files": edit("manifest.json", lambda data: b'{"format": 1, "files": {}}'),
        "another format": edit("manifest.json", lambda data: data.replace(b'"format": 1', b'"format": 2')),
        "not text": edit("manifest.json", lambda data: b"\xff" + data),
    }


@pytest.mark.parametrize("name", damages())
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, name: str, capsys: Any) -> None:
    folder = begun(tmp_path, 1, 2)
    damages()[name](path_of(tmp_path, 2))
    start = start_of(folder)
    assert start.checkpoint == path_of(tmp_path, 1)
    assert start.facts["step"] == 1
    said = capsys.readouterr().out
    assert f"The checkpoint {path_of(tmp_path, 2)} cannot be used: " in said
    assert problem_of(path_of(tmp_path, 2)) in said
    shutil.rmtree(path_of(tmp_path, 1))
    with pytest.raises(UserError, match=r"no usable checkpoint is left \(.*step-000002 \("):
        start_of(folder)
    with pytest.raises(UserError, match="no usable checkpoint is left"):
        start_of(folder, resume=str(path_of(tmp_path, 2)))


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path) -> None:
    """In every file, at random places; a flip in the manifest's white space may do no harm, and is not found then."""
    moment = random.Random(5)
    path = write(tmp_path, 1)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for _ in range(60):
            place, bit = moment.randrange(len(whole)), 1 << moment.randrange(8)
            file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            harmless = file.name == "manifest.json" and _same_json(file.read_bytes(), whole)
            assert (problem_of(path) is None) == harmless, (file.name, place, bit)
            file.write_bytes(whole[:place])
            harmless = file.name == "manifest.json" and _same_json(file.read_bytes(), whole)
            assert (problem_of(path) is None) == harmless, (file.name, place)
        file.write_bytes(whole)
    assert problem_of(path) is None


def _same_json(text: bytes, other: bytes) -> bool:
    with contextlib.suppress(ValueError):
        return bool(json.loads(text) == json.loads(other))
    return False


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    def kept(limit: int, best: int | None) -> list[int]:
        folder = tmp_path / f"{limit}-{best}"
        for step in (1, 2, 3, 4):
            write(folder, step)
        rotate(folder, limit, best)
        assert not list((folder / "checkpoints").glob(".*"))
        return [files.step_of(path) for path in list_checkpoints(folder)]

    assert kept(2, None) == [3, 4]
    assert kept(2, 1) == [1, 4]
    assert kept(1, 1) == [1, 4], "the newest one is what a run goes on from"
    assert kept(3, 2) == [2, 3, 4]
    assert kept(3, 4) == [2, 3, 4]
    assert kept(3, 99) == [2, 3, 4], "no checkpoint is of the best step"
    assert kept(9, 1) == [1, 2, 3, 4]


def test_the_best_checkpoint_outlives_newer_ones(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "out", lively, max_steps=6, save_steps=1, eval_steps=1, eval_dataset=_prompts(), save_total_limit=2
    )
    evaluate, values = trainer.evaluate, iter([0.0, 1.0, 9.0, 2.0, 3.0, 4.0, 5.0])

    def evaluated() -> Any:
        evaluation = evaluate()
        evaluation.values["reward"][:] = next(values)
        return evaluation

    trainer.evaluate = evaluated
    trainer.train()
    assert [files.step_of(path) for path in list_checkpoints(tmp_path / "out")] == [2, 6]


def _prompts() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "who"}, {"prompt": "what"}])


def test_a_longer_number_of_steps_is_sorted_as_a_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 5):
        write(tmp_path, step)
    assert [files.step_of(path) for path in list_checkpoints(tmp_path)] == [5, 999_999, 1_000_000]


# What may be in it ----------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch pwned",))


def test_no_pickle_of_a_checkpoint_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-000001"
    path.mkdir()
    torch.save({"generators": Evil()}, path / state.TRAINING)
    with pytest.raises(UserError, match=r"it cannot be read \(UnpicklingError\)"):
        state._load(path)
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_is_plain_data(tmp_path: Path) -> None:
    make_trainer(tmp_path / "out", lively, max_steps=2, save_steps=1, method="ppo").train()
    path = path_of(tmp_path / "out", 2)
    assert sorted(file.name for file in path.iterdir()) == [
        *("manifest.json", "policy.safetensors", "state.json", "training.pt", "value_model.safetensors"),
    ]
    facts = files.read_facts(path)
    assert facts["step"] == 2
    assert facts["ended"]
    assert facts["lengths"]["metrics.jsonl"] == (tmp_path / "out" / "metrics.jsonl").stat().st_size
    training = torch.load(path / "training.pt", weights_only=True)
    assert set(training) == {"learners", "parts", "generators"}
    assert set(training["learners"]) == {"policy", "value_model"}


def test_lines_that_were_lost_make_a_checkpoint_unusable(tmp_path: Path) -> None:
    begun(tmp_path, 1)
    write(tmp_path, 2, lengths={"metrics.jsonl": 10})
    (tmp_path / "metrics.jsonl").write_text("123456789")
    assert start_of(RunFolder(str(tmp_path), resumes=True)).checkpoint == path_of(tmp_path, 1)
    (tmp_path / "metrics.jsonl").write_text("1234567890")
    assert start_of(RunFolder(str(tmp_path), resumes=True)).checkpoint == path_of(tmp_path, 2)


# Changes of settings --------------------------------------------------------------------------------------------------


def test_changes_are_named_and_what_cannot_change_numbers_does_not_count(tmp_path: Path, capsys: Any) -> None:
    before = {"beta": 0.1, "names": ["a"], "clip": None, "seed": 1, "gone": 1, "report_to": ["none"], "resume": "none"}
    now = {"beta": 0.2, "names": ("a",), "clip": 5, "seed": 1, "new": 2, "report_to": [], "resume": "auto"}
    assert changes(before, now) == ["beta: 0.1 -> 0.2", "clip: None -> 5"]
    folder = begun(tmp_path, 1)
    other = {"learning_rate": 0.2, "output_dir": "elsewhere", "logging_steps": 9}
    with pytest.raises(UserError, match=r"other settings \(learning_rate: 0.1 -> 0.2\) .*--allow_config_change"):
        start_of(folder, other)
    assert start_of(folder, other, allow_config_change=True).checkpoint == path_of(tmp_path, 1)
    assert "learning_rate: 0.1 -> 0.2" in capsys.readouterr().out
    assert start_of(folder, {**CONFIG, "logging_steps": 9}).checkpoint == path_of(tmp_path, 1)


def test_a_run_of_another_command_is_refused(tmp_path: Path) -> None:
    folder = begun(tmp_path, kind="sft")
    with pytest.raises(UserError, match="it holds a run of `remax sft`, which `remax train` cannot go on with"):
        start_of(folder)
    (tmp_path / "checkpoints" / "run.json").write_text("{")
    with pytest.raises(UserError, match="holds no training with checkpoints"):
        start_of(folder)
    nowhere = RunFolder(str(tmp_path / "nowhere"), resumes=True)
    with pytest.raises(UserError, match=r"--resume is x: there is no training in .*nowhere to go on with"):
        start_of(nowhere, resume="x")


def test_a_run_that_was_killed_while_it_made_its_folder_begins_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    folder = RunFolder(str(tmp_path), resumes=True)
    assert start_of(folder).over
    begun(tmp_path)
    assert start_of(folder).over
    (tmp_path / "config.yaml").write_text("learning_rate: 0.1")
    assert start_of(folder).over


def test_files_that_somebody_made_up_are_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = begun(tmp_path, 1, 2)
    write_checkpoint(path_of(tmp_path, 3), lambda partial: files.write_json(partial / "state.json", {"lengths": 5}))
    assert start_of(folder).checkpoint == path_of(tmp_path, 2)
    out = tmp_path / "out"
    make_trainer(out, lively, max_steps=2, save_steps=1).train()
    training = torch.load(path_of(out, 1) / "training.pt", weights_only=True)
    del training["parts"]
    shutil.rmtree(path_of(out, 2))
    torch.save(training, path_of(out, 1) / "training.pt")
    path_of(out, 1).rename(tmp_path / "made-up")
    files.publish(tmp_path / "made-up", path_of(out, 1))
    with pytest.raises(UserError, match=r"step-000001: it cannot be read \(KeyError\), so it is none that remax wrote"):
        make_trainer(out, lively, max_steps=2, save_steps=1, resume="auto").train()


# Beside a run ---------------------------------------------------------------------------------------------------------


def test_nothing_of_the_users_is_deleted_beside_the_checkpoints(tmp_path: Path) -> None:
    """Checkpoints of transformers, in a folder that a run is given."""
    out = tmp_path / "out"
    foreign = out / "checkpoint-500" / "model.safetensors"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    make_trainer(out, lively, max_steps=2, save_steps=1).train()
    (out / "checkpoints" / "checkpoint-1").mkdir()
    (out / "checkpoints" / ".step-000009.partial").mkdir()
    shutil.rmtree(out / "model")
    make_trainer(out, lively, max_steps=2, save_steps=1, resume="auto").train()
    assert foreign.read_text() == "mine"
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["run.json", "step-000001", "step-000002"]


def test_the_checkpoint_that_a_guard_names_outlives_its_stop(tmp_path: Path) -> None:
    out = tmp_path / "out"
    trainer = make_trainer(out, lively, max_steps=4, save_steps=1, save_total_limit=1)
    stops = trainer.guards.stop_if_needed

    def stop() -> None:
        stops()
        if trainer.state.global_step == 4:
            raise GuardStop(f"Go back to {trainer.last_checkpoint}.")

    trainer.guards.stop_if_needed = stop
    with pytest.raises(GuardStop, match="step-000003"):
        trainer.train()
    assert list_checkpoints(out) == [path_of(out, 3), path_of(out, 4)]
    assert files.read_facts(path_of(out, 4))["ended"], "no step is left to take"
    make_trainer(out, lively, max_steps=4, save_steps=1, save_total_limit=1, resume="auto").train()
    assert make_trainer(out, lively, max_steps=4, save_steps=1, save_total_limit=1, resume="auto").session.finished


def test_a_run_killed_in_the_middle_of_run_json_begins_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".run.json.partial").write_text('{"kind": "tr')
    assert start_of(RunFolder(str(tmp_path), resumes=True)).over


def test_a_model_is_on_the_disk_with_its_card_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(files, "sync", lambda path: events.append(path.name))
    monkeypatch.setattr(saving, "sync", lambda path: events.append(path.name))

    def renamed(self: Path, to: Path) -> Path:
        events.append(f"rename {to.name}")
        assert (self / "README.md").exists()
        return rename(self, to)

    trainer = make_trainer(tmp_path / "out", lively, save_steps=-1)
    monkeypatch.setattr(Path, "rename", renamed)
    trainer.save_model(tmp_path / "out" / "model")
    assert events[-3:] == [".model.partial", "rename model", "out"]
    assert {"README.md", "model.safetensors", "config.json"} <= set(events[:-3])

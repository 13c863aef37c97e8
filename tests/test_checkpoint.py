"""Checkpoints: written completely or not at all, verified, rotated; locks, changes of settings, full disks."""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from kill_harness import forked
from remax import saving
from remax.checkpoint import files, state, writer
from remax.checkpoint.changes import changes
from remax.checkpoint.files import list_checkpoints, path_of, problem_of, rotate, write_checkpoint
from remax.checkpoint.lock import RunLock
from remax.checkpoint.start import find_start
from remax.config import ReMaxConfig
from remax.errors import GuardStop, UserError
from remax.progress import PlainLines
from remax.recording import RunFolder
from toy_training import lively, make_trainer, read

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


# One run at a time ----------------------------------------------------------------------------------------------------


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    second.check_free()
    first.acquire()
    with pytest.raises(UserError, match=rf"a run is going on there \(process {os.getpid()} on "):
        second.acquire()
    with pytest.raises(UserError, match="a run is going on there"):
        second.check_free()
    first.release()
    second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_outlives_the_run_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    (reader, keeps_alive), (knows, tells) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(keeps_alive)
        os.write(tells, b"x")
        os.read(reader, 1)
        os._exit(0)
    os.read(knows, 1)
    assert lock._descriptor is not None
    os.close(lock._descriptor)  # As when this process dies: nobody releases anything.
    RunLock(tmp_path).acquire()
    os.close(keeps_alive)
    os.waitpid(child, 0)


# Full disks -----------------------------------------------------------------------------------------------------------


def full_disk(monkeypatch: pytest.MonkeyPatch, *, from_step: int = 0, until_step: int = 99) -> None:
    """Lets the disk be full while checkpoints of these steps are written."""
    save = state.Snapshot.write

    def write(self: Any, folder: Path) -> None:
        save(self, folder)
        if from_step <= self.facts["step"] <= until_step:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state.Snapshot, "write", write)


class Notes:
    """A view that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, max_steps: int, step: int = 0) -> None: ...
    def update(self, metrics: Any, sample: Any) -> None: ...
    def note(self, line: str) -> None:
        self.lines.append(line)

    def stop(self) -> None: ...


def test_a_full_disk_is_warned_of_and_the_older_checkpoint_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    full_disk(monkeypatch, from_step=2, until_step=3)
    trainer = make_trainer(out, lively, max_steps=5, save_steps=1, save_total_limit=9)
    trainer.view = notes = Notes()
    trainer.train()
    warnings = [line for line in notes.lines if line.startswith("Warning")]
    assert warnings == [
        f"Warning: --output_dir is {out}: the checkpoint of step {step} could not be written (No space left on "
        f"device), the last good one is {path_of(out, 1)}; the run goes on and tries again at the next one."
        for step in (2, 3)
    ]
    assert [files.step_of(path) for path in list_checkpoints(out)] == [1, 4, 5]
    assert all(problem_of(path) is None for path in list_checkpoints(out))
    assert len(read(out / "metrics.jsonl")) == 5


def test_without_memory_for_a_copy_a_full_disk_is_warned_of_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    full_disk(monkeypatch, from_step=2, until_step=2)
    trainer = make_trainer(out, lively, max_steps=3, save_steps=1, save_total_limit=9)
    trainer.view, trainer.session.free_memory = Notes(), lambda: 0
    trainer.train()
    warnings = [line for line in trainer.view.lines if line.startswith("Warning")]
    assert len(warnings) == 1
    assert "step 2 could not be written (No space left on device), the last good one is" in warnings[0]
    assert [files.step_of(path) for path in list_checkpoints(out)] == [1, 3]


def test_the_last_state_must_be_saved_but_the_model_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    full_disk(monkeypatch, from_step=3)
    with pytest.raises(
        UserError, match=r"checkpoint of step 3 could not be written .*the last good one is .*-000002; "
    ):
        make_trainer(out, lively, max_steps=3, save_steps=1).train()
    assert (out / "model" / "model.safetensors").exists()
    assert [files.step_of(path) for path in list_checkpoints(out)] == [1, 2]


def test_metrics_that_cannot_be_written_end_the_run_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    trainer = make_trainer(out, lively, max_steps=5, save_steps=1)
    opened = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "a" and trainer.state.global_step == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"metrics.jsonl could not be written \(No space left .*--resume auto"):
        trainer.train()
    assert files.step_of(list_checkpoints(out)[-1]) == 3


class Fills(TrainerCallback):  # type: ignore[misc]
    """Lets no file grow beyond 20 kB while the states of steps 2 and 3 are written."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        limit = 20_000 if state.global_step in (2, 3) else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def train_on_a_small_disk(out: str) -> int:
    trainer = make_trainer(Path(out), lively, max_steps=5, save_steps=1, save_total_limit=9, callbacks=[Fills()])
    trainer.view = PlainLines()
    trainer.train()
    return 0


def test_files_that_the_system_does_not_let_grow(tmp_path: Path) -> None:
    """A real refusal in the middle of a file, through safetensors and torch, in a process of its own."""
    out = tmp_path / "out"
    running = forked(train_on_a_small_disk, (str(out),), tmp_path / "log")
    assert running.wait() == 0, running.log.read_text()
    said = running.log.read_text()
    assert said.count("could not be written") == 2, said
    assert [files.step_of(path) for path in list_checkpoints(out)] == [1, 4, 5]
    assert all(problem_of(path) is None for path in list_checkpoints(out))
    assert not list((out / "checkpoints").glob(".*"))


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


def test_a_run_that_another_one_overtook_touches_nothing(tmp_path: Path) -> None:
    """It looked where to begin before it had the lock."""
    out, settings = tmp_path / "out", {"max_steps": 4, "save_steps": 1, "save_total_limit": 9}
    make_trainer(out, lively, **settings).train()
    shutil.rmtree(out / "model")
    shutil.rmtree(path_of(out, 4))
    slow = make_trainer(out, lively, **settings, resume="auto")
    new = make_trainer(tmp_path / "new", lively, **settings, resume="auto")
    make_trainer(out, lively, **settings, resume="auto").train()
    make_trainer(tmp_path / "new", lively, **settings).train()
    for folder, late in ((out, slow), (tmp_path / "new", new)):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with pytest.raises(UserError, match=r"another run wrote there meanwhile, .*; start it again"):
            late.train()
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


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


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "metrics.jsonl"])
def test_a_disk_that_fills_up_anywhere_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out = tmp_path / "out"
    trainer = make_trainer(out, lively, max_steps=2, save_steps=1)
    wrote = Path.write_text

    def full(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return wrote(self, *args, **kwargs)

    def full_tokenizer(*_: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # as tokenizers does

    monkeypatch.setattr(Path, "write_text", full)
    if name == "tokenizer.json":
        monkeypatch.setattr(trainer.parts.tokenizer, "save_pretrained", full_tokenizer)
    if name == "metrics.jsonl":
        monkeypatch.setattr(trainer.folder, "lengths", wrote_nothing)
    with pytest.raises(UserError, match=r"(model|step 2) could not be written \(No space left.*\); free space"):
        trainer.train()
    assert (out / "model").exists() == (name == "metrics.jsonl")
    trainer.session.lock.check_free()


def wrote_nothing() -> dict[str, int]:
    raise OSError(errno.ENOSPC, "No space left on device")


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


def test_the_lock_is_given_back_whatever_fails_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path / "out", lively, save_steps=0)
    monkeypatch.setattr(trainer.view, "stop", lambda: {}["bug"])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError, match="bug"):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "out" / ".lock").exists()
    trainer = make_trainer(tmp_path / "other", lively, save_steps=0)
    monkeypatch.setattr(trainer.session.writer, "wait", lambda: {}["bug"])
    trainer.session.lock.path.parent.mkdir()
    trainer.session.lock.acquire()
    with pytest.raises(KeyError, match="bug"):
        trainer.session.end()
    assert not (tmp_path / "other" / ".lock").exists()


# In the background ----------------------------------------------------------------------------------------------------


def test_a_step_goes_on_while_the_last_state_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state of its step: later updates do not reach it."""
    make_trainer(tmp_path / "whole", lively, max_steps=4, save_steps=2, save_total_limit=9).train()
    save, may_write, waited = state.Snapshot.write, threading.Event(), []

    def slow(self: Any, folder: Path) -> None:
        waited.append((self.facts["step"], threading.current_thread().name, may_write.wait(20)))
        save(self, folder)

    monkeypatch.setattr(state.Snapshot, "write", slow)
    trainer = make_trainer(tmp_path / "slow", lively, max_steps=4, save_steps=2, save_total_limit=9)
    step = trainer.step

    def third_step_frees_the_disk(prompts: Any, number: int) -> Any:
        record = step(prompts, number)
        if number == 3:
            assert list_checkpoints(tmp_path / "slow") == []
            may_write.set()
        return record

    trainer.step = third_step_frees_the_disk
    trainer.train()
    assert waited == [(2, "remax-checkpoint", True), (4, threading.main_thread().name, True)]
    for name in ("policy.safetensors", "training.pt"):
        written = (path_of(tmp_path / folder, 2) / name for folder in ("whole", "slow"))
        assert len({file.read_bytes() for file in written}) == 1, name


def test_without_memory_for_a_copy_it_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    run = writer.Writer._run
    monkeypatch.setattr(
        writer.Writer, "_run", lambda self, job: (threads.append(threading.current_thread().name), run(self, job))
    )
    trainer = make_trainer(tmp_path / "out", lively, max_steps=4, save_steps=2)
    weights = sum(p.nbytes for p in trainer.parts.policy.parameters())
    sizes = []
    trainer.session.free_memory = lambda: sizes.append(state.num_bytes(trainer)) or 2 * sizes[-1]
    trainer.train()
    assert threads == [threading.main_thread().name] * 2
    assert sizes[0] == pytest.approx(3 * weights, rel=0.01), "weights and two moments"


def test_an_error_of_ours_in_the_background_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.Snapshot, "write", lambda self, folder: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        make_trainer(tmp_path / "out", lively, max_steps=3, save_steps=1).train()

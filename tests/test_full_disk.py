"""Checkpoints on a disk that is full, and while the next step goes on."""

import errno
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from kill_harness import forked
from remax.checkpoint import files, state, writer
from remax.checkpoint.files import list_checkpoints, path_of, problem_of
from remax.errors import UserError
from remax.progress import PlainLines
from toy_training import lively, make_trainer, read

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

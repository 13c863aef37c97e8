"""One run at a time in a folder: the lock, and a run that lost it."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from remax.checkpoint.files import path_of
from remax.checkpoint.lock import RunLock
from remax.errors import UserError
from toy_training import lively, make_trainer


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

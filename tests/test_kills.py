"""Real runs of the command line that are killed, interrupted and stopped from outside."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from kill_harness import WRITING, flags, make_world, outcome, partials, start, steps_done, survive, until
from remax.checkpoint.files import list_checkpoints, problem_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def killed_equals_whole(
    world: Path, folder: Path, method: str, *, kills: int, writing: int, max_steps: int, real: bool, **changes: Any
) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"{method}: the moments of the kills have seed {seed}")
    changes["max_steps"] = max_steps
    whole = start(flags(world, folder / "whole", method, **changes), folder / "whole.log", real=real)
    assert whole.wait() == 0, whole.log.read_text()
    told = survive(
        folder / "killed",
        flags(world, folder / "killed", method, **changes),
        random.Random(seed),
        max_steps=max_steps,
        kills=kills,
        writing=writing,
        real=real,
    )
    print(f"{method}: killed {len(told)} times: {'; '.join(told)}")
    assert sum(WRITING in line for line in told) >= writing
    expected, found = outcome(folder / "whole"), outcome(folder / "killed")
    assert expected["steps"] == list(range(1, max_steps + 1)), "no step is missing or there twice"
    for name, value in expected.items():
        assert found[name] == value, f"{name} differs; {told}"
    assert expected.keys() == found.keys()
    assert not partials(folder / "killed"), "nothing half-written is left"
    assert all(problem_of(checkpoint) is None for checkpoint in list_checkpoints(folder / "killed"))


def test_three_kills_change_nothing(world: Path, tmp_path: Path) -> None:
    killed_equals_whole(world, tmp_path, "remax", kills=3, writing=1, max_steps=12, real=False)


def test_a_kill_changes_nothing_for_ppo(world: Path, tmp_path: Path) -> None:
    killed_equals_whole(world, tmp_path, "ppo", kills=1, writing=0, max_steps=8, real=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["remax", "ppo"])
def test_twenty_kills_change_nothing(world: Path, tmp_path: Path, method: str) -> None:
    killed_equals_whole(
        world, tmp_path, method, kills=20, writing=5, max_steps=60, real=True, reward_timeout_seconds=60
    )


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130)])
def test_a_signal_finishes_the_step_and_saves(
    world: Path, tmp_path: Path, number: signal.Signals, name: str, code: int
) -> None:
    out = tmp_path / "out"
    arguments = flags(world, out, "remax", save_steps=0, max_steps=2000, eval_steps=0, lr_scheduler_type="constant")
    running = start(arguments, tmp_path / "log", real=False)
    for _ in until(60):
        if steps_done(out) >= 2 or running.poll() is not None:
            break
    os.kill(running.pid, number)
    assert running.wait() == code, running.log.read_text()
    log, steps = running.log.read_text(), steps_done(out)
    checkpoint = out / "checkpoints" / f"step-{steps:06d}"
    assert f"remax: {name}: stopped after step {steps}, with its state saved in {checkpoint}; go on with" in log
    assert "Traceback" not in log
    assert problem_of(checkpoint) is None
    assert (out / "report.html").exists()
    assert not (out / ".lock").exists()


def test_a_second_ctrl_c_stops_at_once(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    slow = tmp_path / "slow.py"
    slow.write_text("import time\n\ndef lively(completions, **kwargs):\n    time.sleep(30)\n")
    arguments = flags(world, out, "remax", reward_funcs=f"{slow}:lively", eval_dataset=world / "held_out.jsonl")
    running = start(arguments, tmp_path / "log", real=False)
    for _ in until(60):
        if (out / "checkpoints" / "run.json").exists():
            break
    time.sleep(0.5)
    os.kill(running.pid, signal.SIGINT)
    for _ in until(10):
        if "again to stop at once" in running.log.read_text():
            break
    asked = time.monotonic()
    os.kill(running.pid, signal.SIGINT)
    assert running.wait() == 130, running.log.read_text()
    assert time.monotonic() - asked < 10
    assert not out.exists(), "no step was done: nothing stays written"


def test_two_runs_in_one_folder_and_a_lock_that_dies_with_its_process(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(flags(world, out, "remax", max_steps=2000, eval_steps=0), tmp_path / "first.log", real=False)
    for _ in until(60):
        if steps_done(out) >= 2:
            break
    arguments = flags(world, out, "remax", max_steps=2000, eval_steps=0)
    second = start([*arguments, "--resume", "auto"], tmp_path / "second.log", real=False)
    assert second.wait() == 2
    log = second.log.read_text()
    assert f"--output_dir is {out}: a run is going on there (process {first.pid} on " in log
    assert first.poll() is None, "the first one is not disturbed"
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert (out / ".lock").exists()
    third = start([*arguments, "--resume", "auto", "--save_steps", "0"], tmp_path / "third.log", real=False)
    done = steps_done(out)
    for _ in until(60):
        if steps_done(out) > done + 1 or third.poll() is not None:
            break
    os.kill(third.pid, signal.SIGTERM)
    assert third.wait() == 143, third.log.read_text()
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))

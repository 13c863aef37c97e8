"""Reward functions in processes of their own: everything works as in this process, and nothing they do stops a run."""

import asyncio
import datetime
import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from isolated_functions import CODE
from remax.errors import UserError
from remax.interfaces import Completion, Prompt
from remax.rewards import CallableReward, score
from remax.rewards.isolation import IsolatedReward
from remax.rewards.named import named_function

NAN = math.nan


def completion(prompt: Any, text: str, **columns: Any) -> Completion:
    return Completion(Prompt(0, prompt, [7, 8], columns), 0, [9, 1], [-1.0, -1.0], False, text)


def two(first: str = "a") -> list[Completion]:
    return [completion("p0", first), completion("p1", "bb")]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "neighbour.py").write_text("")
    (folder / "mine.py").write_text(CODE)
    return folder / "mine.py"


@pytest.fixture
def make(file: Path) -> Iterator[Any]:
    made: list[IsolatedReward] = []

    def make(name: str, timeout_seconds: float = 20.0) -> IsolatedReward:
        made.append(IsolatedReward(f"{file}:{name}", timeout_seconds=timeout_seconds))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends; one that is dead and not yet buried has ended."""
    for _ in range(int(seconds / 0.02)):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


# It works as in this process ------------------------------------------------------------------------------------------


def test_a_function_gets_and_gives_everything_across_the_boundary(make: Any, capsys: Any) -> None:
    day = datetime.date(2026, 2, 3)
    rows = [completion([{"role": "user", "content": text}], text, answer=["x", 1], day=day) for text in ("a", "bb")]
    reward = make("everything")
    reward.trainer_state = SimpleNamespace(global_step=7, best_metric=None, log_history=[{}], lock=threading.Lock())
    assert reward.name == "everything"
    assert reward(rows) == [7.0, None]
    assert reward.pop_metrics() == {"share": 0.5}
    assert reward.pop_extra() == {"first": ["a", "bb"], "day": ["2026-01-01"] * 2}
    assert reward.pop_extra() == {}
    printed = "\ufffd[1mseen\ufffd[0m " + str([row.prompt.content for row in rows]) + " café\n"
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("name", "expected"),
    [("waits", [1.0, 2.0]), ("missing", [NAN, math.inf]), ("main_thread", [1.0, 1.0]), ("no_torch", [0.0, 0.0])],
)
def test_functions_of_all_kinds(name: str, expected: list[float], make: Any) -> None:
    assert repr(make(name)(two())) == repr(expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("short", "has short: it returned 1 rewards; return a list of 2"),
        ("words", r"has words: one reward is a str \('good'\)"),
        ("own_user_error", "^set something else.$"),
        ("needs_solution", r"has needs_solution\(completions, solution\): it cannot be called"),
    ],
)
def test_mistakes_of_the_user_stay_mistakes(name: str, said: str, make: Any) -> None:
    with pytest.raises(UserError, match=said):
        make(name)(two())


def test_what_is_found_at_the_start_is_one_sentence(make: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--reward_funcs has nowhere.py:f: there is no file nowhere.py; set"):
        IsolatedReward("nowhere.py:f", timeout_seconds=5.0)
    with pytest.raises(UserError, match="has no function lenght; did you mean length"):
        make("lenght").wait_until_ready()
    for code, said in [
        ("x = 1\n1 / 0\n", r"cannot be imported \(ZeroDivisionError: division by zero, line 2\); correct it"),
        ("def f(:\n", r"cannot be imported \(.*, line 1\)"),
        ("import sys\nsys.exit(1)\n", r"cannot be imported \(SystemExit: 1, line 2\)"),
        ("import os\nos._exit(9)\n", "its process ended with exit code 9 while it imported the function; correct it"),
    ]:
        (tmp_path / "broken.py").write_text(code)
        with pytest.raises(UserError, match=said):
            IsolatedReward(f"{tmp_path}/broken.py:f", timeout_seconds=5.0).wait_until_ready()


def test_a_column_that_cannot_be_sent_is_named(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [completion("p", "a", answer="x", lock=threading.Lock())]
    with pytest.raises(UserError, match=r"length: the dataset's columns \(lock\) cannot be sent .*; remove them, or"):
        make("length")(rows)

    here = ModuleType("known_here_alone")
    exec("class Here: pass", vars(here))
    monkeypatch.setitem(sys.modules, "known_here_alone", here)
    with pytest.raises(UserError, match=r"columns cannot be sent .*\(ModuleNotFoundError: .*; remove them"):
        make("length")([completion("p", "a", here=here.Here())])


def test_random_numbers_depend_on_seed_and_step_alone(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WITH_NUMPY", "1")
    for name in ("randomly", "numpy_randomly"):
        first, second = make(name), make(name)
        first.trainer_state = SimpleNamespace(global_step=3)
        second.trainer_state = SimpleNamespace(global_step=2)
        other = second(two())
        second.trainer_state = SimpleNamespace(global_step=3)
        assert first(two()) == second(two()) != other
        second.seed = 1
        assert first(two()) != second(two())


def test_a_call_costs_less_than_five_milliseconds(make: Any) -> None:
    rows = [completion("once upon a time", "there was a little dog " * 4) for _ in range(64)]
    reward = make("length")
    reward(rows)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        reward(rows)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.005, times


# Faults ---------------------------------------------------------------------------------------------------------------


def test_a_function_that_raises_is_masked_counted_and_told_once(make: Any) -> None:
    for name, said in [
        ("raises", "raises raised ValueError: no number in \N{REPLACEMENT CHARACTER}[31ma (mine.py, line "),
        ("exits", "exits raised SystemExit: 4 (mine.py, line "),
    ]:
        reward = make(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert repr(reward(two())) == repr(reward(two())) == "[nan, nan]"
        assert len(caught) == 1
        assert str(caught[0].message).startswith(said)
        assert reward.num_failures == 4
        assert reward.pop_extra() == {}, "half a column would not fit the completions"


@pytest.mark.parametrize("name", ["sleeps", "holds_the_lock", "hangs_async"])
def test_a_function_that_hangs_is_killed_and_its_next_call_works(name: str, make: Any) -> None:
    reward = make(name, 0.3)
    reward.wait_until_ready()
    pid = reward._worker.process.pid
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert repr(reward(two())) == "[nan, nan]"
        if name == "sleeps":
            assert repr(reward(two())) == "[nan, nan]"
    assert time.perf_counter() - started < 5
    assert [str(w.message) for w in caught] == [
        f"{name} took longer than the 0.3 s of --reward_timeout_seconds and was stopped; its completions have no "
        "reward and are left out."
    ]
    assert reward.num_failures == (4 if name == "sleeps" else 2)
    assert gone(pid)
    if name != "hangs_async":
        assert reward(two("ok")) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dies", "ended with exit code 3"),
        ("forks_and_dies", "ended with exit code 5"),
        ("segfaults", "was killed by SIGSEGV"),
        ("is_killed", "was killed by SIGKILL, perhaps for lack of memory"),
    ],
)
def test_a_process_that_dies_is_replaced(name: str, said: str, make: Any) -> None:
    reward = make(name)
    with pytest.warns(UserWarning, match=f"^{name} lost its process, which {said}; its completions"):
        assert repr(reward(two())) == "[nan, nan]"
    assert reward(two("ok")) == [2.0, 2.0]


def test_a_process_that_was_killed_between_two_calls_costs_none(make: Any) -> None:
    reward = make("only_a")
    pid = int(reward(two())[0])
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    assert reward(two())[0] not in (pid, NAN)
    assert reward.num_failures == 0


def test_a_fork_of_the_parent_takes_no_process_with_it(make: Any) -> None:
    reward = make("only_a")
    pid = int(reward(two())[0])
    child = os.fork()
    if child == 0:
        reward.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert reward(two()) == [float(pid)] * 2


def test_all_that_a_function_started_is_killed_with_it(make: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    reward = make("leaves_a_child", 0.4)
    with pytest.warns(UserWarning, match="took longer"):
        reward(two())
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_a_file_that_is_broken_later_is_masked(tmp_path: Path) -> None:
    path = tmp_path / "later.py"
    path.write_text("import os\ndef f(completions): os._exit(1)\n")
    reward = IsolatedReward(f"{path}:f", timeout_seconds=20.0)
    reward.wait_until_ready()
    path.write_text("1 / 0")
    with pytest.warns(UserWarning, match="lost its process"):
        reward(two())
    with pytest.warns(UserWarning, match="cannot be started again: --reward_funcs has .*ZeroDivisionError"):
        assert repr(reward(two())) == "[nan, nan]"
    path.write_text("def f(completions): return [1.0, 2.0]\n")
    os.utime(path, (1, 1))  # or its bytecode is taken for that of the former text
    assert reward(two()) == [1.0, 2.0]
    reward.close()


def test_no_process_is_left_when_a_reward_is_forgotten(file: Path) -> None:
    reward = IsolatedReward(f"{file}:length", timeout_seconds=5.0)
    reward.wait_until_ready()
    pid = reward._worker.process.pid
    del reward
    gc.collect()
    assert gone(pid)


PARENT = """
import sys, time
from remax.interfaces import Completion, Prompt
from remax.rewards.isolation import IsolatedReward
reward = IsolatedReward(sys.argv[1], timeout_seconds=60)
reward.wait_until_ready()
print(reward._worker.process.pid, flush=True)
reward([Completion(Prompt(0, "p", []), 0, [1], [], False, text) for text in ("a", "b")])
"""


@pytest.mark.parametrize("name", ["sleeps", "holds_the_lock"])
def test_processes_end_with_a_parent_that_is_killed(name: str, file: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, f"{file}:{name}"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert not gone(pid, 0.1)
    parent.kill()
    parent.wait()
    assert gone(pid)
    assert parent.stdout.read() == "", "nothing holds the output open"
    parent.stdout.close()


def test_ctrl_c_in_the_terminal_does_not_reach_the_function(make: Any) -> None:
    reward = make("only_a")
    pid = int(reward(two())[0])
    assert os.getpgid(pid) != os.getpgid(0), "the terminal signals the group of its foreground"
    os.kill(pid, signal.SIGINT)
    assert reward(two()) == [float(pid)] * 2


def test_an_interrupted_call_leaves_no_reply_for_the_next(make: Any) -> None:
    reward = make("sleeps")
    reward.wait_until_ready()
    former = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            reward(two())
    finally:
        signal.signal(signal.SIGALRM, former)
    assert reward(two("ok")) == [2.0, 2.0]


# Functions that stay in this process ----------------------------------------------------------------------------------


def test_an_async_function_is_cancelled_after_the_timeout() -> None:
    cancelled = threading.Event()

    async def f(completions: Any) -> list[float]:
        try:
            await asyncio.sleep(60 if completions[0] == "a" else 0)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [1.0, 1.0]

    reward = CallableReward(f, timeout_seconds=0.1)
    with pytest.warns(UserWarning, match="^f took longer than the 0.1 s of --reward_timeout_seconds; its completions"):
        assert repr(reward(two())) == "[nan, nan]"
    assert cancelled.wait(5)
    assert reward(two("ok")) == [1.0, 1.0]


def test_an_async_function_that_blocks_or_exits_costs_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remax.rewards.functions.SECONDS_TO_CANCEL", 0.1)

    async def blocks(completions: Any) -> list[float]:
        if completions[0] == "a":
            time.sleep(3)
        return [1.0, 1.0]

    async def leaves(completions: Any) -> list[float]:
        if completions[0] == "a":
            sys.exit(1)
        return [1.0, 1.0]

    for f, said in ((blocks, "took longer"), (leaves, "it asked to exit")):
        reward = CallableReward(f, timeout_seconds=0.2)
        with pytest.warns(UserWarning, match=said):
            assert repr(reward(two())) == "[nan, nan]"
        assert reward(two("ok")) == [1.0, 1.0]


def test_sys_exit_and_a_number_beyond_all_floats_do_not_end_the_run() -> None:
    with pytest.warns(UserWarning, match="raised SystemExit: 3"):
        assert repr(CallableReward(lambda **_: sys.exit(3))(two())) == "[nan, nan]"
    assert CallableReward(lambda **_: [10**400, 1])(two()) == [math.inf, 1.0]
    assert repr(score([CallableReward(lambda **_: [10**400, 1])], [1.0], two()).total) == "[nan, 1.0]"


def test_without_a_limit_functions_run_in_this_process(file: Path) -> None:
    reward = named_function(f"{file}:only_a", 0.0)
    assert isinstance(reward, CallableReward)
    assert reward(two()) == [float(os.getpid())] * 2

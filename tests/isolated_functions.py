"""A file of reward functions of all kinds, for the tests of those that run in processes of their own."""

CODE = """
import asyncio, ctypes, datetime, os, random, re, signal, subprocess, sys, threading, time
import neighbour
from remax.errors import UserError
if os.environ.get("WITH_NUMPY"):
    import numpy

def length(completions, **_):
    return [float(len(c)) for c in completions]

def everything(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
    log_extra("first", [c[0]["content"] for c in completions])
    log_extra("day", [datetime.date(2026, 1, 1) for _ in completions])
    log_metric("share", len(completions) / 4)
    print("\\x1b[1mseen\\x1b[0m", prompts, "caf\\u00e9")
    assert sorted(columns) == ["answer", "day"], columns
    assert columns["day"][0].year == 2026
    assert completion_ids == [[9, 1], [9, 1]]
    return [trainer_state.global_step, None if trainer_state.best_metric is None else 0]

async def waits(completions, **_):
    await asyncio.sleep(0)
    return [1.0, 2.0]

def missing(completions, **_):
    return [float("nan"), float("inf")]

def main_thread(completions, **_):
    signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(5)
    except ZeroDivisionError:
        return [1.0, 1.0]

def randomly(completions, **_):
    return [random.random() for _ in completions]

def numpy_randomly(completions, **_):
    return [float(numpy.random.random()) for _ in completions]

def no_torch(completions, **_):
    return [float("torch" in sys.modules)] * len(completions)

def short(completions, **_):
    return [1.0]

def words(completions, **_):
    return ["good"] * len(completions)

def own_user_error(completions, **_):
    raise UserError("set something else.")

def needs_solution(completions, solution):
    return [0.0, 0.0]

def raises(completions, log_extra, **_):
    log_extra("first", ["x"])
    raise ValueError("no number in \\x1b[31m" + completions[0])

def exits(completions, **_):
    sys.exit(4)

def only_a(completions, **_):
    if completions[0] != "a":
        raise ValueError
    return [float(os.getpid())] * len(completions)

def _trouble(what):
    def f(completions, **_):
        if "ok" in completions[0]:
            return [float(len(c)) for c in completions]
        what()
        return [0.0] * len(completions)
    return f

def _child_and_hang():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(os.environ["PIDS"], "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    time.sleep(60)

def _fork_and_die():
    if os.fork() == 0:
        time.sleep(60)
    os._exit(5)

sleeps = _trouble(lambda: time.sleep(60))
holds_the_lock = _trouble(lambda: re.match(r"(a+)+$", "a" * 40 + "b"))
leaves_a_child = _trouble(_child_and_hang)
dies = _trouble(lambda: os._exit(3))
forks_and_dies = _trouble(_fork_and_die)
segfaults = _trouble(lambda: ctypes.string_at(0))
is_killed = _trouble(lambda: os.kill(os.getpid(), signal.SIGKILL))
async def hangs_async(completions, **_):
    await asyncio.sleep(60)
"""

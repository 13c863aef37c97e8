"""One process per competitor, which takes a step when told to, so that only one computes at a time."""

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed.memory import watch
from transformers import TrainerCallback

from remax.meters import PhaseMeter

CPU = torch.device("cpu")


class Stopped(BaseException):
    """The parent wants no more steps."""


class Steps:
    """The worker's end: every step waits for the word and reports what it took."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.lengths: list[int] = []
        self.inner_meter: Any = None
        """A PhaseMeter that measures parts of the step, and thereby resets the process's peak of resident memory."""
        self.while_watched: Callable[[], Any] = contextlib.nullcontext
        """What else holds during a watched step."""

    def begin(self) -> None:
        """Waits for the word: "step" is timed, "watch" is watched instead, "stop" raises Stopped."""
        order = self.connection.recv()
        if order == "stop":
            raise Stopped
        self.report: dict[str, Any] = {}
        self.context, self.meter = contextlib.ExitStack(), PhaseMeter(CPU)
        if order == "watch":
            self.context.enter_context(self.while_watched())
            self.context.enter_context(watch(self.report))
        self.context.enter_context(self.meter.measure("step"))

    def end(self) -> None:
        """Reports the step."""
        self.context.close()
        inner = self.inner_meter.peak_bytes.values() if self.inner_meter is not None else ()
        self.report |= {
            "seconds": self.meter.seconds["step"],
            "resident_bytes": max([self.meter.peak_bytes["step"], *inner]),
            "lengths": sorted(self.lengths),
        }
        self.connection.send(self.report)

    def reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """content_reward, which also sees the lengths."""
        self.lengths = [len(ids) for ids in completion_ids]
        return content_reward(completion_ids)


def content_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing and differs between completions."""
    return [sum(ids) % 1009 / 1009 for ids in completion_ids]


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Makes a trainer's loop wait for the word at every step."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.steps.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.end()


class Worker:
    """The parent's end of a process that trains."""

    def __init__(self, name: str, run: Callable[..., None], args: Iterable[Any], log: Path) -> None:
        """run(steps, *args) trains in the process until steps.begin() raises Stopped."""
        self.name = name
        self.connection, theirs = multiprocessing.Pipe()
        self.process = context().Process(target=_work, args=(theirs, log, run, tuple(args)), daemon=True)
        self.process.start()
        theirs.close()

    def step(self, order: str = "step") -> dict[str, Any]:
        """Returns the report of one step.

        Raises:
            RuntimeError: the process failed.
        """
        self.connection.send(order)
        try:
            report: dict[str, Any] = self.connection.recv()
        except EOFError:
            report = {"error": "its process was killed"}
        if "error" in report:
            raise RuntimeError(f"{self.name}: {report['error']}")
        return report

    def stop(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self.connection.send("stop")
        self.process.join(timeout=30)
        if self.process.is_alive():
            self.process.terminate()


def context() -> Any:
    """Returns how processes are started: as forks of a server that imported what takes seconds and computed nothing."""
    own = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        own.set_forkserver_preload(["benchmarks.speed.competitors"])
    return own


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Returns what the function returns in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = context().Process(target=_call, args=(theirs, function, args), daemon=True)
    process.start()
    theirs.close()
    try:
        result, error = ours.recv()
    except EOFError:
        result, error = None, "its process was killed"
    process.join()
    if error:
        raise RuntimeError(f"{function.__name__}: {error}")
    return result


def _call(connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        connection.send((function(*args), None))
    except Exception:
        connection.send((None, traceback.format_exc()))


def _work(connection: Connection, log: Path, run: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        run(Steps(connection), *args)
    except Stopped:
        pass
    except BaseException:
        connection.send({"error": traceback.format_exc()})

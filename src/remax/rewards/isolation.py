"""Reward functions in processes of their own, which can be stopped: what a user's code does cannot stop a training."""

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

from remax.errors import UserError
from remax.interfaces import Completion
from remax.rewards.functions import TookTooLong, digest_of_source, split_spec
from remax.rewards.programmed import ProgrammedReward
from remax.rewards.worker import BOOT
from remax.untrusted import printable, shown

SECONDS_TO_IMPORT = 600.0
"""How long the import of a function may take: it may load a model of its own."""


class IsolatedReward(ProgrammedReward):
    """Calls the function that `path/to/file.py:function` names, as CallableReward does, in a process of its own.

    A call that takes longer than timeout_seconds, or ends its process, gives NaN for its completions, which leaves them
    out of the loss; the process and all that it started are killed, and the next call has a new one. The process ends
    with this one, however that ends, and does not hear Ctrl-C.

    trainer_state holds the plain values of the trainer's state (numbers and texts, such as global_step). Before every
    call the generators of random and, where the function's file has imported them, of numpy and torch are seeded from
    the run's seed and the step: a call gives the same wherever it happens.
    """

    def __init__(self, spec: str, *, timeout_seconds: float) -> None:
        """Starts the process, which begins to import the function.

        Raises:
            UserError: the text names no function, or there is no such file.
        """
        source, name = split_spec(spec)
        super().__init__(name, timeout_seconds)
        self.source_digest = digest_of_source(source)
        self.spec = spec
        self.seed = 0
        self._folder = os.getcwd()
        self._ready = False
        self._worker: _Worker | None = None
        self._start()

    def wait_until_ready(self) -> None:
        """Returns when the function has been imported.

        Raises:
            UserError: it cannot be imported, or the file has no such function.
        """
        try:
            self._load()
        except _Lost as error:
            raise UserError(
                f"--reward_funcs has {self.spec}: its process {error} while it imported the function; correct it."
            ) from None

    def __call__(self, completions: Sequence[Completion]) -> list[float | None]:
        """Returns one reward per completion, in order; None where the function does not apply, NaN where it failed.

        Raises:
            UserError: the function cannot be called with these columns, or returned anything but numbers and None; or
                a column cannot be sent to another process.
        """
        request = self._packed(completions)
        number = len(completions)
        try:
            self._load()
            assert self._worker is not None
            reply = self._worker.exchange(request, self.timeout_seconds)
            if "rewards" in reply:
                rewards = _checked(reply["rewards"], number)
                self._log(reply["metrics"], reply["extra"])
                return rewards
        except TookTooLong as error:
            return self._missing(number, f"{error} and was stopped", TookTooLong.__name__)
        except _Lost as error:
            return self._missing(number, f"lost its process, which {error}", str(error))
        except UserError as error:  # It could be imported at the start, but not again.
            return self._missing(number, f"cannot be started again: {error}", "restart")
        finally:
            if self._worker is not None and self._worker.ended:
                self._start()  # At once, so that it imports the function while the training goes on.
        if "error" in reply:
            return self._missing(number, reply["error"], tuple(reply["kind"]))
        if "unreadable" in reply:
            raise self._unsendable("columns", reply["unreadable"])
        raise UserError(reply["user_error"])

    def close(self) -> None:
        """Ends the process."""
        if self._worker is not None:
            self._worker.end()
        self._worker, self._ready = None, False

    def _start(self) -> None:
        self.close()
        with contextlib.suppress(OSError):  # of memory or processes: the next call tries again
            self._worker = _Worker(self.spec, self._folder)

    def _load(self) -> None:
        """Returns when the process, which is a new one where there is none, has imported the function."""
        if self._worker is None or self._worker.ended:
            self._start()
        if self._worker is None:
            raise _Lost("could not be started")
        if self._ready:
            return
        try:
            reply = self._worker.exchange(None, SECONDS_TO_IMPORT)
        except TookTooLong:
            raise _Lost(f"took longer than {SECONDS_TO_IMPORT:g} s") from None
        if "user_error" in reply:
            self.close()
            raise UserError(reply["user_error"])
        self._ready = True

    def _packed(self, completions: Sequence[Completion]) -> bytes:
        state = None
        if self.trainer_state is not None:
            plain = (bool, int, float, str, type(None))
            state = {name: value for name, value in vars(self.trainer_state).items() if isinstance(value, plain)}
        step = (state or {}).get("global_step", 0)
        seed = zlib.crc32(f"{self.seed} {step}".encode())
        rows = [dataclasses.replace(c, logprobs=[]) for c in completions]
        try:
            return pickle.dumps((rows, state, seed), protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            columns = completions[0].prompt.columns
            wrong = [name for name in columns if not all(_can_be_sent(c.prompt.columns[name]) for c in completions)]
            raise self._unsendable(f"columns ({', '.join(wrong)})", error) from error

    def _unsendable(self, columns: str, reason: object) -> UserError:
        return UserError(
            f"--reward_funcs has {self.spec}: the dataset's {columns} cannot be sent to the process that it runs in "
            f"({shown(reason)}); remove them, or set --reward_timeout_seconds 0 to call it in this process."
        )


def _can_be_sent(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


def _checked(rewards: Any, number: int) -> list[float | None]:
    """Returns the rewards of a reply; what CallableReward has checked can only be otherwise if something interfered."""
    if not (isinstance(rewards, list) and len(rewards) == number):
        raise _Lost("sent no rewards")
    if not all(value is None or type(value) is float for value in rewards):
        raise _Lost("sent something else than rewards")
    return rewards


class _Lost(Exception):
    """A process did not answer; the message says what it did instead."""


class _Worker:
    """One process and the connection to it."""

    def __init__(self, spec: str, folder: str) -> None:
        self.connection, theirs = Pipe()
        lifeline, self.lifeline = os.pipe()
        command = [sys.executable, "-u", "-c", BOOT, str(theirs.fileno()), str(lifeline), spec, *map(str, sys.path)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), lifeline),
            start_new_session=True,  # A group to be killed as a whole; and the terminal's Ctrl-C does not reach it.
            cwd=folder,
        )
        theirs.close()
        os.close(lifeline)
        self.end: Callable[[], Any] = weakref.finalize(
            self, _end, self.process, self.connection, self.lifeline, os.getpid()
        )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def exchange(self, request: bytes | None, seconds: float) -> dict[str, Any]:
        """Returns the reply to a request, or, without one, what the process says first.

        Raises:
            TookTooLong: it took more seconds, unless these are 0; the process was killed.
            _Lost: the process is dead.
        """
        try:
            with _killing_after(self.process, seconds) as expired:
                reply = self._receive(request)
                while reply is not None and "print" in reply:
                    sys.stdout.write(printable(reply["print"]))
                    reply = self._receive(None)
        except BaseException:  # An exchange that was interrupted cannot be taken up again.
            self.end()
            raise
        if reply is not None and not expired.is_set():
            return reply
        self.end()
        if expired.is_set():
            raise TookTooLong(seconds)
        raise _Lost(_how_it_ended(self.process.returncode))

    def _receive(self, request: bytes | None) -> dict[str, Any] | None:
        """Returns the next message, None if there will be none."""
        try:
            if request is not None:
                self.connection.send_bytes(request)
            return dict(json.loads(self.connection.recv_bytes()))
        except (EOFError, OSError, ValueError, TypeError):
            with contextlib.suppress(subprocess.TimeoutExpired):  # It is about to end, and its exit code tells why.
                self.process.wait(1.0)
            return None


@contextlib.contextmanager
def _killing_after(process: "subprocess.Popen[bytes]", seconds: float) -> Iterator[threading.Event]:
    """Kills a process after so many seconds, unless they are 0; what it yields tells whether that has happened."""
    expired = threading.Event()
    if not seconds:
        yield expired
        return

    def expire() -> None:
        expired.set()
        _kill(process)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()
        timer.join()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kills a process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: "subprocess.Popen[bytes]", connection: "Connection[Any, Any]", lifeline: int, owner: int) -> None:
    if os.getpid() != owner:  # A fork of the owner ends, and leaves this process to it.
        return
    _kill(process)
    process.wait()
    connection.close()
    os.close(lifeline)


def _how_it_ended(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    number = -returncode
    known = number in signal.valid_signals()
    reason = ", perhaps for lack of memory" if number == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(number).name if known else f'signal {number}'}{reason}"

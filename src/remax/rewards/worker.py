"""The process that a named reward function runs in, in its main thread. Loads no torch, unless the function does.

It imports the function itself and answers one request after the other on a connection that only its parent and it hold.
Requests are pickled, since columns of a dataset may hold more than JSON can; replies are JSON.
"""

import io
import json
import os
import pickle
import random
import signal
import sys
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from remax.errors import UserError
from remax.rewards.functions import CallableReward, describe_error, load_reward_function

BOOT = (
    "import sys; arguments = sys.argv[1:4]; sys.path[:] = sys.argv[4:]; del sys.argv[1:]; "
    "from remax.rewards.worker import main; main(*arguments)"
)
"""What `python -c` runs, so that nothing in the working directory can hide a library; sys.path is the parent's."""


def main(connection_fd: str, lifeline_fd: str, spec: str) -> None:
    """Serves a function until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent finishes its step, and needs the rewards for that.
    connection: Connection[Any, Any] = Connection(int(connection_fd))
    terminal = sys.stdout

    def in_forks() -> None:
        """The end of this process must be seen, even if processes that it forked live on."""
        connection.close()
        sys.stdout = terminal

    os.register_at_fork(after_in_child=in_forks)
    _end_with_parent(int(lifeline_fd))
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Printed(connection)), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )
    try:
        reward = load_reward_function(spec)
    except UserError as error:
        _send(connection, json.dumps({"user_error": str(error)}))
        return
    _send(connection, json.dumps({"ready": True}))
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        _send(connection, _answer(reward, request))


def _end_with_parent(lifeline: int) -> None:
    """Ends this process and all that it started when the parent's end of the lifeline is closed, however that ended.

    Another process does it: a thread of this one could not while a function holds the interpreter's lock.
    """
    if os.fork() == 0:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)
    os.close(lifeline)


class _Printed(io.RawIOBase):
    """Hands what is printed to the parent, which knows where it belongs: a panel, a notebook, a file."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self.connection = connection

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        text = bytes(data).decode("utf-8", errors="replace")
        self.connection.send_bytes(json.dumps({"print": text}).encode())
        return len(data)


def _answer(reward: CallableReward, request: bytes) -> str:
    """Returns the reply to a request as JSON: what the call gave, or why there is nothing."""
    try:
        completions, state, seed = pickle.loads(request)
    except Exception as error:  # an object in a column whose class cannot be imported here
        return json.dumps({"unreadable": f"{type(error).__name__}: {error}"})
    reward.trainer_state = None if state is None else SimpleNamespace(**state)
    _seed(seed)
    try:
        result = reward.call(completions)
        # What JSON cannot hold becomes text, as it does in completions.jsonl.
        return json.dumps({"rewards": result.rewards, "metrics": result.metrics, "extra": result.extra}, default=str)
    except UserError as error:
        return json.dumps({"user_error": str(error)})
    except (Exception, SystemExit) as error:
        reason, kind = describe_error(error)
        return json.dumps({"error": reason, "kind": kind})


def _seed(seed: int) -> None:
    """Makes a function's random numbers the same in every run; those of libraries only once they are imported."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _send(connection: "Connection[Any, Any]", reply: str) -> None:
    sys.stdout.flush()
    connection.send_bytes(reply.encode())

"""One process among several that a launcher started: what it says, and how it leaves without the others' words.

torchrun and Accelerate's launcher tell a process its place in environment variables, and end all processes as soon as
one of them has failed.
"""

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

from remax.errors import Interrupted
from remax.untrusted import printable

SECONDS_BEHIND = 5
"""How much later than another a process may fail for the same reason."""
CONNECTION_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says in a process whose neighbour is gone."""


@contextmanager
def only_main_prints() -> Iterator[None]:
    """Lets the main process alone write to stdout."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Shows what remax warns of as one line, without the place in its code."""
    former, ours = warnings.formatwarning, str(Path(__file__).parent)

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if filename.startswith(ours):
            return f"remax: warning: {printable(str(message))}\n"
        return former(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = former


def tell_once(message: str, error: BaseException) -> None:
    """Writes why the command ends, if possible once for all processes of a machine; returns when this one may end.

    What all processes know, the first of a machine tells, and none ends before that. What only one knows it tells
    itself, with its number, and its end is that of the others, which have nothing to tell.
    """
    main, joined = os.environ.get("LOCAL_RANK", "0") == "0", _is_joined()
    if joined and getattr(error, "known_to_all", isinstance(error, Interrupted)):
        if main:
            _tell(message)
        _meet()
    elif isinstance(error, KeyboardInterrupt):
        if main:
            _tell(message)
    else:
        # Mostly they make the same mistakes: then the first one tells, and its end is that of the others.
        if failure_of_another(error) or not main:
            _wait_for_end(SECONDS_BEHIND)
        _tell(message if main and not joined else f"process {os.environ.get('RANK', 0)}: {message}")


def failure_of_another(error: BaseException) -> str | None:
    """Returns what to say if this process cannot go on since another one has failed, or is gone; else None."""
    if not _is_joined():
        return None
    from torch.distributed import DistError

    from remax.processes import ProcessFailed

    if isinstance(error, ProcessFailed):
        return f"stopped, for {printable(str(error))}."
    lost = isinstance(error, RuntimeError) and any(text in str(error) for text in CONNECTION_LOST)
    if lost or isinstance(error, DistError):
        return "stopped, for the connection to another process is lost: it has ended, or cannot be reached."
    return None


def _tell(message: str) -> None:
    print(f"remax: {message}", file=sys.stderr)


def _is_joined() -> bool:
    """Whether this process can talk to others; torch is imported by then."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return bool(torch.distributed.get_world_size() > 1)


def _meet() -> None:
    """Waits for all other processes, if they can be reached."""
    from accelerate import PartialState

    with suppress(RuntimeError):
        PartialState().wait_for_everyone()


def _wait_for_end(seconds: float) -> None:
    """Waits until the launcher ends this process because another one has ended."""
    launcher, until = os.getppid(), time.monotonic() + seconds
    while os.getppid() == launcher and time.monotonic() < until:
        time.sleep(0.1)

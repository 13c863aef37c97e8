"""One run at a time in a folder: a lock that the operating system takes back when its process dies, however it dies."""

import os
import socket
from pathlib import Path

from remax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked.
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_held: set[int] = set()


class RunLock:
    """The right to write in a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            UserError: another run has it.
        """
        while fcntl is not None and self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
                os.close(descriptor)
                raise UserError(
                    f"--output_dir is {self.path.parent}: a run is going on there ({holder}), and two would write over "
                    "each other; set another folder, or wait for its end."
                ) from None
            except OSError:  # A file system without locks.
                os.close(descriptor)
                return
            if self._is_ours(descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                self._descriptor = descriptor
                _held.add(descriptor)
            else:
                os.close(descriptor)

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            _held.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def check_free(self) -> None:
        """Raises UserError if a run has the lock."""
        if self.path.exists():
            self.acquire()
            self.release()

    def _is_ours(self, descriptor: int) -> bool:
        """Whether the file is still there: a former holder may have deleted it between our opening and our locking."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False


def _leave_to_parent() -> None:
    """In a forked child: a lock must not live on in a child that outlives the run."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)

"""Writes checkpoints: in the background of the next step where that can be, and without losing an older one."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from remax.checkpoint.files import list_checkpoints, path_of, rotate, write_checkpoint
from remax.errors import UserError

FAILURES = (OSError, RuntimeError, SafetensorError)
"""What a full or broken disk raises, directly or through torch and safetensors."""


@dataclass
class Job:
    """A checkpoint that is being written."""

    step: int
    best_step: int | None
    fill: Callable[[Path], None]
    rotates: bool = True
    error: Exception | None = None


class Writer:
    """Writes one checkpoint after the other."""

    def __init__(self, folder: Path, limit: int, say: Callable[[str], None]) -> None:
        """limit: how many are kept. say: takes the sentence that warns of a failure."""
        self.folder, self.limit, self.say = folder, limit, say
        self._job: Job | None = None
        self._thread: threading.Thread | None = None

    def begin(self, step: int, best_step: int | None, fill: Callable[[Path], None]) -> None:
        """Starts to write a checkpoint out of the files that fill writes, whose data nobody may change meanwhile."""
        self.wait()
        self._job = Job(step, best_step, fill)
        # A daemon: a second Ctrl-C ends the process at once, and what is half-written then is no checkpoint.
        self._thread = threading.Thread(target=self._run, args=(self._job,), name="remax-checkpoint", daemon=True)
        self._thread.start()

    def write(self, step: int, best_step: int | None, fill: Callable[[Path], None], *, rotates: bool = True) -> None:
        """Writes a checkpoint. rotates: deletes the oldest ones beyond the limit.

        Raises:
            UserError: it could not be written; older ones are as they were.
        """
        self.wait()
        job = Job(step, best_step, fill, rotates)
        self._run(job)
        if job.error is not None:
            raise UserError(f"{self._describe(job)}; free space and go on with --resume auto.") from job.error

    def wait(self) -> None:
        """Waits until nothing is being written; a failure is warned of, and the run goes on."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        job, self._job = self._job, None
        if job is not None and job.error is not None:
            if not isinstance(job.error, FAILURES):
                raise job.error
            self.say(f"Warning: {self._describe(job)}; the run goes on and tries again at the next one.")

    def _run(self, job: Job) -> None:
        path = path_of(self.folder, job.step)
        try:
            if not path.exists():
                write_checkpoint(path, job.fill)
            if job.rotates:
                rotate(self.folder, self.limit, job.best_step)
        except Exception as error:
            job.error = error

    def _describe(self, job: Job) -> str:
        reason = (getattr(job.error, "strerror", None) or str(job.error)).splitlines()[0]
        good = list_checkpoints(self.folder)
        last = f"the last good one is {good[-1]}" if good else "there is no older one"
        return (
            f"--output_dir is {self.folder}: the checkpoint of step {job.step} could not be written ({reason}), {last}"
        )

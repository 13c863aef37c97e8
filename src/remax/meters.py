"""Time and peak memory of the phases of a step."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

PROCESS = Path("/proc/self")
RESET_PEAK = "5"
"""What Linux takes in clear_refs to start the peak of the resident size anew."""


class PhaseMeter:
    """Measures named phases; a phase that comes several times in a step adds up its times and keeps its peak."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.run_peak_bytes: dict[str, int] = {}
        """The largest peaks of all steps so far."""

    def clear(self) -> None:
        """Forgets all phases: a new step begins."""
        self.seconds.clear()
        self.peak_bytes.clear()

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Measures what happens inside: seconds, and peak bytes allocated on a GPU, resident in memory on a CPU."""
        self._reset_peak()
        self._synchronise()
        started = time.perf_counter()
        yield
        self._synchronise()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
        peak = self._peak()
        for peaks in (self.peak_bytes, self.run_peak_bytes):
            peaks[phase] = max(peaks.get(phase, 0), peak)

    def metrics(self) -> dict[str, float]:
        """Returns time/PHASE in seconds and memory/PHASE in bytes."""
        seconds = {f"time/{phase}": value for phase, value in self.seconds.items()}
        return seconds | {f"memory/{phase}": float(value) for phase, value in self.peak_bytes.items()}

    def _synchronise(self) -> None:
        """Waits for a GPU, which works on after a call returns: its time belongs to the phase that asked for it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            with suppress(OSError):  # A container may forbid it: peaks are then those since the process started.
                (PROCESS / "clear_refs").write_text(RESET_PEAK)

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform == "linux":
            lines = (PROCESS / "status").read_text().splitlines()
            return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""One call: its clock, its measurements, and their results on disk."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_bench.device import Device
from gpu_bench.verdicts import targets


class Budget:
    """The seconds that are left of a call."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.end = clock, clock() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - self.clock()

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long ends in time."""
        return self.left >= seconds


@dataclass(frozen=True)
class Case:
    """One measurement."""

    name: str
    estimate: float
    """Seconds that it may take; it starts only if they are left."""
    run: Callable[[], dict[str, Any]]


class Report:
    """The results, on disk after every measurement."""

    def __init__(self, path: Path, head: dict[str, Any], *, judge: bool) -> None:
        self.path, self.head, self.judge = path, head, judge
        self.parts: dict[str, dict[str, Any]] = {}

    def add(self, part: str, name: str, result: dict[str, Any]) -> None:
        """Takes one result, prints and writes it."""
        self.parts.setdefault(part, {})[name] = result
        print(f"{part}: {name}: {json.dumps(_rounded(result))}", flush=True)
        verdicts = targets(self.parts) if self.judge else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = self.path.with_suffix(".partial")
        partial_file.write_text(json.dumps({**self.head, "parts": self.parts, "targets": verdicts}, indent=2) + "\n")
        partial_file.replace(self.path)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(own) for key, own in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def run_case(case: Case, device: Device, budget: Budget) -> dict[str, Any]:
    """Returns a measurement's result, or why there is none: one that fails must not cost the others."""
    if not budget.allows(case.estimate):
        return {"skipped": f"it may take {case.estimate:.0f} s and {max(0, budget.left):.0f} s are left"}
    started = time.monotonic()
    try:
        result = case.run()
    except torch.OutOfMemoryError as error:
        result = {"out_of_memory": str(error).partition(". ")[0]}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
    device.release()  # Only here: until the exception is forgotten, its frames keep their tensors.
    return {**result, "took_seconds": time.monotonic() - started}

"""How a run was made: the commands, versions, source and machine, for whoever wants to repeat or to trust it."""

import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from remax.recording import RunFolder, write_json

FILE = "provenance.json"
PACKAGES = ("remax-rlhf", "torch", "transformers", "accelerate", "trl", "peft", "datasets", "numpy")


def record_start(folder: RunFolder, step: int, *, num_processes: int = 1) -> None:
    """Adds to provenance.json how the run was started, or gone on with after this step.

    Raises:
        UserError: the disk does not take it.
    """
    if not folder.writes:
        return
    start = {"step": step, "num_processes": num_processes, **circumstances(command_line())}
    with folder.writing(FILE):
        write_json(folder.path / FILE, {"starts": [*read_starts(folder.path), start]})


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Returns what is known of each start of the run; nothing of what cannot be read."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    starts = content.get("starts") if isinstance(content, dict) else None
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def command_line() -> list[str]:
    """Returns the words of the command that is running, such that a shell would run it again."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    words = ["remax"] if program in ("remax", "__main__.py", "") else ["python", sys.argv[0]]
    return [*words, *sys.argv[1:]]


def circumstances(command: Sequence[str]) -> dict[str, Any]:
    """Returns what a result depends on beside its settings: when, where, with what and on what it was made."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "directory": os.getcwd(),
        "versions": versions(),
        "hardware": hardware(),
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Returns the versions that matter."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def hardware() -> Mapping[str, Any]:
    """Returns what computes here: the CPU, the threads that torch uses, the GPUs, and the system."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "gpus": gpus, "system": platform.platform()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return f"{names[0]}, {len(names)} logical cores"
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Returns the commit of the source tree that is running, if it is one."""
    git = shutil.which("git")
    if git is None:
        return None
    here = Path(__file__).parent
    result = subprocess.run([git, "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None

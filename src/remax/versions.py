"""What `remax --version` says: the versions that a result depends on, without loading any of the libraries."""

import importlib.util
import platform
import runpy
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTION = "remax-rlhf"
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")
"""What every installation has."""
OPTIONAL = ("vllm", "deepspeed", "torchao")
"""What is told where it is installed."""


def own_version() -> str:
    """Returns the version of remax, of which pyproject.toml is the one source."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # a source tree that nobody has installed
        return "unknown (not installed)"


def version_lines() -> list[str]:
    """Returns one line for remax, Python, every library, and the CUDA (or ROCm) that torch was built for."""
    lines = [f"remax {own_version()}", f"python {platform.python_version()} ({platform.system()} {platform.machine()})"]
    for name in LIBRARIES + OPTIONAL:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            if name in LIBRARIES:
                lines.append(f"{name} is not installed")
    return [*lines, f"CUDA {_toolkit()}"]


def _toolkit() -> str:
    """Returns what torch was built for: its version.py has constants alone, and loads nothing."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "unknown (torch is not installed)"
    try:
        constants = runpy.run_path(str(Path(found.origin).parent / "version.py"))
    except OSError:
        return "unknown"
    if constants.get("hip"):
        return f"none (torch is built for ROCm {constants['hip']})"
    metal = ", which uses Metal" if sys.platform == "darwin" else ""
    return str(constants.get("cuda") or f"none (torch is built for the CPU{metal})")

"""How much memory a device has, and what of it is taken or kept free."""

import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from remax.config import PlanInputs
from remax.config.plan import parse_bytes
from remax.plan.phases import Device

RUN_BYTES = 56 * 2**20
"""What a process on a CPU grows by in its first steps, beside tensors: libraries that load late, their buffers, the
objects of the models. Measured."""
WORKSPACE_BYTES = 32 * 2**20
"""cuBLAS's, which torch takes from its own memory (on a Hopper GPU; 8 MiB on others)."""
KEPT_FREE = 0.05
"""Fraction of the device's memory that a plan does not fill: the CUDA context, and what fragmentation wastes."""
LEAST_KEPT_FREE = 2**30
"""On a GPU, at least this."""
CONTROL_GROUP = Path("/sys/fs/cgroup")
CONTROL_GROUP_FILES = (
    (CONTROL_GROUP / "memory.max", CONTROL_GROUP / "memory.current"),
    (CONTROL_GROUP / "memory/memory.limit_in_bytes", CONTROL_GROUP / "memory/memory.usage_in_bytes"),
)
"""Limit and usage of a container's memory, in versions 2 and 1."""


@dataclass(frozen=True)
class Memory:
    """The memory that a plan has to fit in."""

    device: Device
    name: str
    total: int

    @property
    def usable(self) -> int:
        """Without what is kept free."""
        kept = int(self.total * KEPT_FREE)
        return self.total - (max(kept, LEAST_KEPT_FREE) if self.device.kind == "cuda" else kept)


def memory_of(inputs: PlanInputs) -> Memory:
    """Returns the device that is asked about: of --device_memory, this machine's GPU, or its main memory.

    On a CPU, what is free now counts, and this process stands for the libraries that a run loads.
    """
    if inputs.device_memory is not None:
        size = parse_bytes(inputs.device_memory, flag="--device_memory")
        return Memory(_gpu(size), f"{inputs.num_devices} x {inputs.device_memory}", size)
    if torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
        return Memory(_gpu(size), torch.cuda.get_device_name(), size)
    used = resident_bytes()
    return Memory(Device("cpu", used + RUN_BYTES), "CPU", free_main_memory() + used)


def _gpu(size: int) -> Device:
    return Device("cuda", WORKSPACE_BYTES, size)


def base_bytes(device: torch.device, loaded: Sequence[Any] = ()) -> int:
    """Returns what a process holds before a run loads its models; loaded ones are taken off."""
    own = [p for model in loaded if isinstance(model, nn.Module) for p in model.parameters()]
    there = sum(p.numel() * p.element_size() for p in own if p.device.type == device.type)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) + WORKSPACE_BYTES - there
    return resident_bytes() + RUN_BYTES - there


def resident_bytes() -> int:
    """Returns the resident size of this process; elsewhere than on Linux the largest that it had."""
    if sys.platform == "linux":
        return _kilobytes("/proc/self/status", "VmRSS")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_main_memory() -> int:
    """Returns the bytes that a process can still take: what the system and its control group have left.

    Elsewhere than on Linux, all that there are.
    """
    if sys.platform != "linux":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    for limit, usage in CONTROL_GROUP_FILES:
        if limit.exists() and usage.exists() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
            free = min(free, int(text) - int(usage.read_text(encoding="ascii")))
    return max(0, free)


def _kilobytes(file: str, name: str) -> int:
    """Returns the bytes that a file of /proc names in kB."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024

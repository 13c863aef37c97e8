"""The device, as the measurements use it."""

import contextlib
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_bench.shapes import datasheet


class Device:
    """The stand-in on a CPU: same interface, nothing to wait for, no cap, no peaks."""

    type = "cpu"
    name = platform.processor() or "cpu"
    total_bytes = 0
    bandwidth: float
    """Bytes per second by the datasheet; of devices that are not in the table, as a copy has it."""
    copy_bandwidth: float
    """Bytes read and written per second by a copy."""
    flops: float
    """bf16 operations per second by the datasheet; of other devices, as a matrix product has it."""
    matmul_flops: float
    """Of a matrix product."""

    def measure(self, copy_bytes: int = 2**26, matrix: int = 512, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Measures bandwidth (read + written) and matrix product; returns all that is known of the device."""
        source = torch.empty(copy_bytes, dtype=torch.uint8, device=self.type).fill_(1)
        target = torch.empty_like(source)
        copy = min(self.seconds(lambda: target.copy_(source)) for _ in range(10))
        left, right = torch.randn(2, matrix, matrix, device=self.type).to(dtype).unbind()
        product = statistics.median(self.seconds(lambda: left @ right) for _ in range(10))
        self.copy_bandwidth, self.matmul_flops = 2 * copy_bytes / copy, 2 * matrix**3 / product
        bandwidth, flops = datasheet(self.name)
        self.bandwidth, self.flops = bandwidth or self.copy_bandwidth, flops or self.matmul_flops
        return {
            "name": self.name,
            "total_bytes": self.total_bytes,
            "datasheet": {"bytes_per_second": bandwidth, "bf16_flops": flops},
            "measured": {"copy_bytes_per_second": self.copy_bandwidth, "matmul_flops": self.matmul_flops},
        }

    def seconds(self, function: Callable[[], Any]) -> float:
        """Returns how long a call takes, its work on the device included."""
        self.synchronise()
        started = time.perf_counter()
        function()
        self.synchronise()
        return time.perf_counter() - started

    def synchronise(self) -> None:
        """Waits for the device."""

    def release(self) -> None:
        """Gives back what nobody uses."""
        gc.collect()

    def allocated(self) -> int:
        """Returns the bytes of live tensors."""
        return 0

    def reserved(self) -> int:
        """Returns the bytes that torch holds, used or not."""
        return 0

    @contextlib.contextmanager
    def cap(self, num_bytes: float) -> Iterator[None]:
        """Inside, more than so many bytes are out of memory."""
        yield


class Cuda(Device):
    """The first CUDA GPU."""

    type = "cuda"

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name(0)
        self.total_bytes = torch.cuda.mem_get_info(0)[1]

    def measure(
        self, copy_bytes: int = 2**31, matrix: int = 8192, dtype: torch.dtype = torch.bfloat16
    ) -> dict[str, Any]:
        """Measures bandwidth and matrix product; returns all that is known of the device."""
        return super().measure(copy_bytes, matrix, dtype)

    def synchronise(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize()

    def release(self) -> None:
        """Gives back what nobody uses, the allocator's reserve included."""
        super().release()
        torch.cuda.empty_cache()

    def allocated(self) -> int:
        """Returns the bytes of live tensors."""
        return torch.cuda.memory_allocated()

    def reserved(self) -> int:
        """Returns the bytes that torch holds, used or not."""
        return torch.cuda.memory_reserved()

    @contextlib.contextmanager
    def cap(self, num_bytes: float) -> Iterator[None]:
        """Inside, torch's allocator takes no more than so many bytes (the context of CUDA, about 0.5 GB, is beside)."""
        self.release()
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / self.total_bytes))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

"""What a training says of its memory at the end: what was predicted beside what was measured."""

from collections.abc import Mapping

import torch
from torch import nn

from remax.components import Components
from remax.config import ReMaxConfig
from remax.plan.networks import measure_networks, networks_of
from remax.plan.phases import Device, Peak, Workload, largest, predict

MIB = 2**20


def predict_peaks(
    parts: Components, args: ReMaxConfig, *, base_bytes: int, value_model: nn.Module | None = None
) -> dict[str, Peak]:
    """Returns the peak of every phase of a run, for its longest prompt and the longest completions that it allows.

    base_bytes: what the process held before its models were loaded, see base_bytes of this package.
    """
    networks = measure_networks(networks_of(parts, value_model), args)
    work = Workload(args.batch_size, max(len(prompt.token_ids) for prompt in parts.prompts), args.max_completion_length)
    return predict(networks, args, work, _device(parts, base_bytes))


def _device(parts: Components, base_bytes: int) -> Device:
    device = parts.accelerator.device
    if device.type != "cuda":
        return Device("cpu", base_bytes)
    return Device("cuda", base_bytes, torch.cuda.get_device_properties(device).total_memory)


def describe_peaks(
    parts: Components,
    args: ReMaxConfig,
    measured: Mapping[str, float],
    *,
    base_bytes: int,
    value_model: nn.Module | None = None,
) -> str:
    """Returns a line with the peak of every phase, measured and predicted; never raises.

    measured: bytes by phase, the largest of all steps.
    """
    phase = max(measured, key=lambda name: measured[name], default="")
    if not phase:
        return "Peak memory: nothing was measured."
    line = f"Peak memory: measured {_size(measured[phase])} ({phase})"
    if parts.processes.num > 1:
        return f"{line}, in the first of {parts.processes.num} processes."  # What each has of the work was not planned.
    try:
        predicted = predict_peaks(parts, args, base_bytes=base_bytes, value_model=value_model)
        top = largest(predicted)
        pairs = [f"{p} {_size(measured[p])} / {_size(predicted[p].total)}" for p in measured if p in predicted]
    except Exception as error:  # A run that is done must not fail for a figure about it.
        return f"{line}; no prediction for this model ({type(error).__name__})."
    return f"{line}, predicted {_size(top.total)} ({top.phase}). Measured / predicted: {', '.join(pairs)}."


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / MIB:.0f} MiB"

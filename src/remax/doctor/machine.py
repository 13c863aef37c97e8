"""The machine: versions, devices, disk space, memory."""

import math
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from remax.doctor.context import Context
from remax.doctor.findings import Finding, judged
from remax.plan import formulas
from remax.plan.phases import largest
from remax.plan.report import gib

DISTRIBUTION = "remax-rlhf"
SHOWN_VERSIONS = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")
GPU_FREE = 0.9
"""Less of a GPU being free means that another process computes there: the CUDA context alone takes far less."""
DISK_FILLED = 0.8
"""More of the free space being needed is a warning: logs, completions and other programs write too."""


def check_versions(context: Context) -> list[Finding]:
    """Whether the libraries are those that this release was made for."""
    shown = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in SHOWN_VERSIONS)])
    wrong = []
    for requirement in map(Requirement, requires(DISTRIBUTION) or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(there, prereleases=True):
            wrong.append(f"{requirement.name} {there} is not {requirement.specifier}")
    finding = f"{shown}; {', '.join(wrong)}" if wrong else shown
    return [
        judged("versions", finding, f"pip install {DISTRIBUTION} again, in an environment of its own", warn=bool(wrong))
    ]


def check_device(context: Context) -> list[Finding]:
    """What the run will compute on, and whether somebody else does."""
    device, threads = context.accelerator.device, torch.get_num_threads()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = f"{torch.cuda.get_device_name(device)}, {gib(free)} of {gib(total)} GiB free"
        if context.args.bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            return [judged("device", f"{name}; it has no bfloat16 units", "leave --bf16 out", warn=True)]
        fix = "end the other process, or choose another GPU with CUDA_VISIBLE_DEVICES"
        return [judged("device", name, fix, warn=free < GPU_FREE * total)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = f"{device.type}, {cores} cores, of which torch uses {threads}"
    if device.type == "cpu" and torch.version.cuda:
        fix = "check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES, or ignore this on a machine without a GPU"
        return [
            judged("device", f"{name}; torch is built for CUDA {torch.version.cuda} but sees no GPU", fix, warn=True)
        ]
    return [judged("device", name, f"set OMP_NUM_THREADS={cores} or less", warn=threads > cores)]


def check_disk_space(context: Context) -> list[Finding]:
    """Whether models and checkpoints will fit in the file system of --output_dir."""
    folder = Path(context.args.output_dir).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    parts = _written(context)
    needed = sum(parts.values())
    listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    finding = f"{_size(needed)} will be written ({listed}), {_size(free)} are free in {there}"
    fix = "free some, or set an --output_dir in a larger file system"
    return [judged("disk space", finding, fix, fail=needed > free, warn=needed > DISK_FILLED * free)]


def _written(context: Context) -> dict[str, int]:
    """Returns the bytes of what a run leaves, by name; adapters are merged, so models are whole."""
    args, plan, size = context.args, context.plan, formulas.weight_size(context.args)
    model = plan.parameters["policy"] * size
    written = {"model": model}
    if context.inputs.eval_dataset and args.save_best_model:
        written["best model"] = model
    # A checkpoint has what is trained, and the optimiser's states of it.
    trained = sum(plan.parameters.get(name, 0) for name in ("policy", "value")) * size
    if args.use_peft:
        trained = max(peak.gradients for peak in plan.peaks.values())
    if number := _checkpoints(context):
        written[f"{number} checkpoint{'s' * (number > 1)}"] = number * (trained + largest(plan.peaks).optimiser)
    return written


def _checkpoints(context: Context) -> int:
    """Returns how many checkpoints there are at once: a new one is complete before an old one goes."""
    args = context.args
    if args.save_steps == -1:
        return 0
    steps = args.max_steps
    if steps == -1:
        steps = math.ceil(args.num_train_epochs * (len(context.prompt_contents) // args.batch_size))
    saved = math.ceil(steps / args.save_steps) if args.save_steps else 1
    return min(args.save_total_limit + 1, max(1, saved))


def _size(size: float) -> str:
    return f"{gib(size)} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def check_memory(context: Context) -> list[Finding]:
    """Whether the run fits on the device, as `remax plan` predicts."""
    plan = context.plan
    peak = largest(plan.peaks)
    finding = (
        f"{_size(peak.total)} at the peak ({peak.phase}), {_size(plan.memory.usable)} of {plan.memory.name} can be used"
    )
    fix = f"set {plan.proposal.flags}" if plan.proposal else "take a smaller model or a larger device; see `remax plan`"
    return [judged("memory", finding, fix, fail=not plan.fits)]

"""DeepSpeed's ZeRO, which takes a step's gradients, clips them and updates weights by itself.

ZeRO-2 divides gradients and optimiser states among the processes, ZeRO-3 the weights too. What it has in common with
other ways is in the learner; here is what it wants to be asked for otherwise.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from transformers.integrations import unset_hf_deepspeed_config

from remax.errors import UserError
from remax.guards.finite import NotFinite

PARTS = "zero"
"""The folder of DeepSpeed's files in a checkpoint's shards."""


def stage_of(accelerator: Accelerator) -> int:
    """Returns which ZeRO the launcher's settings ask for, 0 for none."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return int(accelerator.state.deepspeed_plugin.zero_stage)


def load_whole(accelerator: Accelerator) -> None:
    """Lets every process load models whole: they are copied and looked at before they are divided."""
    if stage_of(accelerator):
        unset_hf_deepspeed_config()


def configure(accelerator: Accelerator, max_grad_norm: float) -> None:
    """Tells DeepSpeed, before it takes a network, what the settings say: it has a config of its own."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["gradient_clipping"] = max_grad_norm
    # It only counts samples with these; the learner says where a step ends.
    config["train_micro_batch_size_per_gpu"] = config["gradient_accumulation_steps"] = 1
    if accelerator.mixed_precision == "bf16":
        # By itself it would hold the weights in bfloat16, and Accelerate leave autocast out.
        config["bf16"] = {"enabled": False}
        accelerator.native_amp = True


# Steps ----------------------------------------------------------------------------------------------------------------


def update(engine: Any, losses: Iterable[Tensor], num_losses: int, accelerator: Accelerator) -> float:
    """Takes one step on the sum of the losses and returns the gradient's norm before clipping, see Learner.update."""
    total = torch.zeros((), device=accelerator.device)
    try:
        remaining = iter(losses)
        for number in range(1, num_losses + 1):
            loss = next(remaining)
            engine.set_gradient_accumulation_boundary(number == num_losses)
            # It takes the mean over the processes, where a sum is wanted.
            engine.backward(loss * accelerator.num_processes, scale_wrt_gas=False)
            total += loss.detach()
        for _ in remaining:
            raise AssertionError("more losses than were announced")
        if not math.isfinite(float(accelerator.reduce(total, "sum"))):
            raise NotFinite("loss")
    except NotFinite:
        _forget(engine)
        raise
    engine.step()
    if engine.optimizer.overflow:
        raise NotFinite("gradient")
    return float(engine.get_global_grad_norm())


def _forget(engine: Any) -> None:
    """Drops the gradients: with one that is not finite DeepSpeed takes no step and clears them all."""
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    weight = next(p for p in engine.module.parameters() if p.requires_grad)
    safe_set_full_grad(weight, torch.full_like(safe_get_full_grad(weight), math.nan))
    engine.step()
    assert engine.optimizer.overflow


# Weights --------------------------------------------------------------------------------------------------------------


def is_divided(parameter: Tensor) -> bool:
    """Whether DeepSpeed leaves this process with a part of a parameter (ZeRO-3)."""
    return hasattr(parameter, "ds_id")


def gathered(parameter: Tensor) -> Tensor:
    """Returns all of a parameter that is divided; to be called by all processes, in one order."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


# Checkpoints ----------------------------------------------------------------------------------------------------------


def is_engine(network: Any) -> bool:
    """Whether DeepSpeed trains a network."""
    return type(network).__module__.startswith("deepspeed.")


def save(engine: Any, folder: Path) -> None:
    """Writes weights and optimiser states in DeepSpeed's own format; to be called by all processes."""
    engine.save_checkpoint(str(folder), tag=PARTS, save_latest=False, exclude_frozen_parameters=True)


def check_parts(network: Any, folder: Path) -> None:
    """Raises UserError if a checkpoint, or the processes here, are DeepSpeed's and do not fit.

    Its parts are for as many processes as wrote them, and for the same stage.
    """
    num_parts = len(list((folder / PARTS).glob("*optim_states.pt")))
    if bool(num_parts) != is_engine(network):
        said, instead = ("a ", "zero2 or zero3") if num_parts else ("no ", "ddp or fsdp2")
        raise UserError(
            f"--resume goes on from {folder.parent}: that is {said}checkpoint of DeepSpeed, whose parts only it can "
            f"read; start the processes with --accelerate_config {instead}."
        )
    if num_parts and num_parts != torch.distributed.get_world_size():
        raise UserError(
            f"--resume goes on from {folder.parent}: {num_parts} processes wrote it, and DeepSpeed's parts fit no "
            f"other number; set --num_processes {num_parts}."
        )
    stage = 2 if (folder / PARTS / "mp_rank_00_model_states.pt").exists() else 3  # there each process writes weights
    if num_parts and network.zero_optimization_stage() != stage:
        raise UserError(
            f"--resume goes on from {folder.parent}: that is a checkpoint of ZeRO-{stage}, whose parts fit no other "
            f"stage; start the processes with --accelerate_config zero{stage}."
        )


def load(engine: Any, folder: Path) -> None:
    """Puts back what `save` wrote; rates and betas stay those of the settings."""
    optimizer = engine.optimizer.optimizer
    kept = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    engine.load_checkpoint(str(folder), tag=PARTS, load_module_strict=False, load_lr_scheduler_states=False)
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)

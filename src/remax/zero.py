"""DeepSpeed's ZeRO, which takes a step's gradients, clips them and updates weights by itself.

ZeRO-2 divides gradients and optimiser states among the processes, ZeRO-3 the weights too. What it has in common with
other ways is in the learner; here is what it wants to be asked for otherwise.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from transformers.integrations import unset_hf_deepspeed_config

from remax.guards.finite import NotFinite


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


def most_of_all(number: int, device: torch.device) -> int:
    """Returns the largest of the numbers of all processes; to be called by all of them."""
    largest = torch.tensor(number, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def gathered(parameter: Tensor) -> Tensor:
    """Returns all of a parameter that is divided; to be called by all processes, in one order."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


# Checkpoints ----------------------------------------------------------------------------------------------------------


def is_engine(network: Any) -> bool:
    """Whether DeepSpeed trains a network."""
    return type(network).__module__.startswith("deepspeed.")


def trained(engine: Any) -> list[tuple[Tensor, Tensor]]:
    """Returns the weights that are trained, each with the vector of DeepSpeed's that holds this process' part of it.

    They are in the order of the optimiser as it was before DeepSpeed let it step on the vectors; so states are theirs.
    """
    by = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        groups = zip(by.fp16_groups, by.fp32_partitioned_groups_flat, strict=True)
    else:
        groups = zip(by.bit16_groups, by.single_partition_of_fp32_groups, strict=True)
    return [(weight, vector) for weights, vector in groups for weight in weights]


def shape_of(weight: Tensor) -> torch.Size:
    """Returns the shape of all of a weight, of which this process may hold a part."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def state_of(engine: Any, weight: Tensor, vector: Tensor) -> Iterator[tuple[str, Any]]:
    """Yields what the optimiser holds of a weight, tensors whole and one after the other.

    To be called by all processes, in one order.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    states = engine.optimizer.optimizer.state.get(vector, {})
    _link(engine, weight, vector)
    for key, value in states.items():
        is_like_weight = isinstance(value, Tensor) and value.shape == vector.shape
        yield key, safe_get_full_optimizer_state(weight, key) if is_like_weight else value


def put_weights(engine: Any, values_of: Callable[[Tensor], Tensor]) -> None:
    """Replaces the weights that are trained by others, whole ones; to be called by all processes."""
    import deepspeed

    for weight, _ in trained(engine):
        with torch.no_grad(), deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            weight.copy_(values_of(weight))
    engine.optimizer.refresh_fp32_params()


def put_states(engine: Any, states_of: Callable[[int], Iterable[tuple[str, Any]]]) -> None:
    """Replaces what the optimiser has learned; rates and betas stay. To be called by all processes.

    states_of: names and values, tensors whole, by a weight's number.
    """
    for number, (weight, vector) in enumerate(trained(engine)):
        for key, value in states_of(number):
            if isinstance(value, Tensor) and value.dim() > 0:
                _put_state(engine, weight, vector, key, value)
            else:
                _put_count(engine, vector, key, value)


def _put_state(engine: Any, weight: Tensor, vector: Tensor, key: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    # The optimiser itself would make them in its first step.
    engine.optimizer.optimizer.state[vector].setdefault(key, torch.zeros_like(vector))
    if not is_divided(weight):
        _link(engine, weight, vector)
        safe_set_full_optimizer_state(weight, value, key)
        return
    # Its own way to set all of it fails where the last process' part is filled up.
    length, rank = weight.ds_tensor.numel(), torch.distributed.get_rank()  # type: ignore[attr-defined]
    values = value.flatten()[length * rank : length * (rank + 1)]
    part = torch.zeros(length, dtype=value.dtype)
    part[: len(values)] = values
    safe_set_local_optimizer_state(weight, part, key)


def _link(engine: Any, weight: Tensor, vector: Tensor) -> None:
    """Lets ZeRO-2 find a weight's states, which it looks for only once, after its first vector's first step."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if not is_divided(weight):
        lazy_init_hp_params_optimizer_state([weight], vector, engine.optimizer.optimizer.state)


def _put_count(engine: Any, vector: Tensor, key: str, value: Any) -> None:
    """Puts a number of steps, which all weights of a vector share: the most that any of them has taken."""
    optimizer = engine.optimizer.optimizer
    if isinstance(value, Tensor) and optimizer.defaults.get("fused"):
        value = value.to(vector.device)  # One kernel reads it; several want it where Python can.
    state = optimizer.state[vector]
    state[key] = max(state.get(key, value), value)

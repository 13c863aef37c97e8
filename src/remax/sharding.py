"""Weights that several processes hold in parts (FSDP2, ZeRO-3): all of them, where something needs whole tensors."""

from collections.abc import Iterable

from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from remax.zero import gathered, is_divided, stage_of


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether the launcher's settings leave each process with parts of the weights only."""
    return bool(accelerator.distributed_type == DistributedType.FSDP) or stage_of(accelerator) == 3


def shard_frozen(model: nn.Module, accelerator: Accelerator, *, casts: bool) -> None:
    """Leaves each process with a part of a model that is not trained, in place; it is gathered layer by layer.

    casts: whether weights and inputs become bfloat16 in a run under --bf16, as those of what is trained do; else the
    model is left to autocast, as it would be in one process.

    DeepSpeed divides only what it trains: there each process gets all of it.
    """
    if stage_of(accelerator):
        model.to(accelerator.device)
        return
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    try:
        plugin.mixed_precision_policy = policy if casts else None
        fsdp2_prepare_model(accelerator, model)
    finally:
        plugin.mixed_precision_policy = policy


def release(module: nn.Module) -> None:
    """Gives back whole weights that passes have left, for which the next pass would take them, however old."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only parts of some weights."""
    return any(_is_part(parameter) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor, of which each process may hold a part, detached.

    All of them have to call this, in one order. A parameter that DeepSpeed divides has to be given itself.
    """
    if is_divided(tensor):
        return gathered(tensor)
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def trainable_weights(network: nn.Module, *, keeps: bool) -> dict[str, Tensor]:
    """Returns the weights that are trained, see `kept`."""
    named = ((name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad)
    return kept(network, ((name, whole(parameter).contiguous()) for name, parameter in named), keeps=keeps)


def kept(network: nn.Module, weights: Iterable[tuple[str, Tensor]], *, keeps: bool) -> dict[str, Tensor]:
    """Returns whole weights of a network by name; none where keeps is False, in a process that only helps to gather.

    On the CPU where they are sharded: a second set of weights may not fit beside the parts.
    """
    found, off_device = {}, is_sharded(network)
    for name, weight in weights:
        if keeps:
            found[name] = weight.cpu() if off_device else weight
    return found


def _is_part(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) or is_divided(parameter)

"""Weights that several processes hold in parts (FSDP2): all of them, where something needs whole tensors."""

from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether the launcher's settings leave each process with parts of the weights only."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def shard_frozen(model: nn.Module, accelerator: Accelerator) -> None:
    """Leaves each process with a part of a model that is not trained, in place; it is gathered layer by layer."""
    fsdp2_prepare_model(accelerator, model)


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only parts of some weights."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor, of which each process may hold a part; all of them have to call this, in one order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trainable_weights(network: nn.Module) -> dict[str, Tensor]:
    """Returns the weights that are trained, by name and whole, on the CPU where they are sharded."""
    return {
        name: _off_device(parameter.detach())
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


def _off_device(tensor: Tensor) -> Tensor:
    # A second set of weights may not fit beside the parts.
    return whole(tensor).cpu() if isinstance(tensor, DTensor) else tensor.contiguous()

"""Optimisers by name; the names are those of transformers."""

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from remax.compilation import check_compiler
from remax.config import OptimiserOptions
from remax.errors import UserError
from remax.logs import hush


def check_optimiser(args: OptimiserOptions) -> None:
    """Raises UserError if --optim needs what is not installed; to be called before a model is loaded."""
    if args.optim != "adamw_torch_8bit":
        return
    if find_spec("torchao") is None:
        raise UserError(
            f"--optim is {args.optim}: its states of one byte come from torchao, which is not installed; run "
            'pip install "remax-rlhf[quantization]", or set another one, such as adamw_torch_fused.'
        )
    check_compiler(f"--optim is {args.optim}", instead="--optim adamw_torch_fused")


def make_optimizer(network: nn.Module, args: OptimiserOptions) -> torch.optim.Optimizer:
    """Returns the optimiser --optim over the trainable weights; biases and norms (vectors) do not decay.

    adamw_torch_fused, adamw_torch: torch's AdamW, as one kernel or as several; the same numbers up to rounding.
    adamw_torch_8bit: torchao's, with states of one byte for tensors of 4096 weights and more. It computes in float32
    and rounds bfloat16 weights stochastically, with torch's global generator: an update that is far smaller than a
    weight's last digit arrives in the mean. Its state dict can be read with weights_only once torchao is imported, as
    it is here.
    adafactor: transformers' with an explicit rate, as its own trainers set it up. (torch's multiplies the rate by
    each matrix's own size, so a rate for AdamW would mean something else.) The betas and the epsilon are AdamW's alone.

    Raises:
        UserError: no fused kernel for these weights exists.
    """
    trainable = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # DeepSpeed drops empty ones; schedules count on them.
    if args.optim == "adafactor":
        return _Adafactor(groups, lr=args.learning_rate, scale_parameter=False, relative_step=False)
    adam: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if args.optim == "adamw_torch_8bit":
        return _adamw_8bit(groups, **adam)
    if args.optim == "adamw_torch_fused":
        _require_fused(trainable)
        return torch.optim.AdamW(groups, **adam, fused=True)
    # Not fused=False, which would also keep torch from its faster kernels over lists of tensors.
    return torch.optim.AdamW(groups, **adam)


def _adamw_8bit(groups: list[dict[str, Any]], **adam: Any) -> torch.optim.Optimizer:
    hush()
    from torchao.optim import AdamW8bit

    warnings.filterwarnings("ignore", message="OptimState8bit does not implement _stable_hash_for_caching")
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **adam, bf16_stochastic_round=True)
    return optimizer


def _require_fused(trainable: list[nn.Parameter]) -> None:
    """Raises UserError unless a fused step can be taken; torch itself would tell in the middle of the first one."""
    for dtype, device in {(p.dtype, p.device) for p in trainable}:
        weight = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
        weight.grad = torch.zeros_like(weight)
        try:
            torch.optim.AdamW([weight], fused=True).step()
        except RuntimeError as error:
            raise UserError(
                f"--optim is adamw_torch_fused: torch has no such kernel for {dtype} weights on {device.type}; set "
                "--optim adamw_torch."
            ) from error


class _Adafactor(Adafactor):  # type: ignore[misc]
    """Its states are float32 whatever the weights are; in loading, torch would round them to the weights' type."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        saved_groups = state_dict["param_groups"]
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            for parameter, index in zip(group["params"], saved_group["params"], strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor):
                        self.state[parameter][name] = value.to(parameter.device, copy=True)

"""Frozen models in bfloat16: half the memory, without a change of what autocast computes from them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def hold_in_bfloat16(model: Any) -> None:
    """Casts a frozen model's linear layers to bfloat16, in place: 2 bytes per weight instead of 4.

    The model can be used under bfloat16 autocast only, and there its outputs stay bit for bit what they were: autocast
    would cast the same weights at each use. Embeddings and a head that is tied to one stay as they are; the head of a
    classifier does too, and computes in float32 from now on.
    """
    heads = _classifier_heads(model)
    for layer in castable_layers(model):
        if layer.weight.dtype == torch.float32:
            layer.to(torch.bfloat16)
    for name, head in heads.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, _Float32Linear.around(head))


def castable_layers(model: nn.Module) -> list[Any]:
    """Returns the linear layers that `hold_in_bfloat16` casts."""
    kept = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    kept += [head.weight for head in _classifier_heads(model).values()]
    layers: list[Any] = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    return [layer for layer in layers if not any(layer.weight is weight for weight in kept)]


def _classifier_heads(model: Any) -> dict[str, nn.Linear]:
    """Returns the linear layers behind the body of a sequence classification model, by name; none of other models."""
    if "ForSequenceClassification" not in type(model).__name__:
        return {}
    body = set(model.base_model.modules())
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m not in body}


class _Float32Linear(nn.Linear):
    """A linear layer that computes in float32 under autocast too."""

    @classmethod
    def around(cls, layer: nn.Linear) -> "_Float32Linear":
        """Returns a layer with the same weights."""
        own = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        own.weight, own.bias = layer.weight, layer.bias
        return own

    def forward(self, input: Tensor) -> Tensor:
        """Returns the output, float32."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())

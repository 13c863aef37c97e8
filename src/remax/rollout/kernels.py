"""Faster kernels under a model's linear layers and attention, for the time of a rollout.

One token a row is an awkward size: a matrix library that reorders the weights in every call spends more time on that
than on the product, and attention kernels that are tiled over queries have a single one to work on. What the model
computes stays what it was, up to rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from remax.rollout.lean import LeanBody, can_be_lean, joined_projections

_MIN_ELEMENTS = 2**16
"""Smaller weights stay in the processor's cache, and the call of a packed product costs more than it saves."""
_MIN_TOKENS = 16
"""Packing takes about as long as the packed products of ten steps save."""
_ROWS = 64
"""oneDNN packs for a number of rows; packed for this many, weights served 1 to 512 rows equally well."""


@contextmanager
def decoding_kernels(model: nn.Module, num_new_tokens: int) -> Iterator[None]:
    """Within it the model decodes faster; its weights must not change meanwhile, and nothing can be differentiated.

    On a CPU in float32: attention of a single query as two batched products; if num_new_tokens are enough to pay for
    it, the weights of linear layers packed by oneDNN (a copy: 4 bytes per weight), and single tokens past the modules
    of a Llama-like model (see LeanBody). Under autocast, on any device: a copy of the weights that it would cast, made
    once; its results are the same bits. On CUDA: attention of a single query that never repeats the keys of grouped
    heads.
    """
    device_type = next(model.parameters()).device.type
    layers = [layer for layer in _linear_layers(model) if layer.weight.dtype == torch.float32]
    forwards: dict[Any, Callable[..., Any]] = {}
    if torch.is_autocast_enabled(device_type):
        forwards = {layer: _cast_product(layer) for layer in layers if isinstance(layer, nn.Linear)}
    elif device_type == "cpu" and num_new_tokens >= _MIN_TOKENS:
        body = _lean_body(model)
        joined = set() if body is None else set(joined_projections(body))
        forwards = {layer: _product_of(layer) for layer in layers if layer not in joined and _is_packed(layer.weight)}
        if body is not None:
            forwards[body] = LeanBody(body, make_product, _two_products)
    try:
        for module, forward in forwards.items():
            module.forward = forward
        with _attention(single_query_attention):
            yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


def _lean_body(model: Any) -> Any:
    """Returns the body of a model whose single tokens can go past its modules; None if they cannot."""
    body = getattr(model, "base_model", model)
    in_float32 = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return body if body is not model and in_float32 and _attends_plainly(body) and can_be_lean(body) else None


def _attends_plainly(body: Any) -> bool:
    """Whether attention is the plain one: no function that somebody registered or put in its place."""
    if ALL_ATTENTION_FUNCTIONS.get("sdpa") is not sdpa_attention_forward:
        return False
    return body.config._attn_implementation in ("sdpa", "eager")


def _linear_layers(model: nn.Module) -> list[Any]:
    """Returns the layers that compute with their weight as it is: no subclass, no quantisation, no hook's forward."""
    layers = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    return [layer for layer in layers if type(layer.weight) is nn.Parameter and "forward" not in vars(layer)]


def _cast_product(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    dtype = torch.get_autocast_dtype(layer.weight.device.type)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    return partial(functional.linear, weight=layer.weight.detach().to(dtype), bias=bias)


def _packs() -> bool:
    """Whether this build of torch has oneDNN's packed product for this processor."""
    if not torch.backends.mkldnn.is_available() or "AVX" not in torch.backends.cpu.get_cpu_capability():  # type: ignore[no-untyped-call]
        return False
    return all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))


def _is_packed(weight: Tensor) -> bool:
    return weight.numel() >= _MIN_ELEMENTS and _packs()


def make_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Returns the fastest product with a weight [outputs, inputs], of which it keeps a copy, and a bias."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if not _is_packed(weight):
        return partial(functional.linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)

    def product(input: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
        return output

    return product


def _product_of(layer: Any) -> Callable[[Tensor], Tensor]:
    weight = layer.weight.t().contiguous() if isinstance(layer, Conv1D) else layer.weight  # GPT-2 keeps it transposed
    return make_product(weight, layer.bias)


def single_query_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Takes the place of transformers' sdpa attention; computes what that computes.

    query [rows, heads, n, size], key and value [rows, key heads, tokens, size]; returns [rows, n, heads, size].
    """
    rows, heads, num_queries, size = query.shape
    special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    own_mask_per_head = attention_mask is not None and attention_mask.shape[1] > 1
    attend = _attends_with(query, key, value)
    if num_queries > 1 or special or own_mask_per_head or attend is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    key_heads = key.shape[1]
    # The queries of heads that share their keys are like several queries of one head.
    grouped = query.reshape(rows, key_heads, heads // key_heads, size)
    attended = attend(grouped, key, value, attention_mask, size**-0.5 if scaling is None else scaling)
    return attended.reshape(rows, 1, heads, value.shape[-1]), None


def _attends_with(query: Tensor, key: Tensor, value: Tensor) -> Callable[..., Tensor] | None:
    if query.device.type == "cuda":
        return _one_kernel
    exact = query.dtype == key.dtype == value.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return _two_products if query.device.type == "cpu" and exact else None


def _one_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _two_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = torch.bmm(query.flatten(0, 1) * scale, key.flatten(0, 1).transpose(1, 2)).view(*query.shape[:3], -1)
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        scores += mask
    return torch.bmm(scores.softmax(-1).flatten(0, 1), value.flatten(0, 1))


@contextmanager
def _attention(function: Callable[..., Any]) -> Iterator[None]:
    """Puts the function in the place of sdpa attention, unless somebody else has put one there."""
    if ALL_ATTENTION_FUNCTIONS.get("sdpa") is not sdpa_attention_forward:
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]

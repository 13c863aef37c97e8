"""One token a row through the layers of a Llama-like model on a CPU, without the module calls between its operations.

In a small model the calls of modules, wrappers and hooks take longer than the arithmetic they lead to. Here are the
same operations one after the other, with queries, keys and values from one product, and gate and up from another.

Legend: N rows, H hidden size, D size of a head, Q query heads, K key heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPast

from remax.rollout.cache import RoomyLayer

Product = Callable[[Tensor], Tensor]
MakeProduct = Callable[[Tensor, Tensor | None], Product]
"""From a weight and a bias to the product with them."""
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""From queries [N, K, Q/K, D], keys and values [N, K, tokens, D], a mask and a scale to [N K, Q/K, D]."""

_MODELS = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
"""Bodies whose layers are what `_Layer` computes."""


class LeanBody:
    """Takes the place of the body's forward: single tokens go this way, everything else its own."""

    def __init__(self, body: Any, make_product: MakeProduct, attend: Attention) -> None:
        """The body must be one that `can_be_lean`, and its weights must not change."""
        self._whole = body.forward
        self._embed, self._rotary, self._norm = body.embed_tokens, body.rotary_emb, body.norm
        self._layers = [_Layer(layer, make_product, attend) for layer in body.layers]

    def __call__(self, **inputs: Any) -> Any:
        """Returns what the body returns; inputs are by keyword, as the language model passes them."""
        ids, cache = inputs["input_ids"], inputs["past_key_values"]
        if ids.shape[1] != 1 or not all(isinstance(layer, RoomyLayer) for layer in cache.layers):
            return self._whole(**inputs)
        states = self._embed(ids)
        cos, sin = self._rotary(states, inputs["position_ids"])
        half = sin.shape[-1] // 2
        # rotate_half negates its first half: here the sine does.
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        seen = inputs["attention_mask"].bool()
        mask = None if seen.all() else torch.where(seen, 0.0, -torch.inf)[:, None, None]
        states = states[:, 0]
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            states = layer(states, cos, sin, mask, layer_cache)
        return BaseModelOutputWithPast(last_hidden_state=self._norm(states[:, None]), past_key_values=cache)


class _Layer:
    """A decoder layer: attention with rotary positions and a gated MLP, each behind an RMSNorm."""

    def __init__(self, layer: Any, make_product: MakeProduct, attend: Attention) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._head_dim, self._scaling, self._attend = attention.head_dim, attention.scaling, attend
        self._num_queries = attention.q_proj.out_features // self._head_dim
        self._num_keys = attention.k_proj.out_features // self._head_dim
        self._input_norm, self._mlp_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self._head_norms: tuple[Product, ...] = ()
        if hasattr(attention, "q_norm"):
            self._head_norms = (_norm(attention.q_norm), _norm(attention.k_norm))
        self._qkv = _together(make_product, [attention.q_proj, attention.k_proj, attention.v_proj])
        self._gate_up = _together(make_product, [mlp.gate_proj, mlp.up_proj])
        self._out, self._down = attention.o_proj, mlp.down_proj
        self._activation = mlp.act_fn

    def __call__(self, states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: RoomyLayer) -> Tensor:
        """Returns the states [N, H] behind this layer; cos and sin are [N, 1, D]."""
        num_rows, num_queries = len(states), self._num_queries
        heads = self._qkv(self._input_norm(states)).view(num_rows, -1, self._head_dim)
        rotated, values = heads.tensor_split((num_queries + self._num_keys,), dim=1)
        if self._head_norms:
            parts = rotated.tensor_split((num_queries,), dim=1)
            rotated = torch.cat([norm(part) for norm, part in zip(self._head_norms, parts, strict=True)], 1)
        rotated = torch.addcmul(rotated * cos, rotated.roll(self._head_dim // 2, -1), sin)
        keys, values = cache.update(rotated[:, num_queries:, None], values[:, :, None])
        queries = rotated[:, :num_queries].reshape(num_rows, self._num_keys, -1, self._head_dim)
        attended = self._attend(queries, keys, values, mask, self._scaling)
        states = states + self._out(attended.reshape(num_rows, -1))
        gate, up = self._gate_up(self._mlp_norm(states)).chunk(2, -1)
        added: Tensor = self._down(self._activation(gate).mul_(up))
        return states + added


def can_be_lean(body: Any) -> bool:
    """Whether `_Layer` computes what the body's layers compute: plain modules of a known model, without hooks."""
    if type(body).__name__ not in _MODELS or 2 * body.rotary_emb.inv_freq.numel() != body.layers[0].self_attn.head_dim:
        return False
    modules = list(body.modules())
    projections = [module for module in modules if hasattr(module, "in_features")]
    return all(type(module) is nn.Linear for module in projections) and not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in modules
    )


def joined_projections(body: Any) -> list[Any]:
    """Returns the linear layers whose weights are copied into the products of a LeanBody."""
    return [
        projection
        for layer in body.layers
        for projection in (
            *(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            *(layer.mlp.gate_proj, layer.mlp.up_proj),
        )
    ]


def _norm(module: Any) -> Product:
    weight, epsilon = module.weight, module.variance_epsilon

    def norm(states: Tensor) -> Tensor:
        return functional.rms_norm(states, weight.shape, weight, epsilon)

    return norm


def _together(make_product: MakeProduct, projections: list[Any]) -> Product:
    """Returns one product that gives the outputs of several projections of the same input, side by side."""
    biases = [projection.bias for projection in projections if projection.bias is not None]
    if biases and len(biases) < len(projections):
        biases = [p.weight.new_zeros(p.out_features) if p.bias is None else p.bias for p in projections]
    weight = torch.cat([projection.weight for projection in projections])
    return make_product(weight, torch.cat(biases) if biases else None)

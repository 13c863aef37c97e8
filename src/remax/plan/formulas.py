"""What weights, optimisers, caches and activations take, by formula: from counts of parameters, widths and shapes.

Static bytes are exact, and so is the cache if no layer has a sliding window. The activations are those of a Llama-like
layer (RMSNorm, gated MLP, fused attention): for such models within ten percent, for others the right order of
magnitude.

Legend: n tokens of a pass, padding included; N positions that the language-model head is applied to; H hidden size,
I intermediate size, Q queries, K keys, V vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

from remax.config import ReMaxConfig
from remax.logprobs import chunk_elements
from remax.plan.networks import Counts, Network, TrainedTensor, Widths

ADAM_STATES = 2
"""Averages of the gradient and of its square, in the type of the weight; and a step number of 4 bytes per tensor."""
STEP_BYTES = 4
BLOCK = 256
"""Numbers that share a scale in 8-bit states; tensors that are small or no multiple of it keep their type."""
SMALLEST_8BIT = 4096
TABLE_8BIT = 256 * 4
"""What every 8-bit state has beside its codes: which number each stands for."""
MATRICES = 7
"""Linear layers in a Llama-like layer; how many there are only says how large each is."""
MIN_PACKED_TOKENS = 16
"""Shorter rollouts do not pack weights, as decoding_kernels has it."""


class Block(NamedTuple):
    """Some tensors of one size."""

    number: float
    size: int
    """Bytes of each."""

    @property
    def bytes(self) -> int:
        """Of all together."""
        return round(self.number * self.size)


def total(blocks: list[Block]) -> int:
    """Returns the bytes of all blocks."""
    return sum(block.bytes for block in blocks)


# Static ---------------------------------------------------------------------------------------------------------------


def weight_size(args: ReMaxConfig) -> int:
    """Returns the bytes of a weight of --dtype."""
    return 2 if args.dtype == "bfloat16" else 4


def is_half(args: ReMaxConfig) -> bool:
    """Whether matrices are multiplied in bfloat16."""
    return args.bf16 or args.dtype == "bfloat16"


def casts_weights(args: ReMaxConfig) -> bool:
    """Whether autocast makes bfloat16 copies of float32 weights."""
    return args.bf16 and args.dtype == "float32"


def weight_bytes(name: str, own: Counts, args: ReMaxConfig) -> int:
    """Returns the bytes of a network's weights between the steps.

    Frozen: 4 per weight, or 2 in linear layers with --bf16.
    """
    size = weight_size(args)
    if own.trained:
        return (own.parameters - own.always_float32) * size + own.always_float32 * 4
    held = size if name == "reference" else 4  # Reward models are loaded in float32.
    cast = own.castable if args.bf16 else 0
    return cast * 2 + (own.parameters - cast) * held


def element_size(tensor: TrainedTensor, args: ReMaxConfig) -> int:
    """Returns the bytes of one number of a weight that is trained, and of its gradient."""
    return 4 if tensor.always_float32 else weight_size(args)


def gradients(own: Counts, args: ReMaxConfig) -> list[Block]:
    """Returns the gradients of all trained weights."""
    return [Block(1, tensor.elements * element_size(tensor, args)) for tensor in own.trained_tensors]


def state_bytes(own: Counts, args: ReMaxConfig) -> int:
    """Returns the bytes of --optim's states: 8 per float32 weight with AdamW, 2 and scales in 8 bits."""
    return sum(_states_of(tensor, args) for tensor in own.trained_tensors)


def _states_of(tensor: TrainedTensor, args: ReMaxConfig) -> int:
    elements, size = tensor.elements, element_size(tensor, args)
    if args.optim == "adafactor":  # float32 whatever the weights are; and a number for their mean square.
        matrix = len(tensor.shape) > 1
        return 4 + 4 * (elements // tensor.shape[-1] + elements // tensor.shape[-2] if matrix else elements)
    if args.optim == "adamw_torch_8bit" and elements >= SMALLEST_8BIT and elements % BLOCK == 0:
        return STEP_BYTES + ADAM_STATES * (elements + elements // BLOCK * 4 + TABLE_8BIT)
    return STEP_BYTES + ADAM_STATES * elements * size


def optimiser_temporaries(own: Counts, args: ReMaxConfig, *, on_gpu: bool) -> list[Block]:
    """Returns what a step of --optim needs beside its states.

    The fused one nothing; the plain one a copy of all weights on a GPU, where it works on lists, and two of the largest
    on a CPU, as the others do anywhere.
    """
    sizes = [tensor.elements * element_size(tensor, args) for tensor in own.trained_tensors]
    if args.optim == "adamw_torch_fused" or not sizes:
        return []
    if args.optim == "adamw_torch" and on_gpu:
        return [Block(1, size) for size in sizes]
    return [Block(2, 4 * max(tensor.elements for tensor in own.trained_tensors))]


def static_bytes(counts: Mapping[str, Counts], args: ReMaxConfig) -> dict[str, int]:
    """Returns the bytes of weights, gradients and optimiser states, by name.

    Per trained weight of float32 with AdamW: 4 + 4 + 8. Per frozen weight: 4, or 2 in linear layers with --bf16.
    """
    trained = {name: own for name, own in counts.items() if own.trained}
    weights = {f"weights/{name}": weight_bytes(name, own, args) for name, own in counts.items()}
    grads = {f"gradients/{name}": total(gradients(own, args)) for name, own in trained.items()}
    states = {f"optimiser/{name}": state_bytes(own, args) for name, own in trained.items()}
    return weights | grads | states


def equal_size_bytes(counts: Mapping[str, Counts], args: ReMaxConfig) -> float | None:
    """Returns what theory says of static bytes per parameter if all networks had the same size; None with adapters.

    Mixed precision: 16 per network that is trained, 2 per frozen one; float32: 16 and 4.
    """
    if args.use_peft or args.dtype != "float32" or not args.optim.startswith("adamw_torch") or "8bit" in args.optim:
        return None
    num_trained = sum(own.trained > 0 for own in counts.values())
    return 16.0 * num_trained + (2.0 if args.bf16 else 4.0) * (len(counts) - num_trained)


# Rollout --------------------------------------------------------------------------------------------------------------


def kv_cache(widths: Widths, rows: int, length: int, args: ReMaxConfig) -> list[Block]:
    """Returns keys and values of rows x length tokens in all layers.

    length: of the longest prompt and --max_completion_length together, for which the engine makes room.
    """
    return [Block(2 * widths.layers, widths.keys * rows * length * (2 if is_half(args) else 4))]


def decoding_weights(network: Network, length: int, args: ReMaxConfig, *, on_gpu: bool) -> list[Block]:
    """Returns the copies of linear weights that a rollout of so many new tokens makes, the head's included.

    Under autocast in bfloat16; on a CPU in float32 packed by oneDNN, if there are enough tokens to pay for it.
    """
    own, matrices = network.counts, MATRICES * network.widths.layers
    packs = not on_gpu and args.dtype == "float32" and length >= MIN_PACKED_TOKENS
    size = 2 if casts_weights(args) else 4 if packs else 0
    return [Block(1, size * own.head), Block(matrices, size * own.linear // matrices)] if size else []


def choice(widths: Widths, rows: int, sampled: int, args: ReMaxConfig) -> list[Block]:
    """Returns what the draw of a token for each row makes of logits [rows, V].

    The logits themselves; of the sampled rows log-probabilities and probabilities in float32, and cumulative ones in 8
    bytes.
    """
    v = widths.vocabulary
    nucleus = [Block(2, 4 * sampled * v)] if args.top_p < 1 else []  # Sorting takes more than the draw.
    drawn = [Block(2, 4 * sampled * v), Block(1, 8 * sampled * v)]
    return [Block(1, rows * v * (2 if is_half(args) else 4)), *drawn, *nucleus]


# Passes ---------------------------------------------------------------------------------------------------------------


def forward_only(widths: Widths, tokens: int, *, half: bool) -> list[Block]:
    """Returns the widest place of a layer without gradients, in its MLP: 4 H in float32 and 3 I per token."""
    return [Block(4, 4 * tokens * widths.hidden), Block(3, tokens * widths.intermediate * (2 if half else 4))]


def activations(network: Network, tokens: int, outputs: int, args: ReMaxConfig, *, scorer: bool) -> list[Block]:
    """Returns what a pass of n tokens keeps for its backward pass.

    Per token and layer, in float32: 6 H (residual, normalised and scaled, before attention and before the MLP), 4 Q
    (queries, keys, values and what attention gives; padded batches repeat keys and values for every query head), 4 I
    (gate, its activation, up, their product). Under autocast everything but the residual and the normalised takes 2
    bytes, every linear layer keeps its own cast of its input (5 H), and all linear weights are there once more in
    bfloat16. With gradient checkpointing, a layer keeps its input. The head keeps its input (N outputs). With adapters,
    norms are frozen and keep 2 H less.

    scorer: whether the network is the policy, whose head gives logits; a value model's gives numbers.
    """
    own, w = network.counts, network.widths
    size = weight_size(args)
    blocks = [Block(2, tokens * w.hidden * (3 if args.dtype == "bfloat16" else 4))]
    if args.gradient_checkpointing:
        blocks.append(Block(w.layers, tokens * w.hidden * size))
    else:
        blocks += [Block(w.layers * block.number, block.size) for block in _layer(w, tokens, args)]
    blocks.append(Block(1, outputs * w.hidden * (2 if args.bf16 and scorer else 4)))
    if casts_weights(args):
        blocks.append(Block(1, 2 * own.head))
        if not args.gradient_checkpointing:
            blocks += casts_of_layers(network)
    return blocks


def recomputed(network: Network, tokens: int, args: ReMaxConfig) -> list[Block]:
    """Returns what gradient checkpointing computes anew of one layer in the backward pass; nothing without it."""
    if not args.gradient_checkpointing:
        return []
    casts = [Block(MATRICES, block.size) for block in casts_of_layers(network)] if casts_weights(args) else []
    return _layer(network.widths, tokens, args) + casts


def casts_of_layers(network: Network) -> list[Block]:
    """Returns the copies in bfloat16 that autocast makes of the linear weights, without the head's."""
    matrices = MATRICES * network.widths.layers
    return [Block(matrices, 2 * network.counts.linear // matrices)]


def _layer(w: Widths, tokens: int, args: ReMaxConfig) -> list[Block]:
    hidden, size = tokens * w.hidden, 2 if is_half(args) else 4
    wide = [Block(4, tokens * w.queries * size), Block(4, tokens * w.intermediate * size)]
    frozen_norms = 2 if args.use_peft else 0
    if casts_weights(args):
        return [Block(4 - frozen_norms, 4 * hidden), Block(5, 2 * hidden), *wide]
    if args.dtype == "bfloat16":
        return [Block(8 - frozen_norms, 2 * hidden), *wide]
    return [Block(6 - frozen_norms, 4 * hidden), *wide]


def layer_backward(widths: Widths, tokens: int, args: ReMaxConfig) -> list[Block]:
    """Returns the gradients of activations that are there at once, in a layer's MLP, beside all that it kept.

    2 I and H per token; what it kept of the last product is gone by then.
    """
    size = 2 if is_half(args) else 4
    return [Block(2, tokens * widths.intermediate * size), Block(1, 4 * tokens * widths.hidden)]


def chunk_rows(widths: Widths, *, on_gpu: bool) -> int:
    """Returns how many positions the head is applied to at once."""
    return max(1, chunk_elements(on_gpu=on_gpu) // widths.vocabulary)


def kept_logits(widths: Widths, outputs: int, args: ReMaxConfig, *, on_gpu: bool) -> list[Block]:
    """Returns what the head's statistics keep for the backward pass: log-probabilities, if they are one chunk.

    Several chunks are recomputed. The exact KL keeps probabilities and log-ratios too, and a mask: 13 bytes.
    """
    if outputs > chunk_rows(widths, on_gpu=on_gpu):
        return []
    size = outputs * widths.vocabulary
    return [Block(3, 4 * size), Block(1, size)] if args.needs_exact_kl else [Block(1, 4 * size)]


def through_autograd(args: ReMaxConfig) -> bool:
    """Whether the head's backward pass is not the one of head.py."""
    return args.needs_exact_kl or args.top_p < 1 or args.top_k > 0


def head_temporaries(widths: Widths, outputs: int, args: ReMaxConfig, *, on_gpu: bool) -> list[Block]:
    """Returns what the head's statistics need beside, chunk by chunk: the logits in the making.

    A plain head has a backward pass of its own and needs them twice in all; a truncated distribution and the exact KL
    go through autograd.
    """
    size = min(outputs, chunk_rows(widths, on_gpu=on_gpu)) * widths.vocabulary
    sorts = 4 if args.top_p < 1 else 0
    more = 2 + sorts if through_autograd(args) else 0
    again = (1 if outputs > chunk_rows(widths, on_gpu=on_gpu) else 0) + (1 if args.temperature != 1 else 0)
    raw = [Block(1, 2 * size)] if is_half(args) else []
    return [Block(1 + more + again, 4 * size), *raw]


def reference_temporaries(widths: Widths, outputs: int, *, on_gpu: bool) -> list[Block]:
    """Returns what log-probabilities without gradients need, chunk by chunk: logits twice."""
    return [Block(2, 4 * min(outputs, chunk_rows(widths, on_gpu=on_gpu)) * widths.vocabulary)]

"""What a step of a method should take, by formula: from counts of parameters, the model's config and shapes.

Static bytes are exact, and so is the cache if no layer has a sliding window. The activations are those of a Llama-like
layer (RMSNorm, gated MLP, fused attention): for such models within ten percent, for others the right order of
magnitude. Operations are those of linear layers alone: attention, whose share grows with the number of tokens over the
hidden size, and everything elementwise are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from remax import precision
from remax.config import ReMaxConfig
from remax.methods import PPO
from remax.rewards import RewardModel
from remax.trainer import ReMaxTrainer

ADAM_STATES = 2
"""Averages of the gradient and of its square, in the type of the weight; and a step number of 4 bytes per tensor."""


@dataclass(frozen=True)
class Call:
    """One forward pass of a network."""

    network: str
    phase: str
    rows: int
    length: int
    """Tokens of a row, padding included."""
    outputs: int
    """Positions that the language-model head was applied to, in all rows together."""
    trained: bool
    """Whether a backward pass follows."""


@dataclass(frozen=True)
class Counts:
    """A network in numbers of parameters."""

    parameters: int
    trained: int
    trained_tensors: int
    always_float32: int
    """Trained in float32 whatever --dtype: adapters and a value head."""
    castable: int
    """Held in bfloat16 where the network is frozen and --bf16 is set."""
    linear: int
    """Multiplied with every token."""
    trained_linear: int
    head: int
    """Of the language-model head, multiplied with completion tokens only."""


def networks(trainer: ReMaxTrainer) -> dict[str, nn.Module]:
    """Returns the networks that hold weights of their own, by name."""
    parts = trainer.parts
    found: dict[str, nn.Module] = {"policy": parts.policy}
    if parts.reference is not None and parts.reference.model is not parts.policy:
        found["reference"] = parts.reference.model
    for number, function in enumerate(_reward_models(trainer), start=1):
        found["reward" if number == 1 else f"reward_{number}"] = function.model
    if isinstance(trainer.method, PPO):
        found["value"] = trainer.method.critic.network
    return found


def _reward_models(trainer: ReMaxTrainer) -> list[RewardModel]:
    return [function for function in trainer.parts.reward_functions if isinstance(function, RewardModel)]


def head(network: Any) -> Any:
    """Returns the language-model head of a network, or None."""
    return network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None


def count(trainer: ReMaxTrainer) -> dict[str, Counts]:
    """Returns the parameters of every network."""
    return {name: _count(name, network, trainer.args) for name, network in networks(trainer).items()}


def _count(name: str, network: nn.Module, args: ReMaxConfig) -> Counts:
    trained = [p for p in network.parameters() if p.requires_grad]
    num_trained = sum(p.numel() for p in trained)
    own_head = head(network)
    linear = [m for m in network.modules() if isinstance(m, nn.Linear | Conv1D) and m is not own_head]
    castable = precision.castable_layers(network)
    always_float32 = num_trained if args.use_peft else 0
    if name == "value" and not args.use_peft:
        always_float32 = sum(p.numel() for p in network.get_submodule("head").parameters())
    return Counts(
        parameters=sum(p.numel() for p in network.parameters()),
        trained=num_trained,
        trained_tensors=len(trained),
        always_float32=always_float32,
        castable=sum(p.numel() for layer in castable for p in layer.parameters()),
        linear=sum(m.weight.numel() for m in linear),
        trained_linear=sum(m.weight.numel() for m in linear if m.weight.requires_grad),
        head=own_head.weight.numel() if own_head is not None else 0,
    )


# Static ---------------------------------------------------------------------------------------------------------------


def static_bytes(counts: Mapping[str, Counts], args: ReMaxConfig) -> dict[str, int]:
    """Returns the bytes of weights, gradients and optimiser states, by name.

    Per trained weight of float32: 4 + 4 + 8. Per frozen weight: 4, or 2 in linear layers with --bf16.
    """
    size = 2 if args.dtype == "bfloat16" else 4
    trained = {name: own for name, own in counts.items() if name in ("policy", "value")}
    weights, gradients, states = {}, {}, {}
    for name, own in counts.items():
        if name in trained:
            weights[f"weights/{name}"] = (own.parameters - own.always_float32) * size + own.always_float32 * 4
            gradient = (own.trained - own.always_float32) * size + own.always_float32 * 4
            gradients[f"gradients/{name}"] = gradient
            states[f"optimiser/{name}"] = ADAM_STATES * gradient + 4 * own.trained_tensors
        else:
            held = size if name == "reference" else 4  # Reward models are loaded in float32.
            cast = own.castable if args.bf16 else 0
            weights[f"weights/{name}"] = cast * 2 + (own.parameters - cast) * held
    return weights | gradients | states


def equal_size_bytes(counts: Mapping[str, Counts], args: ReMaxConfig) -> float | None:
    """Returns what theory says of static bytes per parameter if all networks had the same size; None with adapters.

    Mixed precision: 16 per network that is trained, 2 per frozen one; float32: 16 and 4.
    """
    if args.use_peft or args.dtype != "float32":
        return None
    num_trained = sum(name in ("policy", "value") for name in counts)
    return 16.0 * num_trained + (2.0 if args.bf16 else 4.0) * (len(counts) - num_trained)


# Phases ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Widths:
    """A transformer's config in numbers."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    """heads x head_dim"""
    keys: int
    """key-value heads x head_dim"""
    vocabulary: int
    rotary: bool

    @classmethod
    def of(cls, network: Any) -> "Widths":
        """Reads the config of a model."""
        config = network.config.get_text_config()
        hidden, heads = config.hidden_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        names = ("intermediate_size", "ffn_dim", "n_inner")
        intermediate = next((getattr(config, name) for name in names if getattr(config, name, None)), 4 * hidden)
        return cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            intermediate=intermediate,
            queries=heads * head_dim,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
            vocabulary=config.vocab_size,
            rotary=getattr(config, "rope_parameters", None) is not None,
        )


def phase_bytes(trainer: ReMaxTrainer, calls: Sequence[Call]) -> dict[str, dict[str, int]]:
    """Returns the largest sizes by phase.

    rollout: the cache and logits of all rows that are decoded together.
    reward, update: what the calls' shapes need.
    """
    args, parts = trainer.args, trainer.parts
    policy = Widths.of(parts.policy)
    half = args.bf16 or args.dtype == "bfloat16"
    prompts = trainer.order.batch(1)
    rows_of_prompt = args.num_generations + any(trainer.method.greedy_wanted(prompts))
    together = max(1, args.rollout_batch_size // rows_of_prompt) if args.rollout_batch_size else len(prompts)
    rows = min(together, len(prompts)) * rows_of_prompt
    length = max(len(prompt.token_ids) for prompt in prompts) + args.max_completion_length
    updates = [call for call in calls if call.phase == "update" and call.network in ("policy", "reference")]
    chunk = max(1, trainer.policy.network.chunk_elements // policy.vocabulary)
    outputs = max(min(call.outputs, chunk) for call in updates)
    logit_bytes = 2 if half else 4
    return {
        "rollout": {
            "kv_cache": kv_cache_bytes(policy, rows, length, args),
            "logits": rows * policy.vocabulary * logit_bytes,
        },
        "reward": {"activations": _reward_activations(trainer, calls)},
        "update": {
            "activations": _update_activations(trainer, calls, chunk),
            "logits": outputs * policy.vocabulary * logit_bytes,
        },
    }


def kv_cache_bytes(widths: Widths, rows: int, length: int, args: ReMaxConfig) -> int:
    """Returns layers x kv_heads x head_dim x rows x length x (bytes of a key + bytes of a value).

    length: of the longest prompt and --max_completion_length together, for which the engine makes room. Under autocast
    the rotary embedding, which is float32, makes the keys float32 again.
    """
    value_bytes = 2 if args.bf16 or args.dtype == "bfloat16" else 4
    key_bytes = 4 if args.bf16 and args.dtype == "float32" and widths.rotary else value_bytes
    return widths.layers * widths.keys * rows * length * (key_bytes + value_bytes)


def _reward_activations(trainer: ReMaxTrainer, calls: Sequence[Call]) -> int:
    """Returns the bytes of the widest place of a layer, in its MLP: 4 H in float32 and 3 I per token."""
    found = networks(trainer)
    sizes = [0]
    for call in calls:
        if call.network.startswith("reward"):
            widths = Widths.of(found[call.network])
            half = trainer.args.bf16 and next(f.bf16 for f in _reward_models(trainer) if f.model is found[call.network])
            sizes.append(call.rows * call.length * (16 * widths.hidden + 3 * widths.intermediate * (2 if half else 4)))
    return max(sizes)


def _update_activations(trainer: ReMaxTrainer, calls: Sequence[Call], chunk: int) -> int:
    """Returns the bytes that the largest micro-batch keeps for its backward pass.

    Per token and layer, in float32: 6 H (residual, normalised and scaled, before attention and before the MLP), 4 Q
    (queries, keys, values and what attention gives; padded batches repeat keys and values for every query head), 4 I
    (gate, its activation, up, their product). Under autocast everything but the residual and the normalised takes 2
    bytes, every linear layer keeps its own cast of its input (5 H), and all linear weights are there once more in
    bfloat16. With gradient checkpointing, a layer keeps its input, and what is recomputed is left out. The head keeps
    its input and, if it runs as one chunk, its log-probabilities. With adapters this is too much: what only the
    gradient of a frozen weight needs is not kept.
    """
    args, found, counts = trainer.args, networks(trainer), count(trainer)
    exact = args.kl_mode == "loss" and args.kl_estimator == "exact" and args.needs_reference
    per_logit = 13 if exact else 4  # The exact KL keeps probabilities and log-ratios too, and a mask.
    sizes = [0]
    for call in calls:
        if not call.trained:
            continue
        network: Any = found[call.network]
        own, widths = counts[call.network], Widths.of(network.body if call.network == "value" else network)
        h, wide = widths.hidden, 4 * widths.queries + 4 * widths.intermediate
        if args.gradient_checkpointing:
            in_layer = h * (2 if args.dtype == "bfloat16" else 4)
        elif args.dtype == "bfloat16":
            in_layer = 16 * h + 2 * wide
        else:
            in_layer = 26 * h + 2 * wide if args.bf16 else 24 * h + 4 * wide
        size = call.rows * call.length * (widths.layers * in_layer + (6 if args.dtype == "bfloat16" else 8) * h)
        size += call.outputs * h * (2 if args.bf16 and call.network == "policy" else 4)
        if call.network == "policy" and call.outputs <= chunk:
            size += call.outputs * widths.vocabulary * per_logit
        if args.bf16 and args.dtype == "float32":
            size += 2 * (own.head + (0 if args.gradient_checkpointing else own.linear))
        sizes.append(size)
    return max(sizes)


# Operations -----------------------------------------------------------------------------------------------------------


def flops(calls: Sequence[Call], counts: Mapping[str, Counts], *, recompute: bool) -> dict[str, int]:
    """Returns the operations of linear layers by phase: 2 per weight and token forward, 4 backward.

    A frozen weight costs 2 backward. The head counts completion tokens only. recompute: gradient checkpointing goes
    forward through the layers once more.
    """
    total = {"rollout": 0, "reward": 0, "update": 0}
    for call in calls:
        own = counts.get(call.network, counts["policy"])  # A reference without weights of its own is the policy.
        tokens = call.rows * call.length
        forward = 2 * (own.linear * tokens + own.head * call.outputs)
        total[call.phase] += forward
        if call.trained:
            head_trained = own.trained == own.parameters
            weights = 2 * (own.trained_linear * tokens + own.head * call.outputs * head_trained)
            total[call.phase] += forward + weights + (2 * own.linear * tokens if recompute else 0)
    return total

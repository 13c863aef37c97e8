"""What a step of a method should take, by formula: from counts of parameters, the model's config and shapes.

Bytes are those of remax.plan, here for the passes that a step was seen to make. Operations are those of linear layers
alone: attention, whose share grows with the number of tokens over the hidden size, and everything elementwise are left
out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from remax.methods import PPO
from remax.plan import formulas, networks_of
from remax.plan.formulas import total
from remax.plan.networks import Counts, Network, measure_networks
from remax.rewards import RewardModel
from remax.trainer import ReMaxTrainer

PHASES = ("rollout", "reward", "reference", "update")


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


def networks(trainer: ReMaxTrainer) -> dict[str, nn.Module]:
    """Returns the networks that hold weights of their own, by name."""
    value_model = trainer.method.critic.module if isinstance(trainer.method, PPO) else None
    return networks_of(trainer.parts, value_model)


def measured_networks(trainer: ReMaxTrainer) -> dict[str, Network]:
    """Returns the same in numbers."""
    return measure_networks(networks(trainer), trainer.args)


def phase_bytes(trainer: ReMaxTrainer, calls: Sequence[Call]) -> dict[str, dict[str, int]]:
    """Returns the largest sizes by phase.

    rollout: the cache and logits of all rows that are decoded together.
    reward, reference, update: what the calls' shapes need.
    """
    args = trainer.args
    found = measured_networks(trainer)
    policy = found["policy"].widths
    prompts = trainer.order.batch(1)
    rows_of_prompt = args.num_generations + any(trainer.method.greedy_wanted(prompts))
    together = max(1, args.rollout_batch_size // rows_of_prompt) if args.rollout_batch_size else len(prompts)
    rows = min(together, len(prompts)) * rows_of_prompt
    length = max(len(prompt.token_ids) for prompt in prompts) + args.max_completion_length
    logit_bytes = 2 if formulas.is_half(args) else 4
    on_gpu = trainer.accelerator.device.type == "cuda"

    def logits(phase: str) -> int:
        outputs = [call.outputs for call in calls if call.phase == phase and call.network in ("policy", "reference")]
        at_once = formulas.chunk_rows(policy, on_gpu=on_gpu)
        return max((min(own, at_once) for own in outputs), default=0) * policy.vocabulary * logit_bytes

    return {
        "rollout": {
            "kv_cache": total(formulas.kv_cache(policy, rows, length, args)),
            "logits": rows * policy.vocabulary * logit_bytes,
        },
        "reward": {"activations": _reward_activations(trainer, found, calls)},
        "reference": {"logits": logits("reference")},
        "update": {"activations": _update_activations(trainer, found, calls), "logits": logits("update")},
    }


def _reward_activations(trainer: ReMaxTrainer, found: Mapping[str, Network], calls: Sequence[Call]) -> int:
    """Returns the bytes of the widest place of a layer."""
    modules = networks(trainer)
    functions = {id(f.model): f for f in trainer.parts.reward_functions if isinstance(f, RewardModel)}
    sizes = [0]
    for call in calls:
        if call.network.startswith("reward"):
            half = functions[id(modules[call.network])].bf16
            sizes.append(total(formulas.forward_only(found[call.network].widths, call.rows * call.length, half=half)))
    return max(sizes)


def _update_activations(trainer: ReMaxTrainer, found: Mapping[str, Network], calls: Sequence[Call]) -> int:
    """Returns the bytes that the largest micro-batch keeps for its backward pass."""
    sizes, on_gpu = [0], trainer.accelerator.device.type == "cuda"
    for call in calls:
        if call.trained:
            network, is_policy = found[call.network], call.network == "policy"
            tokens = call.rows * call.length
            kept = formulas.activations(network, tokens, call.outputs, trainer.args, scorer=is_policy)
            if is_policy:
                kept += formulas.kept_logits(network.widths, call.outputs, trainer.args, on_gpu=on_gpu)
            sizes.append(total(kept))
    return max(sizes)


# Operations -----------------------------------------------------------------------------------------------------------


def flops(calls: Sequence[Call], counts: Mapping[str, Counts], *, recompute: bool) -> dict[str, int]:
    """Returns the operations of linear layers by phase: 2 per weight and token forward, 4 backward.

    A frozen weight costs 2 backward. The head counts completion tokens only. recompute: gradient checkpointing goes
    forward through the layers once more.
    """
    operations = dict.fromkeys(PHASES, 0)
    for call in calls:
        own = counts.get(call.network, counts["policy"])  # A reference without weights of its own is the policy.
        tokens = call.rows * call.length
        forward = 2 * (own.linear * tokens + own.head * call.outputs)
        operations[call.phase] += forward
        if call.trained:
            head_trained = own.trained == own.parameters
            weights = 2 * (own.trained_linear * tokens + own.head * call.outputs * head_trained)
            operations[call.phase] += forward + weights + (2 * own.linear * tokens if recompute else 0)
    return operations

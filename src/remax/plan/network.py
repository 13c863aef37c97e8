"""What crosses the network in a step, in bytes, by formula: from counts of parameters, shapes and settings.

In a ring, an all-gather or a reduce-scatter of S bytes over N devices brings (N - 1) / N x S to each of them, and an
all-reduce, which is one after the other, twice that. Each sends as much. Left out is what has neither the size of a
model nor that of a rollout: norms of gradients, flags, the model's buffers.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from remax.config import ReMaxConfig
from remax.plan import formulas
from remax.plan.networks import Counts, Network
from remax.plan.phases import Workload
from remax.plan.sharding import Split

Collective = Literal["all-gather", "reduce-scatter", "all-reduce"]
LARGEST_SHORT_ID = 65535
FLOAT_BYTES = 9
"""Of a float in a pickled list."""
TENSOR_BYTES = 290
"""What a pickled tensor has beside its numbers."""
SHOWN_BYTES = 14
"""What every process tells of every sample after the update: three float32 numbers and two flags."""


@dataclass(frozen=True)
class Transfer:
    """What crosses the network for one purpose in a step."""

    phase: str
    what: str
    collective: Collective
    size: int
    """Bytes of the whole, as it is after an all-gather and before a reduction."""
    times: int
    devices: int

    @property
    def received(self) -> int:
        """Bytes that each device receives in a step; it sends as many."""
        rounds = 2 if self.collective == "all-reduce" else 1
        return rounds * self.times * self.size * (self.devices - 1) // self.devices

    def record(self) -> dict[str, Any]:
        """Returns it as JSON takes it."""
        return {**asdict(self), "received": self.received}


@dataclass(frozen=True)
class Passes:
    """How many passes one device takes in a step; all take the same number."""

    update: int
    """Micro-batches of one update."""
    updates: int
    scoring: int
    """Of reference or value model over all samples."""
    reward: int

    @classmethod
    def of(cls, args: ReMaxConfig, work: Workload, devices: int) -> "Passes":
        """Counts rows of the longest length: micro-batches are formed of the whole step's rows and dealt out."""
        rows = max(1, args.micro_batch_tokens // work.length)
        samples = work.prompts * devices * args.num_generations
        parts, epochs = (args.num_mini_batches, args.num_ppo_epochs) if args.method == "ppo" else (1, 1)

        def dealt(number: int) -> int:
            return math.ceil(math.ceil(number / rows) / devices)

        own_rows = work.prompts * (args.num_generations + args.needs_greedy)
        return cls(
            update=dealt(math.ceil(samples / parts)),
            updates=parts * epochs,
            scoring=dealt(samples),
            reward=math.ceil(own_rows / args.reward_batch_size),
        )


def transfers(networks: Mapping[str, Network], args: ReMaxConfig, work: Workload, split: Split) -> list[Transfer]:
    """Returns what crosses the network in a step, in its order.

    networks: by name, as `remax plan` has them. work: of one device, rows of the longest length throughout.

    ddp: gradients once per update. zero2: gradients after every micro-batch, and the new weights after every update.
    zero3, fsdp2: weights for every pass, forward and again backward, gradients after every micro-batch; and the whole
    policy once, for the rollout. zero3 leaves frozen networks whole. For FSDP2 that is an upper bound: embedding and
    head stay from forward to backward.
    """
    if split.devices == 1:
        return []
    passes = Passes.of(args, work, split.devices)
    found = [
        *_rollout(networks["policy"], args, work, split),
        *_reward(networks, args, work, split, passes),
        *_scoring(networks, args, work, split, passes),
    ]
    for name, network in networks.items():
        if network.counts.trained:
            found += _update(name, network, args, split, passes)
    source = _reference(networks)
    if args.needs_exact_kl and split.splits(networks[source].counts):
        size = pass_bytes(networks[source].counts, args)
        found.append(
            Transfer("update", f"{source}, forward", "all-gather", size, passes.update * passes.updates, split.devices)
        )
    samples = work.prompts * split.devices * args.num_generations
    found.append(Transfer("update", "metrics", "all-gather", SHOWN_BYTES * samples * split.devices, 1, split.devices))
    return found


def received(found: list[Transfer]) -> int:
    """Returns the bytes that each device receives in a step; it sends as many."""
    return sum(transfer.received for transfer in found)


def pass_bytes(own: Counts, args: ReMaxConfig) -> int:
    """Returns the bytes of a network's weights as a pass takes them."""
    return own.parameters * (2 if formulas.is_half(args) else 4)


def token_bytes(vocabulary: int) -> int:
    """Returns the most bytes of a sampled token in a pickled rollout: its id and its log-probability."""
    return (3 if vocabulary <= LARGEST_SHORT_ID + 1 else 5) + FLOAT_BYTES


# The phases -----------------------------------------------------------------------------------------------------------


def _rollout(network: Network, args: ReMaxConfig, work: Workload, split: Split) -> list[Transfer]:
    rows = work.prompts * (args.num_generations + args.needs_greedy) * split.devices
    tokens = rows * work.completion_length * token_bytes(network.widths.vocabulary)
    found = [Transfer("rollout", "completions", "all-gather", tokens, 1, split.devices)]
    if split.splits(network.counts):
        whole = network.counts.parameters * split.held_size(args)
        found.insert(0, Transfer("rollout", "policy, whole", "all-gather", whole, 1, split.devices))
    return found


def _reward(
    networks: Mapping[str, Network], args: ReMaxConfig, work: Workload, split: Split, passes: Passes
) -> list[Transfer]:
    learned = {name: network for name, network in networks.items() if name.startswith("reward")}
    rows = work.prompts * (args.num_generations + args.needs_greedy) * split.devices
    columns = 1 + max(1, len(learned))
    scores = Transfer("reward", "rewards", "all-gather", rows * columns * FLOAT_BYTES, 1, split.devices)
    learned = {name: network for name, network in learned.items() if split.splits(network.counts)}
    size = {name: network.counts.parameters * (2 if args.bf16 else 4) for name, network in learned.items()}
    weights = [Transfer("reward", f"{n}, forward", "all-gather", size[n], passes.reward, split.devices) for n in size]
    return [*weights, scores]


def _scoring(
    networks: Mapping[str, Network], args: ReMaxConfig, work: Workload, split: Split, passes: Passes
) -> list[Transfer]:
    """Reference and value model go over all samples before the update."""
    found = []
    samples = work.prompts * split.devices * args.num_generations
    numbers = samples * (4 * work.completion_length + TENSOR_BYTES)
    if args.needs_reference and not args.needs_exact_kl:
        source = _reference(networks)
        if split.splits(networks[source].counts):
            size = pass_bytes(networks[source].counts, args)
            found.append(Transfer("reference", f"{source}, forward", "all-gather", size, passes.scoring, split.devices))
        found.append(Transfer("reference", "log-probabilities", "all-gather", numbers, 1, split.devices))
    if "value" in networks:
        if split.splits(networks["value"].counts):
            size = pass_bytes(networks["value"].counts, args)
            found.append(Transfer("update", "value, values", "all-gather", size, passes.scoring, split.devices))
        found.append(Transfer("update", "values", "all-gather", numbers, 1, split.devices))
    return found


def _update(name: str, network: Network, args: ReMaxConfig, split: Split, passes: Passes) -> list[Transfer]:
    own, devices = network.counts, split.devices
    micro_batches = passes.update * passes.updates
    if split.sharding == "ddp":
        size = formulas.total(formulas.gradients(own, args))
        return [Transfer("update", f"{name}, gradients", "all-reduce", size, passes.updates, devices)]
    number_size = 2 if formulas.is_half(args) else 4
    gradients, weights = own.trained * number_size, pass_bytes(own, args)
    if split.sharding == "zero2":
        return [
            Transfer("update", f"{name}, gradients", "all-reduce", gradients, micro_batches, devices),
            Transfer("update", f"{name}, new weights", "all-gather", gradients, passes.updates, devices),
        ]
    return [
        Transfer("update", f"{name}, forward", "all-gather", weights, micro_batches, devices),
        Transfer("update", f"{name}, backward", "all-gather", weights, micro_batches, devices),
        Transfer("update", f"{name}, gradients", "reduce-scatter", gradients, micro_batches, devices),
    ]


def _reference(networks: Mapping[str, Network]) -> str:
    """Returns the name of the network that stands for the reference, which with an adapter is the policy."""
    return "reference" if "reference" in networks else "policy"

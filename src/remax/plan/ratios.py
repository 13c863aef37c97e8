"""ReMax against PPO over the size of the model: Llama-like shapes, by count."""

from dataclasses import dataclass

from remax.config import ReMaxConfig
from remax.plan.formulas import total
from remax.plan.networks import Counts, Network, TrainedTensor, Widths
from remax.plan.phases import Device, Workload, largest, predict
from remax.plan.proposals import with_method
from remax.plan.sharding import Split

VOCABULARY = 32000
SHAPES = {
    "125M": (12, 768, 2048, 768),
    "350M": (24, 1024, 2736, 1024),
    "1.3B": (24, 2048, 5504, 2048),
    "7B": (32, 4096, 11008, 4096),
    "13B": (40, 5120, 13824, 5120),
    "70B": (80, 8192, 28672, 1024),
}
"""Layers, hidden size, intermediate size, key-value heads x head_dim. From 7B on Llama 2's own."""


@dataclass(frozen=True)
class Footprint:
    """What a method takes, in bytes."""

    static: int
    """Weights, states, and the gradients of one network: those of two are never there together."""
    peak: int


@dataclass(frozen=True)
class Ratio:
    """What both methods take with models of one size."""

    name: str
    parameters: int
    remax: Footprint
    ppo: Footprint

    @property
    def static(self) -> float:
        """PPO's static bytes over ReMax's."""
        return self.ppo.static / self.remax.static

    @property
    def peak(self) -> float:
        """PPO's peak over ReMax's."""
        return self.ppo.peak / self.remax.peak


def ratios(args: ReMaxConfig, work: Workload, split: Split) -> list[Ratio]:
    """Returns what both methods take on a GPU by size, with the other settings as they are.

    All networks have the policy's size. Empty where the two cannot be compared (an adapter, a KL that PPO has not).
    """
    remax, ppo = with_method(args, "remax"), with_method(args, "ppo")
    if args.use_peft or remax is None or ppo is None:
        return []
    found = []
    for name in SHAPES:
        parameters = llama(name, head=VOCABULARY, trained=False).counts.parameters
        found.append(Ratio(name, parameters, *(_footprint(name, own, work, split) for own in (remax, ppo))))
    return found


def _footprint(name: str, args: ReMaxConfig, work: Workload, split: Split) -> Footprint:
    networks = llama_networks(name, args)
    counts = {network: own.counts for network, own in networks.items()}
    held = sum(split.weights(network, own, args) + split.states(own, args) for network, own in counts.items())
    gradients = max(total(split.gradients(own, args)) for own in counts.values())
    return Footprint(held + gradients, largest(predict(networks, args, work, Device("cuda"), split)).total)


def llama_networks(shape: str, args: ReMaxConfig) -> dict[str, Network]:
    """Returns the networks of a run, all of one shape."""
    networks = {"policy": llama(shape, head=VOCABULARY, trained=True)}
    if args.needs_reference:
        networks["reference"] = llama(shape, head=VOCABULARY, trained=False)
    networks["reward"] = llama(shape, head=1, trained=False)
    if args.method == "ppo":
        networks["value"] = llama(shape, head=1, trained=True)
    return networks


def llama(shape: str, *, head: int, trained: bool) -> Network:
    """Returns a Llama of a shape with so many outputs per token, by count; 1 for a reward or a value model."""
    layers, hidden, intermediate, keys = SHAPES[shape]
    embedding = VOCABULARY * hidden
    linear_shapes = [(hidden, hidden)] * 2 + [(keys, hidden)] * 2 + [(intermediate, hidden)] * 2
    linear_shapes += [(hidden, intermediate)]
    linear = layers * sum(rows * columns for rows, columns in linear_shapes)
    norms = (2 * layers + 1) * hidden
    is_value = head == 1 and trained
    tensors = [TrainedTensor((VOCABULARY, hidden), False)]
    tensors += [TrainedTensor(own, False) for own in linear_shapes] * layers
    tensors += [TrainedTensor((hidden,), False)] * (2 * layers + 1) + [TrainedTensor((head, hidden), is_value)]
    tensors += [TrainedTensor((1,), True)] if is_value else []
    is_policy = head > 1
    return Network(
        Counts(
            parameters=embedding + linear + norms + head * hidden + is_value,
            trained_tensors=tuple(tensors) if trained else (),
            castable=linear + (head * hidden if is_policy or is_value else 0) + is_value,
            linear=linear + (0 if is_policy else head * hidden),
            trained_linear=(linear + (0 if is_policy else head * hidden)) * trained,
            head=head * hidden if is_policy else 0,
            embedding=embedding,
        ),
        Widths(layers, hidden, intermediate, hidden, keys, VOCABULARY),
    )

"""What a step on many GPUs takes at least, by rooflines: arithmetic, memory bandwidth and network at published peaks.

Predictions, of which nothing was measured. Real kernels and networks reach a part of their peaks; latencies, launches
of kernels, drawing tokens, tokenizers, Python and whoever is the slowest are not counted.

Legend: T tokens of a completion, W bytes of the weights that a token reads, F operations a second, B bytes of memory a
second.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.gpu_bench.shapes import datasheet

from remax.compare.predict import Call, flops
from remax.config import ReMaxConfig
from remax.plan.network import Passes, received, transfers
from remax.plan.networks import Network
from remax.plan.phases import Workload
from remax.plan.sharding import Split

ADAMW_BYTES = 28
"""What fused AdamW moves per float32 weight: it reads weight, gradient and two averages, and writes three of them."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs, as their makers publish them; bytes and operations per second."""

    name: str
    flops: float
    memory: float
    gpus_per_node: int
    inside: float
    """From one GPU to the others of its node, in one direction."""
    outside: float
    """From one node to the others, in one direction."""
    one: float
    """From one process to one on another node."""

    def link(self, devices: int) -> float:
        """Returns what each GPU can receive in a collective: as much as the narrowest link of a ring carries.

        Every link of a ring carries what each GPU receives; between two nodes there are as many rings as adapters.
        """
        return self.inside if devices <= self.gpus_per_node else min(self.inside, self.outside)


BANDWIDTH, FLOPS = (float(peak or 0) for peak in datasheet("H100"))
INFINIBAND = Cluster("InfiniBand, 400 Gbit/s per GPU", FLOPS, BANDWIDTH, 8, 450e9, 8 * 50e9, 50e9)
"""As in a DGX H100: NVLink of 900 GB/s in both directions together, eight ConnectX-7 of 400 Gbit/s."""
ETHERNET = Cluster("Ethernet, 100 Gbit/s per node", FLOPS, BANDWIDTH, 8, 450e9, 12.5e9, 12.5e9)


@dataclass(frozen=True)
class Seconds:
    """Of one step, by phase; of one GPU, all of which do the same."""

    gathering: float
    """Of the whole weights for the rollout, and what sending them to a server takes."""
    prompts: float
    decoding: float
    reward: float
    reference: float
    update: float
    optimiser: float
    network: float
    """What of the traffic of the other phases is not hidden behind arithmetic."""

    @property
    def step(self) -> float:
        """Of all phases."""
        return sum(vars(self).values())


def step_seconds(
    networks: Mapping[str, Network],
    args: ReMaxConfig,
    work: Workload,
    split: Split,
    cluster: Cluster,
    *,
    server: int = 0,
) -> Seconds:
    """Returns the seconds of a step of a method that is trained once per step.

    work: of one GPU. server: of how many other GPUs, which hold the weights together, a server decodes for all; 0 if
    every process decodes for itself.
    """
    link, counts = cluster.link(split.devices), {name: network.counts for name, network in networks.items()}
    moved = transfers(networks, args, work, split)
    traffic = {
        phase: received([own for own in moved if own.phase == phase]) / link
        for phase in ("rollout", "reward", "reference", "update")
    }
    rows = work.prompts * (args.num_generations + args.needs_greedy)
    samples = work.prompts * args.num_generations
    seconds = {
        phase: _pass_seconds(networks, args, work, split, phase, number, cluster.flops)
        for phase, number in (("reward", rows), ("reference", samples), ("update", _update_rows(args, work, split)))
    }
    # Sharded weights come while the layer before is at work; DDP has only the backward pass of the last micro-batch.
    of_update = Passes.of(args, work, split.devices).update
    hidden = seconds["update"] / of_update * 2 / 3 if split.sharding == "ddp" else seconds["update"]
    late = max(0.0, traffic["update"] - hidden)
    late += sum(max(0.0, traffic[phase] - seconds[phase]) for phase in ("reward", "reference"))
    optimised = split.devices if split.sharding != "ddp" else 1
    policy, sent = networks["policy"], 2 * counts["policy"].parameters / cluster.one if server else 0.0
    drawn = replace(work, prompts=work.prompts * split.devices) if server else work
    return Seconds(
        gathering=traffic["rollout"] + sent,
        prompts=forward_flops(policy, drawn.prompts, work.prompt_length, outputs=drawn.prompts)
        / cluster.flops
        / max(1, server),
        decoding=decode_seconds(policy, args, drawn, cluster, gpus=max(1, server)),
        reward=seconds["reward"],
        reference=seconds["reference"],
        update=seconds["update"],
        optimiser=sum(own.trained for own in counts.values()) * ADAMW_BYTES / optimised / cluster.memory,
        network=late,
    )


def decode_seconds(network: Network, args: ReMaxConfig, work: Workload, cluster: Cluster, *, gpus: int = 1) -> float:
    """Returns how long it takes to decode the rows of these prompts, token by token.

    Every token reads all weights, and the keys and values of its row so far, in bfloat16: T W + rows x cache bytes; or
    it takes what the arithmetic does, rows T W operations, if that is more. More processes have fewer rows each, and
    the first term stays: only GPUs that hold the weights together (gpus) read them faster.
    """
    own, w = network.counts, network.widths
    weights, tokens = 2 * (own.linear + own.head), work.completion_length
    rows = work.prompts * (args.num_generations + args.needs_greedy)
    cached = 2 * w.layers * w.keys * 2  # Of a token.
    context = tokens * work.prompt_length + tokens * (tokens - 1) / 2
    read = tokens * weights + rows * context * cached
    return max(read / cluster.memory, rows * tokens * weights / cluster.flops) / gpus


def forward_flops(network: Network, rows: int, length: int, *, outputs: int) -> float:
    """Returns the operations of a pass over rows of a length: linear layers, head and causal attention.

    Attention multiplies queries with keys, and weights with values: 4 per pair of tokens and number of the queries'
    width, of which causality needs half.
    """
    own, w = network.counts, network.widths
    return 2.0 * (own.linear * rows * length + own.head * outputs + w.layers * w.queries * rows * length**2)


def _update_rows(args: ReMaxConfig, work: Workload, split: Split) -> int:
    """Returns the rows that the slowest GPU differentiates: whole micro-batches are dealt out."""
    rows = min(max(1, args.micro_batch_tokens // work.length), work.prompts * split.devices * args.num_generations)
    return rows * Passes.of(args, work, split.devices).update


def _pass_seconds(
    networks: Mapping[str, Network],
    args: ReMaxConfig,
    work: Workload,
    split: Split,
    phase: str,
    rows: int,
    operations: float,
) -> float:
    """Returns the seconds of a phase's arithmetic on one GPU."""
    total = 0.0
    for name, network in networks.items():
        belongs = {"reward": name.startswith("reward"), "reference": name == "reference", "update": name == "policy"}
        if not belongs[phase]:
            continue
        outputs = rows * (1 if phase == "reward" else work.completion_length)
        call = Call(name, phase, rows, work.length, outputs, trained=phase == "update")
        again = args.gradient_checkpointing and phase == "update"
        total += flops([call], {name: network.counts, "policy": networks["policy"].counts}, recompute=again)[phase]
        attention = 2.0 * network.widths.layers * network.widths.queries * rows * work.length**2
        total += attention * (3 + again if phase == "update" else 1)
    return total / operations

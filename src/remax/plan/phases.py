"""The peak memory of every phase of a step, from the second step on.

On a GPU: the bytes of all tensors that are there at once. On a CPU: the resident size of the process. There, what glibc
takes from its heap goes back to the system only from the heap's end: everything below 32 MiB. So the heap stays as
large as its largest moment made it, in every phase, and only larger tensors come and go. (mallopt(3),
M_MMAP_THRESHOLD: the threshold rises up to 32 MiB with what is freed.)

Legend: R rows that are decoded together, S samples of a step.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from remax.config import ReMaxConfig
from remax.plan import formulas
from remax.plan.formulas import Block, total
from remax.plan.networks import Network
from remax.plan.sharding import Split

PHASES = ("rollout", "reward", "reference", "update")
GOLD = "gold scoring, in evaluations"
HEAP_LIMIT = 32 * 2**20
"""Larger tensors are mapped, and unmapped when they are freed."""
FRAGMENTATION = 1.45
"""A heap's size over the sum of what was in it at its largest moment, where tensors of many sizes come and go: measured
at 1.3 to 1.6 in runs of a Llama of 58 million parameters (float32, bf16, checkpointing, adapters, PPO)."""


@dataclass(frozen=True)
class Workload:
    """The shape of a step on one device."""

    prompts: int
    prompt_length: int
    completion_length: int
    """Of the longest one each, in tokens."""

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt_length + self.completion_length


@dataclass(frozen=True)
class Device:
    """Where a run computes."""

    kind: str
    """cuda or cpu."""
    base: int = 0
    """Bytes that are taken before a model is loaded: on a CPU by libraries."""
    memory: int = 0
    """All bytes of a GPU, of which a colocated vLLM takes a fraction."""


@dataclass(frozen=True)
class Peak:
    """The most memory of a phase, in bytes, and what it consists of."""

    phase: str
    moment: str
    libraries: int
    weights: int
    optimiser: int
    gradients: int
    own: int
    """Everything else: caches, activations, logits; on a CPU also what the heap keeps from other phases."""

    @property
    def total(self) -> int:
        """Of all."""
        return self.libraries + self.weights + self.optimiser + self.gradients + self.own


@dataclass(frozen=True)
class Moment:
    """What is there at once, beside weights and states."""

    phase: str
    name: str
    own: list[Block]
    gradients: list[Block] = field(default_factory=list)
    of_reference: bool = False
    """Whether the reference is needed."""


def predict(
    networks: Mapping[str, Network], args: ReMaxConfig, work: Workload, device: Device, split: Split | None = None
) -> dict[str, Peak]:
    """Returns the peak of every phase of a step, on the fullest device."""
    split = split or Split()
    found = moments(networks, args, work, split, on_gpu=device.kind == "cuda")
    if overlaps(networks, device):
        found += [replace(moment, phase="reward") for moment in found if moment.phase == "reference"]
    states = sum(split.states(network.counts, args) for network in networks.values())
    on_cpu = device.kind == "cpu"
    heap = round(FRAGMENTATION * max(_small([*moment.gradients, *moment.own]) for moment in found))
    peaks: dict[str, Peak] = {}
    for moment in found:
        grads, own = total(moment.gradients), total(moment.own)
        if on_cpu:
            own += heap - _small([*moment.gradients, *moment.own])
        own += of_vllm(args, device, asleep=moment.phase != "rollout")
        weights = _resident(networks, args, moment, split, on_cpu=on_cpu)
        peak = Peak(moment.phase, moment.name, device.base, weights, states, grads, own)
        if moment.phase not in peaks or peak.total > peaks[moment.phase].total:
            peaks[moment.phase] = peak
    return {phase: peaks[phase] for phase in PHASES if phase in peaks}


def largest(peaks: Mapping[str, Peak]) -> Peak:
    """Returns the peak of the step."""
    return max(peaks.values(), key=lambda peak: peak.total)


def as_record(peaks: Mapping[str, Peak]) -> dict[str, Any]:
    """Returns the peaks as JSON takes them."""
    return {phase: {**asdict(peak), "total": peak.total} for phase, peak in peaks.items()}


def of_vllm(args: ReMaxConfig, device: Device, *, asleep: bool = False) -> int:
    """Returns what a colocated vLLM takes of a GPU, its copy of the weights included; on a CPU that is not known.

    asleep: between rollouts, where it holds nothing unless --vllm_enable_sleep_mode is false.
    """
    if args.rollout_engine != "vllm" or args.vllm_mode != "colocate" or device.kind != "cuda":
        return 0
    if asleep and args.vllm_enable_sleep_mode is not False:
        return 0
    return int(args.vllm_gpu_memory_utilization * device.memory)


def _small(blocks: list[Block]) -> int:
    return total([block for block in blocks if block.size < HEAP_LIMIT])


def overlaps(networks: Mapping[str, Network], device: Device) -> bool:
    """Whether the reference runs while rewards are computed: on a GPU, if they all are functions."""
    return device.kind == "cuda" and not any(name.startswith("reward") for name in networks)


def _resident(networks: Mapping[str, Network], args: ReMaxConfig, moment: Moment, split: Split, *, on_cpu: bool) -> int:
    """Returns the bytes of the weights that are on the device at a moment.

    On a CPU nothing can be moved away. There, a reward model's weights are pages of its file, all of which are read for
    the fingerprint of the run, and which stay where layers were cast.
    """
    held = 0
    for name, network in networks.items():
        own, is_reward, is_reference = network.counts, name.startswith("reward"), name == "reference"
        if name == "gold":  # float32 and whole, and between the evaluations on the CPU
            held += 4 * own.parameters * (on_cpu or moment.name == GOLD)
            continue
        needed = (is_reward and moment.name == "scoring") or (is_reference and moment.of_reference)
        placement = args.reward_placement if is_reward else args.reference_placement if is_reference else "resident"
        if on_cpu or needed or placement == "resident":
            held += split.weights(name, own, args)
        if on_cpu and is_reward:
            held += 4 * own.castable * args.bf16
    return held


def moments(
    networks: Mapping[str, Network], args: ReMaxConfig, work: Workload, split: Split, *, on_gpu: bool
) -> list[Moment]:
    """Returns the moments of all phases of which one may be the largest."""
    return [
        *_rollout(networks["policy"], args, work, split, on_gpu=on_gpu),
        *_reward(networks, args, work, split),
        *_reference(networks, args, work, split, on_gpu=on_gpu),
        *_update(networks, args, work, split, on_gpu=on_gpu),
    ]


# The moments of each phase --------------------------------------------------------------------------------------------


def _rollout(network: Network, args: ReMaxConfig, work: Workload, split: Split, *, on_gpu: bool) -> list[Moment]:
    """The prompts' tokens are read once; then every row draws token by token."""
    if args.rollout_engine == "vllm":
        return [Moment("rollout", "drawing in vLLM", [])]
    w, seen = network.widths, split.passes(args)
    rows_of_prompt = args.num_generations + args.needs_greedy
    prompts = work.prompts
    if args.rollout_batch_size:
        prompts = min(prompts, max(1, args.rollout_batch_size // rows_of_prompt))
    rows = prompts * rows_of_prompt
    copies = formulas.decoding_weights(network, work.completion_length, seen, on_gpu=on_gpu)
    always = copies + split.whole(network, args)
    cache = formulas.kv_cache(w, rows, work.length, seen)
    prompt_cache = formulas.kv_cache(w, prompts, work.length, seen)
    # The cache is copied layer by layer from one row per prompt to all; and keys and values are repeated for heads.
    copied = [Block(1, block.size) for block in prompt_cache]
    repeated = [Block(w.queries / w.keys, block.size) for block in cache] if w.queries > w.keys else []
    half = formulas.is_half(seen)
    read = formulas.forward_only(w, prompts * work.prompt_length, half=half)
    draw = formulas.choice(w, rows, prompts * args.num_generations, seen)
    return [
        Moment("rollout", "reading prompts", [*always, *prompt_cache, *read]),
        Moment("rollout", "decoding", [*always, *cache, *(draw if total(draw) > total(repeated) else repeated)]),
        Moment("rollout", "copying rows", [*always, *cache, *copied]),
    ]


def _reward(networks: Mapping[str, Network], args: ReMaxConfig, work: Workload, split: Split) -> list[Moment]:
    rows = min(work.prompts * (args.num_generations + args.needs_greedy), args.reward_batch_size)
    found = [Moment("reward", "functions", [])]
    for name, network in networks.items():
        if name.startswith("reward"):
            tokens = formulas.forward_only(network.widths, rows * work.length, half=args.bf16)
            found.append(Moment("reward", "scoring", [*tokens, *split.gathered(network, args)]))
    if "gold" in networks:
        tokens = formulas.forward_only(networks["gold"].widths, args.reward_batch_size * work.length, half=False)
        found.append(Moment("reward", GOLD, tokens))
    return found


def _reference(
    networks: Mapping[str, Network], args: ReMaxConfig, work: Workload, split: Split, *, on_gpu: bool
) -> list[Moment]:
    if not args.needs_reference or args.needs_exact_kl:
        return []
    network = networks.get("reference", networks["policy"])
    rows, _ = _micro_batch(args, work)
    w = network.widths
    read = formulas.forward_only(w, rows * work.length, half=formulas.is_half(args))
    gathered = split.gathered(network, args)
    states = Block(1, 4 * rows * work.completion_length * w.hidden)
    logits = formulas.reference_temporaries(w, rows * work.completion_length, on_gpu=on_gpu)
    return [
        Moment("reference", "layers", [*read, *gathered], of_reference=True),
        Moment("reference", "logits", [states, *logits, *gathered], of_reference=True),
    ]


def _update(
    networks: Mapping[str, Network], args: ReMaxConfig, work: Workload, split: Split, *, on_gpu: bool
) -> list[Moment]:
    """Policy and value model are updated one after the other: their gradients are never there together."""
    found: list[Moment] = []
    seen = split.passes(args)
    rows, num_batches = _micro_batch(args, work)
    tokens, outputs = rows * work.length, rows * work.completion_length
    for name, network in networks.items():
        own, w = network.counts, network.widths
        if not own.trained:
            continue
        is_policy = name == "policy"
        gathered = split.gathered(network, args)
        grads = split.gradients(own, args)
        # The head's gradient comes first. Where there is one from another pass, a plain head adds to it in place; else
        # it is made beside that.
        first = [Block(1, own.head * formulas.weight_size(args) * (not args.use_peft))]
        product = [Block(1, 2 * own.head)] if formulas.casts_weights(seen) and not args.use_peft else []
        several = num_batches > 1
        made_again = not several or not is_policy or formulas.through_autograd(args)
        kept = formulas.activations(network, tokens, outputs, seen, scorer=is_policy)
        logits = formulas.kept_logits(w, outputs, args, on_gpu=on_gpu) if is_policy else []
        made = formulas.head_temporaries(w, outputs, args, on_gpu=on_gpu) if is_policy else []
        casts = (
            formulas.casts_of_layers(network) if args.gradient_checkpointing and formulas.casts_weights(seen) else []
        )
        layer = formulas.recomputed(network, tokens, seen)
        back = formulas.layer_backward(w, tokens, seen)
        found += [
            Moment("update", f"{name}, forward", [*kept, *casts, *logits, *made, *gathered], grads if several else []),
            Moment(
                "update",
                f"{name}, head",
                [*kept, *logits, *made, *gathered, *(first if made_again else []), *product],
                grads if several else [],
            ),
            Moment("update", f"{name}, layers", [*kept, *layer, *back, *gathered], grads if several else first),
            Moment("update", f"{name}, last layer", [*layer, *back, *gathered], grads[1:]),
            Moment("update", f"{name}, optimiser", formulas.optimiser_temporaries(own, args, on_gpu=on_gpu), grads),
        ]
    return found


def _micro_batch(args: ReMaxConfig, work: Workload) -> tuple[int, int]:
    """Returns the rows of a pass of policy or reference, and how many passes an update takes."""
    samples = work.prompts * args.num_generations
    of_update = math.ceil(samples / args.num_mini_batches)
    rows = min(of_update, max(1, args.micro_batch_tokens // work.length))
    return rows, math.ceil(of_update / rows)

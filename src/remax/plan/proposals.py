"""If a run does not fit: the cheapest change of its settings that does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any

from remax.config import PPOOptions, ReMaxConfig
from remax.errors import UserError
from remax.plan.phases import Peak, Workload, largest

Predict = Callable[[ReMaxConfig], Mapping[str, Peak]]
"""From settings to the peaks of their phases."""
NO_PRICE = "nothing"


@dataclass(frozen=True)
class Lever:
    """One thing that can be changed."""

    cost: float
    """Percent of a step's time, roughly; what changes the numbers counts as much more."""
    price: str
    values: list[dict[str, Any]]
    """Settings, from the one that changes least to the one that saves most."""


@dataclass(frozen=True)
class Proposal:
    """Changed settings and what they give."""

    changes: dict[str, Any]
    peak: Peak
    fits: bool
    price: str

    @property
    def flags(self) -> str:
        """As they stand on the command line."""
        return " ".join(f"--{name}" + ("" if value is True else f" {value}") for name, value in self.changes.items())


def levers(args: ReMaxConfig, work: Workload, *, has_reward_model: bool, on_gpu: bool) -> list[Lever]:
    """Returns what can still be changed, the cheapest first."""
    rows_of_prompt = args.num_generations + args.needs_greedy
    rows = work.prompts * rows_of_prompt
    together = args.rollout_batch_size or rows
    micro = min(args.micro_batch_tokens, work.prompts * args.num_generations * work.length)
    found = [
        Lever(1, "more and smaller passes", _halves("micro_batch_tokens", micro, work.length)),
        Lever(1.5, "more and smaller passes", _halves("reward_batch_size", min(rows, args.reward_batch_size), 1)),
    ]
    if args.rollout_engine != "vllm":
        found.append(Lever(4, "a longer rollout", _halves("rollout_batch_size", together, rows_of_prompt)))
    elif args.vllm_mode == "colocate" and args.vllm_enable_sleep_mode is False:
        found.append(Lever(4, "vLLM goes to sleep in every step", [{"vllm_enable_sleep_mode": True}]))
    if args.optim == "adamw_torch":
        found.append(Lever(0, NO_PRICE, [{"optim": "adamw_torch_fused"}]))
    # The exact KL reads the reference in every micro-batch; with an adapter the reference is the policy itself.
    has_own_reference = args.needs_reference and not args.needs_exact_kl and not args.use_peft
    for name, exists in (("reward_placement", has_reward_model), ("reference_placement", has_own_reference)):
        if on_gpu and exists and getattr(args, name) == "resident":
            found.append(Lever(5, "frozen weights are copied in every step", [{name: "offload"}]))
    if not args.gradient_checkpointing:
        found.append(Lever(33, "about a third more time", [{"gradient_checkpointing": True}]))
    if args.dtype == "float32" and not args.bf16:
        found.append(Lever(100, "other numbers: passes in bfloat16", [{"bf16": True}]))
    if args.optim != "adamw_torch_8bit" and not args.use_peft:
        changes = {"optim": "adamw_torch_8bit", **({"dtype": "bfloat16"} if args.dtype == "float32" else {})}
        found.append(Lever(200, "other numbers: bfloat16 weights, rounded stochastically", [changes]))
    in_bfloat16 = [{"dtype": "bfloat16"}] if args.dtype == "float32" else []
    if args.use_peft:
        found.append(Lever(150, "other numbers: the frozen weights in bfloat16", in_bfloat16))
    else:
        adapter = [{"use_peft": True, **more} for more in ({}, *in_bfloat16)]
        found.append(Lever(400, "other numbers: only an adapter is trained", adapter))
    return sorted((lever for lever in found if lever.values), key=lambda lever: lever.cost)


def _halves(name: str, start: int, least: int) -> list[dict[str, Any]]:
    """Returns smaller and smaller values, down to the least."""
    values = []
    while start > least:
        start = max(least, start // 2)
        values.append({name: start})
    return values


def single_changes(args: ReMaxConfig, found: Sequence[Lever], predict: Predict, *, usable: int) -> list[Proposal]:
    """Returns what each change gives alone, at its most, the cheapest first."""
    return [_proposal(args, [(lever, lever.values[-1])], predict, usable) for lever in found]


def cheapest(args: ReMaxConfig, found: Sequence[Lever], predict: Predict, *, usable: int) -> Proposal | None:
    """Returns the cheapest combination of changes that fits; None if none does.

    Combinations are tried from the cheapest to the dearest, each change at its most; then each goes back as far as it
    still fits.
    """
    for chosen in _combinations(found):
        picked = [(lever, lever.values[-1]) for lever in chosen]
        if not _proposal(args, picked, predict, usable).fits:
            continue
        for position, lever in enumerate(chosen):
            trials = ([*picked[:position], (lever, value), *picked[position + 1 :]] for value in lever.values)
            picked = next(trial for trial in trials if _proposal(args, trial, predict, usable).fits)
        return _proposal(args, picked, predict, usable)
    return None


def _combinations(found: Sequence[Lever]) -> Iterator[tuple[Lever, ...]]:
    """Yields all sets of changes by their sum of costs."""
    sets = [chosen for size in range(1, len(found) + 1) for chosen in combinations(found, size)]
    yield from sorted(sets, key=lambda chosen: (sum(lever.cost for lever in chosen), len(chosen)))


def _proposal(args: ReMaxConfig, picked: list[tuple[Lever, dict[str, Any]]], predict: Predict, usable: int) -> Proposal:
    """Returns what changed settings give."""
    changes = {name: value for _, values in picked for name, value in values.items()}
    peak = largest(predict(replace(args, **changes)))
    prices = dict.fromkeys(lever.price for lever, _ in picked if lever.price != NO_PRICE)
    return Proposal(changes, peak, peak.total <= usable, "; ".join(prices) or NO_PRICE)


def with_method(args: ReMaxConfig, method: str) -> ReMaxConfig | None:
    """Returns the settings of the same run with another method's own left at their defaults; None if it cannot be."""
    own = {"method", "baseline", "num_generations", "greedy_every", *_PPO_NAMES}
    shared = {f.name: getattr(args, f.name) for f in fields(ReMaxConfig) if f.name not in own}
    try:
        return ReMaxConfig(**{**shared, "method": method})
    except UserError:
        return None


_PPO_NAMES = {f.name for f in fields(PPOOptions)}

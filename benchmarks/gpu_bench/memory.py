"""What fits under a cap: steps of a large model, and the largest batch of a smaller one."""

import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from gpu_bench.session import Case
from gpu_bench.shapes import Shape
from gpu_bench.training import (
    PROMPT_LENGTHS,
    Bench,
    InstantEngine,
    config_of,
    one_step,
    reward_model,
    trainer_of,
)
from gpu_bench.verdicts import memory_case

GB = 1e9
METHODS: dict[str, dict[str, Any]] = {"remax": {}, "ppo": {"method": "ppo", "num_ppo_epochs": 1}}
"""Epochs change PPO's time and not its memory."""


def cases(bench: Bench) -> Iterator[Case]:
    """ReMax and PPO on the large model under caps, then the largest batch of each on a smaller one."""
    for cap, placement in ((80, "resident"), (80, "offload"), (40, "offload")):
        for method in METHODS:
            run = partial(large_model, bench, method, placement, cap * GB)
            yield Case(memory_case(bench.memory_shape, method, placement, cap), 75, run)
    for cap in (40, 80):
        for method in METHODS:
            name = f"largest batch, {bench.largest_shape.name}, {method}, {cap} GB"
            yield Case(name, 45, partial(largest_batch, bench, method, cap * GB))


def large_model(bench: Bench, method: str, placement: str, cap: float) -> dict[str, Any]:
    """Returns whether whole steps fit under a cap, and by which margin; without it, if the device has more memory."""
    if bench.memory_optim == "adamw_torch_8bit" and find_spec("torchao") is None:
        return {"skipped": "--optim adamw_torch_8bit needs torchao, which is not installed; bring its wheel (--wheels)"}
    settings = {"gradient_checkpointing": True, "bf16": True, "optim": bench.memory_optim, "micro_batch_tokens": 4096}
    settings |= {"reference_placement": placement, "reward_placement": placement, **METHODS[method]}
    args = config_of(bench, batch=bench.memory_batch, completion=bench.completion // 2, **settings)
    result = try_steps(bench, bench.memory_shape, args, cap)
    if not result["fits"] and bench.device.total_bytes > 1.2 * cap and bench.budget.allows(60):
        bench.device.release()
        beyond = try_steps(bench, bench.memory_shape, args, math.inf)
        result["without_cap"] = beyond
        result["margin_bytes"] = cap - beyond["peak_bytes"] if beyond["fits"] else None
    return result


def try_steps(bench: Bench, shape: Shape, args: Any, cap: float, engine: Any = None) -> dict[str, Any]:
    """Returns what two steps take under a cap, or where memory ran out.

    Two, since only in the second one the optimiser's states are there from the start.
    """
    from remax.errors import UserError

    where, trainer = "loading", None
    result = {"fits": False, "cap_bytes": min(cap, bench.device.total_bytes or cap), **planned(bench, shape, args)}
    with bench.device.cap(cap):
        try:
            trainer = trainer_of(bench, shape, args, reward=reward_model(bench, shape), engine=engine)
            for number in (1, 2):
                where = f"step {number}"
                seconds, _ = one_step(trainer, number)
        except (torch.OutOfMemoryError, UserError) as error:  # The latter from the optimiser's own step.
            done = list(trainer.meter.seconds) if trainer is not None else []
            where += f", after {', '.join(done)}" if done else ""
            return {**result, "out_of_memory": str(error).partition(". ")[0], "where": where}
    peaks = dict(trainer.meter.peak_bytes)
    return {
        **result,
        "fits": True,
        "peak_bytes": max(peaks.values()),
        "margin_bytes": cap - max(peaks.values()),
        "peak_bytes_by_phase": peaks,
        "reserved_bytes": bench.device.reserved(),
        "between_steps_bytes": bench.device.allocated(),
        "seconds": seconds,
    }


def planned(bench: Bench, shape: Shape, args: Any) -> dict[str, Any]:
    """Returns the peaks that `remax plan` predicts from the configs alone; nothing where there is no such command."""
    if find_spec("remax.plan") is None:
        return {}
    from remax.plan import networks, phases

    longest = max(1, max(PROMPT_LENGTHS[: args.batch_size]) // bench.shorten)
    work = phases.Workload(args.batch_size, longest, args.max_completion_length)
    try:
        found = networks.networks_of_configs(shape.config(), shape.config(), args)
        peaks = phases.predict(networks.measure_networks(found, args), args, work, phases.Device(bench.device.type))
    except Exception as error:  # A prediction that fails must not cost the measurement.
        return {"planned_bytes_by_phase": None, "planning_failed": f"{type(error).__name__}: {error}"}
    return {"planned_bytes_by_phase": {phase: peak.total for phase, peak in peaks.items()}}


def largest_batch(bench: Bench, method: str, cap: float) -> dict[str, Any]:
    """Returns how many rows go through one forward and backward pass under a cap, without checkpointing.

    Completions come from nowhere: decoding has a bound of its own (--rollout_batch_size).
    """

    def fits(rows: int) -> bool | None:
        if not bench.budget.allows(20 if bench.device.type == "cuda" else 1):
            return None
        args = config_of(bench, batch=rows, completion=completion, micro_batch_tokens=2**40, **METHODS[method])
        result = try_steps(bench, bench.largest_shape, args, cap, InstantEngine)
        bench.device.release()
        return bool(result["fits"])

    completion = bench.completion // 2
    found = largest(fits, 16, bench.largest_tries)
    return {**found, "mean_tokens_per_row": completion + statistics.mean(PROMPT_LENGTHS) / bench.shorten}


def largest(fits: Callable[[int], bool | None], start: int, tries: int) -> dict[str, Any]:
    """Searches the largest number that fits: doubling, then bisection to about a tenth, in so many tries.

    fits: None where there is no time for another try. Returns the largest that did fit (0: none did), the smallest
    that did not (None: all did), and all that were tried.
    """
    good, bad, number, tried = 0, None, start, []
    for _ in range(tries):
        verdict = fits(number)
        if verdict is None:
            break
        tried.append(number)
        good, bad = (number, bad) if verdict else (good, number)
        if bad is not None and bad - good <= max(1, good // 10):
            break
        number = 2 * good if bad is None else (good + bad) // 2
    return {"largest": good, "too_large": bad, "tried": tried}

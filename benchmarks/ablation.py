"""What each optimisation of the step is worth: ReMax's step with it and without it, in turn, in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.ablation --output benchmarks/results/ablation.json

Each leaves the numbers what they are, which tests/test_same_numbers.py and its neighbours check; only other optimisers
do not.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.speed.bench import FIXED, RAGGED
from benchmarks.speed.cases import Case, write
from benchmarks.speed.competitors import our_trainer
from benchmarks.speed.process import content_reward
from benchmarks.speed.rounds import ratios
from transformers import DynamicCache

from remax.compare.runner import hardware, versions
from remax.recording import write_json
from remax.rollout import embedded, kernels
from remax.trainer import ReMaxTrainer

PHASES = {"rollout", "update", "step"}


@contextmanager
def growing_cache(trainer: ReMaxTrainer) -> Iterator[None]:
    """transformers' cache, which copies all keys and values for every token."""
    with patch.object(embedded, "make_cache", lambda config, num_new_tokens: DynamicCache(config=config)):
        yield


@contextmanager
def modules_for_single_tokens(trainer: ReMaxTrainer) -> Iterator[None]:
    """Every decoded token goes through all modules of the model."""
    with patch.object(kernels, "can_be_lean", lambda body: False):
        yield


@contextmanager
def no_kernels(trainer: ReMaxTrainer) -> Iterator[None]:
    """Neither that nor packed weights nor attention for single queries."""
    with patch.object(embedded, "decoding_kernels", lambda *_: nullcontext()):
        yield


@contextmanager
def head_by_autograd(trainer: ReMaxTrainer) -> Iterator[None]:
    """The head's chunks are recomputed by checkpointing."""
    with patch.object(trainer.policy.network, "has_plain_head", False):
        yield


@contextmanager
def short_rows_beside_long(trainer: ReMaxTrainer) -> Iterator[None]:
    """Micro-batches take the rows as they come, as many at once."""

    def in_order(lengths: list[int], max_tokens: int) -> list[list[int]]:
        size = max(1, max_tokens // max(lengths, default=1))
        rows = list(range(len(lengths)))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    with patch("remax.methods.critic_free.split_by_tokens", in_order):
        yield


WITHOUT: dict[str, Callable[[ReMaxTrainer], Any]] = {
    "cache with room": growing_cache,
    "single tokens past the modules": modules_for_single_tokens,
    "all decoding kernels": no_kernels,
    "backward pass of the head": head_by_autograd,
    "rows sorted by length": short_rows_beside_long,
}
OPTIMISERS = ("adamw_torch", "adamw_torch_8bit", "adafactor")


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Returns seconds by variant and phase, and the median ratio of each variant to the step as it is."""
    setting = write(case, folder)
    trainer = our_trainer(setting, content_reward)
    variants: dict[str, tuple[ReMaxTrainer, Callable[[ReMaxTrainer], Any]]] = {"as it is": (trainer, nullcontext)}
    variants |= {f"without: {name}": (trainer, without) for name, without in WITHOUT.items()}
    variants |= {
        f"--optim {name}": (our_trainer(setting, content_reward, optim=name), nullcontext) for name in OPTIMISERS
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
    for number in range(case.rounds + 1):
        for name, (own, changed) in variants.items():
            own.meter.clear()
            with ExitStack() as stack:
                stack.enter_context(changed(own))
                started = time.perf_counter()
                own.step(own.order.batch(1), number + 1)
                step = time.perf_counter() - started
            if number > 0:  # The first round warms up.
                for phase, value in {**own.meter.seconds, "step": step}.items():
                    seconds[name].setdefault(phase, []).append(value)
    base = seconds["as it is"]
    return {
        "seconds": seconds,
        "ratios": {
            name: {phase: statistics.median(ratios(own[phase], base[phase])) for phase in sorted(PHASES)}
            for name, own in seconds.items()
        },
    }


def main() -> None:
    """Measures all cases and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"hardware": hardware() | {"threads": 1}, "versions": versions(), "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        for case in [*FIXED, *RAGGED]:
            results["cases"][case.name] = found = measure(case, Path(folder))
            write_json(args.output, results)
            for name, own in found["ratios"].items():
                shown = "  ".join(f"{phase} {value:.2f}" for phase, value in own.items())
                print(f"{case.name:26} {name:40} {shown}", flush=True)


if __name__ == "__main__":
    main()

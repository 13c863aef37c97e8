"""Where the time of one of our steps goes: the operations of each phase that take most.

OMP_NUM_THREADS=1 python -m benchmarks.profile_step --model tinystories-260k llama-50m
"""

import argparse
import tempfile
from pathlib import Path

import torch
from benchmarks.speed.bench import FIXED
from benchmarks.speed.cases import write
from benchmarks.speed.competitors import our_trainer
from benchmarks.speed.process import content_reward
from torch.profiler import ProfilerActivity, profile

from remax.trainer import ReMaxTrainer

PHASES = ("rollout", "reward", "reference", "update")


def profiled_phases(trainer: ReMaxTrainer) -> dict[str, dict[str, float]]:
    """Returns the seconds that each operation itself took, by phase of a second step."""
    trainer.step(trainer.order.batch(1), 1)
    measure, found = trainer.meter.measure, {}

    class Profiled:
        """Measures a phase as the trainer's meter does, and profiles it."""

        def __init__(self, phase: str) -> None:
            self.phase = phase

        def __enter__(self) -> None:
            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.profiler.__enter__()
            self.measured = measure(self.phase)
            self.measured.__enter__()

        def __exit__(self, *error: object) -> None:
            self.measured.__exit__(None, None, None)
            self.profiler.__exit__(*error)
            found[self.phase] = {e.key: e.self_cpu_time_total / 1e6 for e in self.profiler.key_averages()}

    trainer.meter.measure = Profiled  # type: ignore[assignment,method-assign]
    trainer.step(trainer.order.batch(1), 2)
    return found


def main() -> None:
    """Prints the operations of every phase for the models that are asked for."""
    cases = {case.model: case for case in FIXED}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=sorted(cases), default=sorted(cases))
    parser.add_argument("--top", type=int, default=8, help="operations shown of each phase")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.model:
        with tempfile.TemporaryDirectory() as folder:
            found = profiled_phases(our_trainer(write(cases[name], Path(folder)), content_reward))
        whole = sum(sum(operations.values()) for operations in found.values())
        for phase in PHASES:
            total = sum(found[phase].values())
            print(f"\n{name}, {phase}: {total / whole:.0%} of the step")
            for operation, seconds in sorted(found[phase].items(), key=lambda pair: -pair[1])[: args.top]:
                print(f"  {seconds / total:6.1%}  {operation}")


if __name__ == "__main__":
    main()

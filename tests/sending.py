"""How many bytes a process sends in each phase of a step; run by torchrun for test_scaling_on_paper.py.

python -m torch.distributed.run --nproc_per_node 2 sending.py FOLDER ddp|fsdp2
"""

import contextlib
import copy
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM

from remax import processes
from together import Sharding
from toy_training import lively, make_trainer, policy

SETTINGS: dict[str, Any] = {"batch_size": 8, "beta": 0.2, "micro_batch_tokens": 40, "learning_rate": 1e-4}


def wide_policy() -> Any:
    """A policy whose weights outweigh all else that is sent."""
    config = copy.deepcopy(policy().config)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 1024, 4
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def sent() -> int:
    """Returns the bytes that this process has handed to the system for writing."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def main(folder: Path, kind: str) -> None:
    here = processes.join_processes()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    processes.Accelerator = Sharding if kind == "fsdp2" else Accelerator  # type: ignore[misc]
    trainer = make_trainer(folder / "run", lively, model=wide_policy(), **SETTINGS)
    by_phase: Counter[str] = Counter()
    measure = trainer.meter.measure

    @contextlib.contextmanager
    def counting(phase: str) -> Iterator[None]:
        torch.distributed.barrier()
        before = sent()
        with measure(phase):
            yield
        by_phase[phase] += sent() - before

    trainer.meter.measure = counting
    trainer.step(trainer.order.batch(1), 1)
    by_phase.clear()  # The first step also tells the others how gradients are put together.
    record = trainer.step(trainer.order.batch(2), 2)
    passes = sum(1 for _ in trainer.method.micro_batches(record, range(len(record.rollout.samples))))
    if here.is_main:
        (folder / f"{kind}.json").write_text(json.dumps({"passes": passes, **by_phase}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

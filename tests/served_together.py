"""A training in several processes whose completions one server draws; run by torchrun for test_vllm_together.py.

python -m torch.distributed.run --nproc_per_node 2 served_together.py FOLDER URL KIND [STEP]; KIND is ddp, fsdp2 or,
with the variables of Accelerate's launcher, zero3; the server ends before STEP.
"""

import sys
import time
from pathlib import Path
from typing import Any

from remax import processes
from remax.errors import GuardStop
from together import Sharding
from toy_training import calm_policy, lively, make_trainer


def train(folder: Path, url: str, last_step: int = 0) -> Any:
    settings = {
        "rollout_engine": "vllm",
        "vllm_mode": "server",
        "vllm_server_base_url": url,
        "vllm_server_timeout": 1.0,
    }
    settings |= {"num_generations": 2, "max_prompt_length": 32, "beta": 0.1, "max_steps": 3, "save_steps": 1}
    trainer = make_trainer(folder / "run", lively, model=calm_policy(1), **settings)
    own_step = trainer.step

    def step(prompts: Any, number: int) -> Any:
        if number == last_step:
            (folder / "end").touch()
            while not (folder / "ended").exists():
                time.sleep(0.05)
        return own_step(prompts, number)

    trainer.step = step
    trainer.train()
    return trainer


if __name__ == "__main__":
    if sys.argv[3] == "fsdp2":
        processes.Accelerator = Sharding  # type: ignore[misc]
    try:
        train(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[4:]))
    except GuardStop as stop:
        print(f"stopped: {stop}", flush=True)
        sys.exit(3)

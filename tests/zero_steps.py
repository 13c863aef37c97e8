"""Steps and trainings under DeepSpeed's ZeRO, run by torchrun for test_zero.py, and by the test without DeepSpeed.

ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=3 torchrun --nproc_per_node 2 zero_steps.py FOLDER CASE
where CASE is one of SETTINGS, for one step of SGD, or "NAME in WHERE" for a training; without ZeRO it is under FSDP2.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from remax import learner, processes, zero
from remax.methods import critic_free
from remax.metrics import step_metrics
from together import PPO, Sharding, tied
from toy_tokenizers import VOCAB_SIZE
from toy_training import calm_policy, lively, make_trainer

SETTINGS: dict[str, dict[str, Any]] = {
    "remax": {"beta": 0.2, "micro_batch_tokens": 40},
    "after one that is not finite": {"beta": 0.2, "micro_batch_tokens": 40},
    "clipped": {"beta": 0.1, "max_grad_norm": 0.1},
    "lora": {"beta": 0.2, "use_peft": True, "lora_r": 2, "micro_batch_tokens": 40},
    "bf16": {"beta": 0.2, "bf16": True},
    "no signal": {"beta": 0.0, "kl_mode": "none"},
    "lora, small weights whole": {"beta": 0.2, "use_peft": True, "lora_r": 2, "divides_all": False},
    "checkpointing": {"beta": 0.1, "gradient_checkpointing": True},
    "tied": {"beta": 0.2, "model": "tied", "micro_batch_tokens": 40},
    "tied with lora": {"beta": 0.2, "model": "tied", "use_peft": True, "lora_r": 2},
    "ppo": {**PPO, "micro_batch_tokens": 40},
    "ppo with lora": {**PPO, "use_peft": True, "lora_r": 2, "max_grad_norm": 0.5},
}
BY_ZERO = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def weights(trained: list[Parameter]) -> Tensor:
    if not BY_ZERO:
        return torch.cat([p.detach().flatten() for p in trained])
    from deepspeed.utils import safe_get_full_fp32_param

    return torch.cat([safe_get_full_fp32_param(p).flatten().clone() for p in trained])


def constant(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def run(folder: Path, case: str) -> dict[str, Any]:
    """Returns the weights around one step and what was recorded."""
    settings = {"batch_size": 8, **SETTINGS[case]}
    reward = constant if case == "no signal" else lively
    model = tied() if settings.pop("model", "") == "tied" else calm_policy(1)
    divide_all(settings.pop("divides_all", True))
    trainer = make_trainer(folder / case, reward, model=model, **settings)
    if "lora" in case:  # The backward pass makes logits again, chunk by chunk.
        trainer.policy.module.chunk_elements = 4 * VOCAB_SIZE
    learners = [trainer.policy, *([trainer.method.critic] if case.startswith("ppo") else [])]
    trained = [parameter for one in learners for parameter in one.trainable]
    before, batch = weights(trained), trainer.order.batch(1)
    if case == "after one that is not finite":
        real = critic_free.policy_gradient_loss
        critic_free.policy_gradient_loss = lambda *a, **k: real(*a, **k)._replace(loss=real(*a, **k).loss * math.nan)
        assert math.isnan(trainer.step(batch, 1).grad_norm)
        critic_free.policy_gradient_loss = real
        assert torch.equal(weights(trained), before)
    record = trainer.step(batch, 1)
    held = sum(p.numel() for p in trained)
    trainer.save_model(folder / f"{case} model")
    metrics = {name: value for name, value in step_metrics(record).items() if value == value}
    return {"before": before, "after": weights(trained), "metrics": metrics, "held": held}


def train(folder: Path, name: str) -> None:
    """Trains for four steps, going on from the last checkpoint in the folder if there is one."""
    settings = {"max_steps": 4, "save_steps": 2, "resume": "auto", "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    make_trainer(folder, lively, model=calm_policy(1), **settings, **SETTINGS[name]).train()


def divide_all(wanted: bool = True) -> None:
    """Makes DeepSpeed divide small weights too or, as by default, leave them whole."""
    configure = zero.configure

    def divides_all(accelerator: Any, max_grad_norm: float) -> None:
        configure(accelerator, max_grad_norm)
        stage = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        stage["stage3_param_persistence_threshold"] = 0 if wanted else 100_000

    learner.configure = divides_all


def by_sgd() -> None:
    """Makes every optimiser plain SGD."""
    learner.make_optimizer = lambda network, args: torch.optim.SGD(  # type: ignore[assignment]
        [p for p in network.parameters() if p.requires_grad], lr=0.1
    )


if __name__ == "__main__":
    here = processes.join_processes()
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    if not BY_ZERO:
        processes.Accelerator = Sharding  # type: ignore[misc]
    divide_all()
    for training in [case for case in cases if " in " in case]:
        name, _, where = training.partition(" in ")
        train(folder / where, name)
    by_sgd()
    results = {case: run(folder, case) for case in cases if " in " not in case}
    if here.is_main:
        torch.save({"num_processes": here.num, "results": results}, folder / "results.pt")

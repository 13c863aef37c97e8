"""What several processes do together; run by torchrun for test_together.py, and by the test itself alone.

python -m torch.distributed.run --nproc_per_node 2 together.py FOLDER CASE ...
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from remax import processes
from remax.metrics import step_metrics
from remax.sharding import whole
from toy_tokenizers import PAD, toy_tokenizer
from toy_training import PROMPTS, calm_policy, lively, make_trainer, policy

ROWS = [{"prompt": prompt, "ids": row} for row, prompt in enumerate(PROMPTS)]


def uneven(completions: list[str], **_: Any) -> list[float]:
    """Tells only texts with a certain letter from others, so that few samples differ from their greedy completion."""
    return [float("e" in text) for text in completions]


def alike(completions: list[str], **_: Any) -> list[float]:
    """Gives no sample a signal."""
    return [1.0] * len(completions)


def logging_reward(
    completions: list[str], ids: list[int], log_metric: Any, log_extra: Any, **_: Any
) -> list[float | None]:
    """Logs, applies to some completions only, and looks at a column of the dataset."""
    log_metric("texts/length", sum(map(len, completions)) / len(completions))
    log_extra("first", [text[:1] for text in completions])
    rewards = zip(lively(completions), ids, strict=True)
    return [None if row % 3 == 1 else reward + row / 10 for reward, row in rewards]


PPO = {"method": "ppo", "num_ppo_epochs": 2, "num_mini_batches": 2, "whiten_advantages": True, "beta": 0.2}
SETTINGS: dict[str, dict[str, Any]] = {
    "remax": {"beta": 0.2, "micro_batch_tokens": 40},
    "rloo": {"method": "rloo", "num_generations": 3, "beta": 0.2, "kl_mode": "to_go"},
    "one micro-batch": {"beta": 0.2, "micro_batch_tokens": 10_000},
    "clipped": {"beta": 0.1, "max_grad_norm": 0.01},
    "ppo": {**PPO, "micro_batch_tokens": 40},
    "lora": {"beta": 0.2, "use_peft": True, "lora_r": 2, "micro_batch_tokens": 40},
    "checkpointing": {"beta": 0.1, "gradient_checkpointing": True},
    "few signals": {"beta": 0.0, "reward": uneven},
    "few signals in small parts": {"beta": 0.0, "reward": uneven, "micro_batch_tokens": 1},
    "no signal": {"beta": 0.0, "reward": alike},
    "logging": {"beta": 0.1, "reward": [logging_reward, lively], "rows": ROWS},
    "reward model": {"beta": 0.1, "reward": "reward_model", "batch_size": 3, "reward_batch_size": 2},
    "reward model in bf16": {"reward": "reward_model", "batch_size": 3, "reward_batch_size": 2, "bf16": True},
    "tied": {"beta": 0.2, "micro_batch_tokens": 40, "model": "tied"},
    "bf16": {"beta": 0.2, "bf16": True},
    "two prompts": {"beta": 0.1, "batch_size": 2, "num_generations": 3, "method": "rloo"},
}


class Sharding(Accelerator):
    """Accelerate with FSDP2 on a CPU, where it would stay unsharded by itself."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )
        if self.mixed_precision != "no":
            self.state.fsdp_plugin.set_mixed_precision(self.mixed_precision)


def tied() -> Any:
    """A policy whose head is its embedding."""
    model = calm_policy(1)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


def save_reward_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{name: getattr(policy().config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")},
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=PAD,
        initializer_range=0.3,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(folder)


def one_step(folder: Path, reward: Any = lively, **settings: Any) -> dict[str, Any]:
    """Returns the gradients of one step of SGD, the weights after it and what was recorded."""
    policy = tied() if settings.pop("model", "") == "tied" else calm_policy(1)
    trainer = make_trainer(folder, reward, model=policy, **{"batch_size": 8, **settings})
    learners = [trainer.policy, *([trainer.method.critic] if settings.get("method") == "ppo" else [])]
    gradients: list[Tensor] = []
    for learner in learners:
        learner.optimizer = Recording(learner.trainable, gradients)
    record = trainer.step(trainer.order.batch(1), 1)
    weights = [flat(learner.trainable) for learner in learners]
    metrics = {name: value for name, value in step_metrics(record).items() if value == value}
    completions = [(c.prompt.index, c.token_ids, c.text) for c in record.rollout.samples + record.rollout.greedy]
    columns = record.rewards.columns
    return {"gradients": gradients, "weights": weights, "metrics": metrics, "texts": (completions, columns)}


class Recording(torch.optim.SGD):
    """SGD that keeps the gradients it is given."""

    def __init__(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        super().__init__(parameters, lr=0.1)
        self.gradients = gradients

    def step(self, closure: Any = None) -> None:
        self.gradients.append(flat([parameter.grad for parameter in self.param_groups[0]["params"]]))
        super().step()


def flat(tensors: list[Any]) -> Tensor:
    return torch.cat([whole(tensor.detach()).flatten() for tensor in tensors])


def trained(folder: Path, max_steps: int, **settings: Any) -> dict[str, Any]:
    """Trains to a step, going on from the last checkpoint in the folder if there is one; returns what is left of it."""
    trainer = make_trainer(
        folder,
        lively,
        model=calm_policy(1),
        max_steps=max_steps,
        save_steps=2,
        resume="auto",
        allow_config_change=True,
        eval_dataset=Dataset.from_list([{"prompt": "tea"}]),  # fewer prompts than processes
        **{"batch_size": 4, "learning_rate": 1e-3, **settings},
    )
    trainer.train()
    learners = [trainer.policy, *([trainer.method.critic] if settings.get("method") == "ppo" else [])]
    return {"weights": [flat(learner.trainable) for learner in learners]}


def run(folder: Path, case: str) -> dict[str, Any]:
    """Returns what a case gives, in this process and those beside it.

    case: "KIND: NAME" for one step, "KIND: NAME to STEP in FOLDER" for a training; KIND is alone, ddp or fsdp2.
    """
    kind, _, name = case.partition(": ")
    if kind != "alone":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    processes.Accelerator = Sharding if kind == "fsdp2" else Accelerator  # type: ignore[misc]
    name, _, training = name.partition(" to ")
    if training:
        step, _, where = training.partition(" in ")
        return trained(folder / where, int(step), **SETTINGS[name])
    settings = dict(SETTINGS[name])
    if isinstance(settings.get("reward"), str):
        settings["reward"] = str(folder / settings["reward"])
    return one_step(folder / kind / name.replace(" ", "_"), **settings)


if __name__ == "__main__":
    here = processes.join_processes()
    results = {case: run(Path(sys.argv[1]), case) for case in sys.argv[2:]}
    if here.is_main:
        torch.save({"num_processes": here.num, "results": results}, Path(sys.argv[1]) / "results.pt")

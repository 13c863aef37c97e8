"""A toy training: a tiny policy that is rewarded for vowels, and ways to watch its steps."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from remax.config import ReMaxConfig
from remax.trainer import ReMaxTrainer
from tiny_models import tiny_model
from toy_tokenizers import EOS, PAD, VOCAB_SIZE, toy_tokenizer

PROMPTS = ["ab", "a cat", "the dog sat", "x", "once upon", "hello there", "no", "tea at five"]


class Silent:
    """A view that shows nothing."""

    def start(self, max_steps: int, step: int = 0) -> None: ...
    def update(self, metrics: Any, sample: Any) -> None: ...
    def note(self, line: str) -> None: ...
    def stop(self) -> None: ...


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(c in "aeiou" for c in text) / 4 for text in completions]


def lively(completions: list[str], **_: Any) -> list[float]:
    """A reward that hardly two texts have in common."""
    return [sum(map(ord, text)) % 17 / 8 for text in completions]


def policy(**overrides: Any) -> Any:
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, **overrides)
    model.generation_config.eos_token_id = EOS
    return model


def make_trainer(folder: Path, reward_funcs: Any = vowels, *, model: Any = None, rows: Any = None, **settings: Any):
    callbacks = settings.pop("callbacks", None)
    eval_dataset = settings.pop("eval_dataset", None)
    gold_reward_funcs = settings.pop("gold_reward_funcs", None)
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "batch_size": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": ["none"],
        "max_grad_norm": 0.0,
    }
    return ReMaxTrainer(
        model or policy(),
        reward_funcs,
        ReMaxConfig(**{**defaults, **settings}),
        train_dataset=Dataset.from_list(rows or [{"prompt": p} for p in PROMPTS]),
        eval_dataset=eval_dataset,
        processing_class=toy_tokenizer("<s> $A", bos_token="<s>"),
        callbacks=callbacks,
        view=Silent(),
        gold_reward_funcs=gold_reward_funcs,
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def calm_policy(seed: int) -> Any:
    """A policy with the weights of a fresh initialisation: the rounding of one float32 is not amplified."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(policy().config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.12)
    return model


def step_result(folder: Path, *, shuffle: bool = False, pad_token_id: int = PAD, **settings: Any):
    """Gradient of one step on the same samples, and the weights after a step of SGD on it."""
    trainer = make_trainer(folder, model=calm_policy(1), batch_size=8, num_generations=2, **settings)
    trainer.parts.tokenizer.pad_token_id = pad_token_id
    trainer.parts.policy.load_state_dict(calm_policy(2).state_dict())
    trainer.policy.optimizer = torch.optim.SGD(trainer.parts.policy.parameters(), lr=0.1)
    gradients = watch_gradients(trainer)
    prompts = trainer.order.batch(1)
    trainer.step(prompts[::-1] if shuffle else prompts, 1)
    return gradients[0], torch.cat([p.detach().flatten() for p in trainer.parts.policy.parameters()])


def watch_gradients(trainer: ReMaxTrainer) -> list[torch.Tensor]:
    """Returns a list that gets the gradient of every step to come."""
    gradients: list[torch.Tensor] = []
    own_step = trainer.policy.optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.parts.policy.parameters() if p.requires_grad]))
        return own_step(*args, **kwargs)

    trainer.policy.optimizer.step = step
    return gradients

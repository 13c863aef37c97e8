"""Random models, prompts, and trainers of them."""

import contextlib
import io
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from gpu_bench.device import Device
from gpu_bench.session import Budget
from gpu_bench.shapes import LLAMA_1B, LLAMA_7B, PAD, QWEN_1B, QWEN_HALF, TOY, TOY_QWEN, Shape

PROMPT_LENGTHS = (
    *(96, 41, 153, 64, 212, 87, 28, 119, 176, 53, 134, 72, 245, 37, 101, 188),
    *(58, 143, 80, 22, 167, 110, 256, 46, 92, 129, 68, 199, 33, 157, 75, 106),
)
"""Of the prompts, in tokens, again and again: about as uneven as those of instructions."""


@dataclass(frozen=True)
class Bench:
    """What a call works with; the numbers are those of the real shapes."""

    device: Device
    budget: Budget
    decode_shapes: Sequence[tuple[Shape, int]] = ((LLAMA_7B, 64), (QWEN_1B, 64), (LLAMA_1B, 64), (QWEN_HALF, 256))
    decode_lengths: tuple[int, int] = (32, 160)
    train_cases: Sequence[tuple[Shape, dict[str, Any]]] = (
        (LLAMA_1B, {}),
        (LLAMA_1B, {"bf16": True, "dtype": "float32"}),
        (QWEN_1B, {}),
        (LLAMA_7B, {"optim": "adamw_torch_8bit", "micro_batch_tokens": 4096}),
    )
    train_batch: int = 96
    memory_shape: Shape = LLAMA_7B
    memory_batch: int = 16
    memory_optim: str = "adamw_torch_8bit"
    largest_shape: Shape = LLAMA_1B
    largest_tries: int = 8
    compare_shape: Shape = LLAMA_1B
    compare_batch: int = 128
    completion: int = 256
    rounds: int = 3
    shorten: int = 1
    """Prompts are that many times shorter than PROMPT_LENGTHS."""

    def quick(self) -> "Bench":
        """Returns the same at toy shapes."""
        return replace(
            self,
            decode_shapes=((TOY, 4), (TOY_QWEN, 2)),
            decode_lengths=(2, 6),
            train_cases=((TOY, {}), (TOY_QWEN, {"bf16": True, "dtype": "float32"})),
            train_batch=4,
            memory_shape=TOY,
            memory_batch=2,
            memory_optim="adamw_torch",
            largest_shape=TOY,
            largest_tries=2,
            compare_shape=TOY,
            compare_batch=4,
            completion=6,
            rounds=1,
            shorten=16,
        )


@lru_cache(maxsize=1)
def tokenizer_of(vocab_size: int) -> Any:
    """Returns a tokenizer of words w3 w4 ...: whatever is decoded is tokenised to the same ids again."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<pad>": PAD, **{f"w{i}": i for i in range(3, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )


def random_model(bench: Bench, shape: Shape, kind: str = "AutoModelForCausalLM", dtype: str = "bfloat16") -> Any:
    """Returns a model with random weights, made on the device: on a CPU, drawing 7 billion takes minutes."""
    import transformers

    torch.manual_seed(0)
    with torch.device(bench.device.type):
        return getattr(transformers, kind).from_config(shape.config(), dtype=getattr(torch, dtype)).eval()


def reward_model(bench: Bench, shape: Shape) -> Any:
    """Returns a frozen reward model with random weights."""
    return random_model(bench, shape, "AutoModelForSequenceClassification").requires_grad_(False)


def prompts_of(bench: Bench, shape: Shape, number: int) -> list[list[int]]:
    """Returns the token ids of prompts."""
    generator = torch.Generator().manual_seed(1)
    lengths = [max(1, PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)] // bench.shorten) for i in range(number)]
    return [torch.randint(3, shape.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def spread_reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    """Rewards that differ and are never 0: no row may be skipped as one without a gradient."""
    return [(sum(ids) % 101 + 1) / 101 for ids in completion_ids]


class InstantEngine:
    """Completions of full length out of thin air, where only what follows the rollout is measured."""

    def __init__(self, policy: Any) -> None:
        self.vocab_size = policy.config.vocab_size

    def generate(
        self, prompts: Any, sampling: Any, *, num_samples: int, greedy: bool | Sequence[bool], seed: int, step: int
    ) -> Any:
        """Returns random completions; see RolloutEngine."""
        from remax.interfaces import Completion, Rollout

        length, generator = sampling.max_completion_length, torch.Generator().manual_seed(step)
        logprobs = [-math.log(self.vocab_size)] * length

        def completion(prompt: Any, index: int) -> Any:
            ids = torch.randint(3, self.vocab_size, (length,), generator=generator).tolist()
            return Completion(prompt, index, ids, list(logprobs), truncated=True)

        wanted = [greedy] * len(prompts) if isinstance(greedy, bool) else greedy
        return Rollout(
            [completion(prompt, k) for prompt in prompts for k in range(num_samples)],
            [completion(prompt, -1) for prompt, also in zip(prompts, wanted, strict=True) if also],
        )


def config_of(bench: Bench, *, batch: int, completion: int, **settings: Any) -> Any:
    """Returns the settings of a training in bfloat16 weights, unless they say otherwise."""
    from remax import ReMaxConfig

    return ReMaxConfig(
        output_dir=str(Path(tempfile.gettempdir()) / f"remax-gpu-benchmark-{os.getpid()}"),
        batch_size=batch,
        max_completion_length=completion,
        max_prompt_length=max(1, max(PROMPT_LENGTHS) // bench.shorten),
        max_steps=1000,
        report_to=["none"],
        **{"dtype": "bfloat16", **settings},
    )


def trainer_of(bench: Bench, shape: Shape, args: Any, *, reward: Any = spread_reward, engine: Any = None) -> Any:
    """Returns a trainer with a random policy, whose step takes args.batch_size prompts."""
    from datasets import Dataset

    from remax import ReMaxTrainer
    from remax.progress import PlainLines

    tokenizer = tokenizer_of(shape.vocab_size)
    prompts = [{"prompt": tokenizer.decode(ids)} for ids in prompts_of(bench, shape, args.batch_size)]
    with contextlib.redirect_stdout(io.StringIO()):  # What it says of settings is known here.
        trainer = ReMaxTrainer(
            random_model(bench, shape, dtype=args.dtype),
            reward,
            args,
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
            reward_processing_classes=None if reward is spread_reward else tokenizer,
            rollout_engine=engine,
            view=PlainLines(),
        )
    trainer.parts.memory.halves = False  # What does not fit must be seen not to fit.
    return trainer


def one_step(trainer: Any, number: int) -> tuple[dict[str, float], Any]:
    """Returns the seconds of a step, by phase and in all, and its record."""
    trainer.meter.clear()
    started = time.perf_counter()
    record = trainer.step(trainer.order.batch(1), number)
    return {**trainer.meter.seconds, "step": time.perf_counter() - started}, record


def medians(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the median of every phase."""
    return {phase: statistics.median(step[phase] for step in steps) for phase in steps[0]}

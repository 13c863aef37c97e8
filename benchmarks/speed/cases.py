"""What is trained on: models, prompts, and how long the completions are."""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed.lengths import LengthPlan, planned_lengths
from benchmarks.step_time import make_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

TINYSTORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "tinystories-260k"
BETA = 0.05
OPENINGS = ("Once upon a time there was a", "One day in the park a", "In a small house there lived a")
ADJECTIVES = ("little", "big", "happy", "sad", "brave", "funny", "kind", "tiny")
HEROES = ("girl named Lily", "boy named Tim", "dog named Max", "cat named Sue", "bird named Ben", "mouse named Mia")


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    vocab_size: int
    key_value_heads: int | None = None
    tied: bool = False

    def config(self) -> Any:
        """Returns the configuration, with the special tokens of the benchmark's own tokenizer."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads or self.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=self.tied,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            num_labels=1,
        )


LIKE_TINYSTORIES = Shape(64, 172, 5, 8, 512, key_value_heads=4, tied=True)
FIFTY_MILLION = Shape(512, 1536, 12, 8, 8192)


@dataclass(frozen=True)
class Case:
    """One setting that all competitors share."""

    model: str
    """tinystories-260k, or another name for random weights of the shape."""
    shape: Shape
    num_prompts: int
    prompt_length: int
    """Tokens of each prompt. A real tokenizer gets beginnings of stories instead: 14 to 25 tokens."""
    max_completion_length: int
    mean_length: float | None = None
    """Of geometric completion lengths; None: all completions have the largest length."""
    micro_batch_tokens: int = 2560
    """About as many tokens, padding included, as everybody takes in one forward-backward pass."""
    rounds: int = 3

    @property
    def micro_batches(self) -> int:
        """How many equal parts two padded rows per prompt come in, so that a part keeps within the tokens."""
        rows, width = 2 * self.num_prompts, self.prompt_length + self.max_completion_length
        return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n * width <= self.micro_batch_tokens)

    @property
    def lengths(self) -> str:
        """How the lengths of the completions are distributed."""
        return "fixed" if self.mean_length is None else "ragged"

    @property
    def name(self) -> str:
        """Names the case in results."""
        return f"{self.model}, {self.lengths}"


@dataclass(frozen=True)
class Setting:
    """A case on disk: what the trainers are given."""

    case: Case
    folder: Path
    """Of the model and its tokenizer."""
    trained: bool
    """False: random weights."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer, which pads on the left."""
        return AutoTokenizer.from_pretrained(self.folder, padding_side="left")

    def prompts(self) -> list[str]:
        """Returns the prompts of every step, all different."""
        case = self.case
        if self.trained:
            return _openings(case.num_prompts)
        generator, words = random.Random(0), [f"w{i}" for i in range(3, case.shape.vocab_size)]
        return [" ".join(generator.choices(words, k=case.prompt_length)) for _ in range(case.num_prompts)]

    def plan(self) -> LengthPlan:
        """Returns when the completions end."""
        case, tokenizer = self.case, self.tokenizer()
        prompts = tokenizer(self.prompts())["input_ids"]
        lengths = planned_lengths(len(prompts), case.max_completion_length, case.mean_length)
        assert tokenizer.eos_token_id is not None
        return LengthPlan(prompts, lengths, tokenizer.eos_token_id)


def write(case: Case, folder: Path) -> Setting:
    """Writes the model of a case, unless it is there, and returns where everything is."""
    if case.model == "tinystories-260k" and TINYSTORIES.is_dir():
        return Setting(case, TINYSTORIES, trained=True)
    target = folder / case.model
    if not target.is_dir():
        torch.manual_seed(0)
        LlamaForCausalLM(case.shape.config()).save_pretrained(target)
        make_tokenizer(case.shape.vocab_size).save_pretrained(target)
    return Setting(case, target, trained=False)


def _openings(number: int) -> list[str]:
    """Returns that many different beginnings of stories, always the same."""
    combinations = list(itertools.product(OPENINGS, ADJECTIVES, HEROES))
    return [" ".join(chosen) for chosen in random.Random(0).sample(combinations, number)]

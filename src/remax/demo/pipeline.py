"""`remax demo`: supervised fine-tuning, reward model and ReMax on the world of stories, offline and from nothing."""

import contextlib
import ctypes
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from remax.config import ModelOptions, ReMaxConfig, RewardConfig, SFTConfig
from remax.data import decode_completions
from remax.demo.results import Measurement, plot_curves, print_results
from remax.demo.settings import DemoConfig
from remax.demo.stories import Story, choose, gold_score, held_out_prompts, make_corpus
from remax.errors import UserError
from remax.evaluate import Evaluation, bootstrap_interval
from remax.interfaces import Prompt, Sampling
from remax.models import load_policy, load_tokenizer
from remax.rollout.embedded import EmbeddedEngine
from remax.stages.reward import run_reward
from remax.stages.sft import run_sft
from remax.trainer import ReMaxTrainer

EOS, PAD = "<eos>", "<pad>"
VOCAB_SIZE = 1280
NUM_POSITIONS = 256
MAX_COMPLETION_LENGTH = 64
CHOICE_TEMPERATURE = 1.0
"""How noisy the hidden scorer's choices are, in points of the gold score."""
NUM_HELD_OUT_PAIRS = 200
NUM_EVALUATIONS = 4
"""In training; there is one before it, too."""


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Runs the whole pipeline, prints the figures before and after, and returns them.

    Writes OUT/sft, OUT/reward and OUT/remax (three runs as the commands leave them), OUT/curves.png and
    OUT/results.json.

    Raises:
        UserError: the output directory holds a demo already.
    """
    out = Path(config.output_dir)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--output_dir is {out}: it is not empty, a demo would be mixed with it; set a new folder.")
    started = time.perf_counter()
    # The tensors are so small that a second thread saves little, and waits long where another program has its core.
    torch.set_num_threads(1)
    _keep_freed_memory()

    with _stage("1/4  A language model learns to tell stories, kind and unkind alike (supervised fine-tuning)."):
        corpus = make_corpus(config.num_stories, config.seed)
        tokenizer = train_tokenizer(corpus)
        run_sft(sft_config(config, out), tiny_llama(tokenizer, config.seed), as_texts(corpus), None, tokenizer)

    with _stage("2/4  A hidden reader compares pairs of its stories; a reward model learns from the noisy choices."):
        pairs = choose_pairs(config, out / "sft" / "model", corpus)
        held_out = Dataset.from_list(pairs[:NUM_HELD_OUT_PAIRS])
        ranking = run_reward(
            reward_config(config, out),
            str(out / "sft" / "model"),
            Dataset.from_list(pairs[NUM_HELD_OUT_PAIRS:]),
            held_out,
        )

    with _stage("3/4  ReMax trains the language model against the reward model; it never sees the hidden reader."):
        prompts = held_out_prompts(config.num_eval_prompts, config.seed, {story.prompt for story in corpus})
        measuring = Measuring(config.seed)
        make_trainer(config, out, corpus, prompts, measuring).train()
        before, *_, after = measuring.measurements

    with _stage("4/4  The result, on openings that no model has seen."):
        print_results(prompts, before, after)
        plot_curves(out / "remax", out / "curves.png")
    seconds = time.perf_counter() - started
    results = {
        "before": {"means": before.means, "intervals": before.intervals},
        "after": {"means": after.means, "intervals": after.intervals},
        "reward_model": ranking,
        "seconds": seconds,
        "config": vars(config),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(
        f"\nAll in {seconds:.0f} s. The curves are in {out / 'curves.png'}, the model is in {out / 'remax' / 'model'}."
    )
    print(f"Talk to it: remax chat --model {out / 'remax' / 'model'}")
    return results


def _keep_freed_memory() -> None:
    """Lets the C library of Linux reuse memory instead of returning it: a third of the demo's time went into that."""
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library: only slower
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


@contextmanager
def _stage(title: str) -> Iterator[None]:
    started = time.perf_counter()
    print(f"\n{title}", flush=True)
    yield
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)


def train_tokenizer(corpus: Sequence[Story]) -> Any:
    """Returns a byte-level BPE tokenizer of the corpus."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        show_progress=False,
    )
    core.train_from_iterator((story.prompt + story.continuation for story in corpus), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=PAD)


def tiny_llama(tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """Returns a Llama with random weights that two CPU cores can train in half a minute."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=NUM_POSITIONS,
            tie_word_embeddings=True,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def as_texts(corpus: Sequence[Story]) -> Dataset:
    """Returns the stories as texts to learn from as a whole."""
    return Dataset.from_list([{"text": story.prompt + story.continuation} for story in corpus])


def sft_config(config: DemoConfig, out: Path) -> SFTConfig:
    return SFTConfig(
        output_dir=str(out / "sft"),
        max_steps=config.sft_steps,
        batch_size=16,
        max_length=NUM_POSITIONS,
        learning_rate=8e-3,
        warmup_steps=0.05,
        adam_beta2=0.99,
        seed=config.seed,
        report_to=["none"],
        save_steps=-1,
        logging_steps=max(1, config.sft_steps // 8),
    )


def reward_config(config: DemoConfig, out: Path) -> RewardConfig:
    return RewardConfig(
        output_dir=str(out / "reward"),
        max_steps=config.reward_steps,
        batch_size=32,
        max_length=NUM_POSITIONS,
        learning_rate=2e-3,
        warmup_steps=0.1,
        seed=config.seed,
        report_to=["none"],
        save_steps=-1,
        logging_steps=max(1, config.reward_steps // 5),
    )


def choose_pairs(config: DemoConfig, model_folder: Path, corpus: Sequence[Story]) -> list[dict[str, str]]:
    """Returns pairs of the model's own continuations of corpus openings, ordered by the reader's noisy choice."""
    rng = random.Random(f"pairs {config.seed}")
    openings = [story.prompt for story in rng.sample(list(corpus), config.num_pairs)]
    tokenizer = load_tokenizer(str(model_folder), flag="--model")
    model = load_policy(str(model_folder), ModelOptions(), flag="--model")
    prompts = [Prompt(i, text, tokenizer(text)["input_ids"]) for i, text in enumerate(openings)]
    sampling = Sampling(MAX_COMPLETION_LENGTH, (tokenizer.eos_token_id,))
    engine = EmbeddedEngine(model, pad_token_id=tokenizer.pad_token_id, max_rows=256)
    samples = engine.generate(prompts, sampling, num_samples=2, greedy=False, seed=config.seed, step=0).samples
    decode_completions(tokenizer, samples)
    pairs = []
    for first, second in zip(samples[::2], samples[1::2], strict=True):
        prompt = str(first.prompt.content)
        if first.text.strip() and second.text.strip() and first.text != second.text:
            gold = [gold_score(prompt, completion.text) for completion in (first, second)]
            chosen, rejected = (first, second) if choose(gold[0], gold[1], rng, CHOICE_TEMPERATURE) else (second, first)
            pairs.append({"prompt": prompt, "chosen": chosen.text, "rejected": rejected.text})
    return pairs


def hidden_reader(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Returns the gold scores, as a reward function does."""
    return [gold_score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


class Measuring(TrainerCallback):  # type: ignore[misc]
    """Keeps what every evaluation on the held-out openings found."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.measurements: list[Measurement] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, *, evaluation: Evaluation, **kwargs: Any) -> None:
        samples = evaluation.rollout.samples
        assert evaluation.gold is not None
        gold = evaluation.gold.numpy()
        values = {"gold score": gold, "kind stories": (gold > 1).astype(float)}
        names = {"learned reward": "reward", "KL": "kl", "length": "completions/mean_length"}
        values |= {title: evaluation.values[name] for title, name in names.items()}
        means = {name: float(column.mean()) for name, column in values.items()}
        intervals = {name: bootstrap_interval(column, seed=self.seed) for name, column in values.items()}
        self.measurements.append(Measurement(means, intervals, [c.text for c in samples]))


def make_trainer(
    config: DemoConfig, out: Path, corpus: Sequence[Story], held_out: Sequence[str], measuring: Measuring
) -> ReMaxTrainer:
    """Returns the ReMax trainer: openings of the corpus as prompts, the learned reward model as the only reward.

    The hidden reader judges evaluations alone.
    """
    return ReMaxTrainer(
        str(out / "sft" / "model"),
        str(out / "reward" / "model"),
        ReMaxConfig(
            output_dir=str(out / "remax"),
            max_steps=config.max_steps,
            batch_size=64,
            max_completion_length=MAX_COMPLETION_LENGTH,
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            beta=0.1,
            seed=config.seed,
            report_to=["none"],
            save_steps=-1,
            save_best_model=False,
            eval_steps=max(1, config.max_steps // NUM_EVALUATIONS),
            logging_steps=max(1, config.max_steps // 10),
        ),
        train_dataset=Dataset.from_list([{"prompt": story.prompt} for story in corpus]),
        eval_dataset=Dataset.from_list([{"prompt": prompt} for prompt in held_out]),
        callbacks=[measuring],
        gold_reward_funcs=hidden_reader,
    )

"""What a step of PPO costs against one of ReMax: measured seconds beside counted floating-point operations.

    python benchmarks/step_time.py --output benchmarks/results/step_time.json

Policy, reference, reward model and value model are random Llamas of one size; completions have a fixed length. The
steps of the methods alternate in one process (A B C D, A B C D, ...), and the medians of the ratios within a round are
reported, so a machine that slows down for a while slows all of them.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from remax import ReMaxConfig, ReMaxTrainer
from remax.compare.measure import UNKNOWN_OPERATIONS, _OneModule
from remax.compare.runner import hardware, versions
from remax.progress import PlainLines

METHODS: dict[str, dict[str, Any]] = {
    "remax": {},
    "reinforce": {"method": "reinforce"},
    "rloo, k=2": {"method": "rloo"},
    "ppo, 1 epoch": {"method": "ppo", "num_ppo_epochs": 1},
    "ppo, 2 epochs": {"method": "ppo", "num_ppo_epochs": 2},
    "ppo, 4 epochs": {"method": "ppo", "num_ppo_epochs": 4},
}


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of words w0 w1 ...: whatever is decoded is tokenised to the same ids again."""
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )


def make_trainer(options: argparse.Namespace, settings: dict[str, Any]) -> ReMaxTrainer:
    """Returns a trainer of one method; all have the same weights at the start."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        max_position_embeddings=options.prompt_length + options.completion_length,
        tie_word_embeddings=False,
        pad_token_id=2,
        num_labels=1,
    )
    tokenizer = make_tokenizer(options.vocab_size)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, options.vocab_size, (options.batch_size, options.prompt_length), generator=generator)
    trainer = ReMaxTrainer(
        LlamaForCausalLM(config),
        LlamaForSequenceClassification(config).eval(),
        ReMaxConfig(
            batch_size=options.batch_size,
            max_completion_length=options.completion_length,
            max_prompt_length=options.prompt_length,
            max_steps=1000,
            report_to=["none"],
            bf16=options.bf16,
            **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": tokenizer.decode(row)} for row in ids.tolist()]),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        view=PlainLines(),
    )
    trainer.parts.sampling = replace(trainer.parts.sampling, eos_token_ids=())
    return trainer


def one_step(trainer: ReMaxTrainer, step: int) -> dict[str, float]:
    """Returns the seconds of one step, by phase and in all."""
    trainer.meter.clear()
    started = time.perf_counter()
    trainer.step(trainer.order.batch(1), step)
    return {**trainer.meter.seconds, "step": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--completion_length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    trainers = {name: make_trainer(options, settings) for name, settings in METHODS.items()}
    flops = {}
    for name, trainer in trainers.items():
        counter: Any = FlopCounterMode(display=False, custom_mapping=UNKNOWN_OPERATIONS)
        counter.mod_tracker = _OneModule()
        with counter:
            one_step(trainer, 1)
        flops[name] = counter.get_total_flops()
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    for round_number in range(options.rounds):
        for name, trainer in trainers.items():
            seconds[name].append(one_step(trainer, 2 + round_number))

    methods = {}
    print(
        f"{'':16}{'s/step':>8}{'rollout':>9}{'reward':>8}{'update':>8}{'GFLOP':>9}{'time ratio':>12}{'predicted':>11}"
    )
    for name, measured in seconds.items():
        ratios = [own["step"] / base["step"] for own, base in zip(measured, seconds["remax"], strict=True)]
        medians = {phase: statistics.median(m[phase] for m in measured) for phase in measured[0]}
        predicted = flops[name] / flops["remax"]
        ratio = statistics.median(ratios)
        methods[name] = {
            "seconds": medians,
            "flops": flops[name],
            "time_ratio_to_remax": ratio,
            "time_ratios_by_round": ratios,
            "flop_ratio_to_remax": predicted,
            "deviation": ratio / predicted - 1,
        }
        print(
            f"{name:16}{medians['step']:8.3f}{medians['rollout']:9.3f}{medians['reward']:8.3f}{medians['update']:8.3f}"
            f"{flops[name] / 1e9:9.1f}{ratio:12.2f}{predicted:11.2f}"
        )
    if options.output:
        parameters = sum(p.numel() for p in trainers["remax"].parts.policy.parameters())
        settings = {name: str(value) for name, value in vars(options).items() if name != "output"}
        result = {
            "command": "python benchmarks/step_time.py",
            "options": settings,
            "parameters": parameters,
            "hardware": hardware(),
            "versions": versions(),
            "methods": methods,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

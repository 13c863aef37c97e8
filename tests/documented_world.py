"""A small world under the very names that the documentation uses, so that its blocks run as they are written.

Models are random and tiny, texts are a few words; whoever loads `Qwen/Qwen2.5-0.5B-Instruct` or `trl-lib/tldr` beneath
such a folder gets them from there.
"""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForSequenceClassification, LlamaConfig

from remax.cli import main
from tiny_models import tiny_model
from toy_tokenizers import BOS, CHATML, END, EOS, PAD, VOCAB_SIZE, toy_tokenizer

EOS_WEIGHT = 48.0
"""With it a third of the samples end within four tokens."""
REPOSITORY = Path(__file__).resolve().parents[1]

POLICIES = (
    "sft/model",
    "rl/model",
    "models/tinystories-260k",
    "models/policy",
    "Qwen/Qwen2.5-0.5B",
    "meta-llama/Llama-2-7b-hf",
    "../shared/models/tinystories-260k",
)
CHAT_POLICIES = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct")
REWARD_MODELS = ("rm/model", "gold/model", "reward/model", "models/reward", "real/reward/model", "real/gold/model")

NAMES = ("cat", "dog", "hat", "cup", "sun", "bee", "oak", "sea")
WORDS = [f"{first} {name}" for first in ("a", "the", "one", "my", "our") for name in NAMES]
Rows = list[dict[str, Any]]


def _said(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def _split(verb: str) -> dict[str, Rows]:
    """Rows of every form about the same things; another verb gives other prompts."""
    prompts = [f"{verb} {words}" for words in WORDS]
    pairs = [{"prompt": p, "chosen": f" {w}.", "rejected": f" no {w}!"} for p, w in zip(prompts, WORDS, strict=True)]
    questions = [f"{verb} {n} and 1" for n in range(40)]
    return {
        "prompts": [{"prompt": prompt} for prompt in prompts],
        "answered": [{"prompt": prompt, "answer": str(n)} for n, prompt in enumerate(prompts)],
        "completed": [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs],
        "pairs": pairs,
        "chats": [{name: _said(pair["prompt"], pair[name]) for name in ("chosen", "rejected")} for pair in pairs],
        "messages": [{"prompt": _said(question)} for question in questions],
        "questions": [{"prompt": _said(q), "answer": str(n + 1)} for n, q in enumerate(questions)],
        "problems": [{"question": q, "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n, q in enumerate(questions)],
    }


SPLITS = {"train": _split("Say"), "test": _split("Draw"), "validation": _split("Sing")}
FILES = {
    "prompts.jsonl": SPLITS["train"]["answered"],
    "held_out_prompts.jsonl": SPLITS["test"]["answered"],
    "pairs.jsonl": SPLITS["train"]["pairs"],
    "held_out.jsonl": SPLITS["test"]["pairs"],
    "texts.jsonl": SPLITS["train"]["completed"],
    "before/completions.jsonl": SPLITS["test"]["completed"],
    "after/completions.jsonl": [{**row, "completion": " another one"} for row in SPLITS["test"]["completed"]],
    "rl.json": [{"instruction": p, "output": p, "generator": "rl"} for p in WORDS],
    "gpt4_outputs.json": [{"instruction": p, "output": p.upper(), "generator": "gpt4"} for p in WORDS],
}
DATASETS = {
    "trl-lib/tldr": "completed",
    "trl-lib/tldr-preference": "pairs",
    "trl-lib/ultrafeedback_binarized": "chats",
    "trl-lib/ultrafeedback-prompt": "messages",
    "Dahoas/rm-static": "pairs",
    "openai/gsm8k": "problems",
    "data": "questions",
    "openings": "prompts",
    "real/openings": "prompts",
    "pairs": "pairs",
}
"""Folders with a file for every split, and what is in them."""

REWARDS = '''"""Rewards, as the pages call them."""


def brevity(completions, **columns):
    return [-len(text) / 100 for text in completions]


def correct(completions, answer, **columns):
    return [float(right in str(text)) for text, right in zip(completions, answer)]


def kind(completions, **columns):
    return [float(text.count("kind") + text.count("e")) for text in completions]
'''
RUN = {
    "model": "sft/model",
    "reward_model": "rm/model",
    "train_dataset": "prompts.jsonl",
    "eval_dataset": "held_out_prompts.jsonl",
    "gold_reward_model": "gold/model",
    "output_dir": "OUT",
    "max_completion_length": 4,
    "learning_rate": 1e-3,
    "max_steps": 2,
    "batch_size": 4,
    "num_eval_prompts": 4,
    "eval_steps": 2,
    "save_steps": 1,
    "report_to": ["none"],
}
COMPARE = {
    "model": "sft/model",
    "reward_model": "rm/model",
    "train_dataset": "prompts.jsonl",
    "eval_dataset": "held_out_prompts.jsonl",
    "methods": {"remax": {}, "rloo": {"num_generations": 4}},
}
ACCELERATE = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2}
SETTINGS = {"run.yaml": RUN, "compare.yaml": COMPARE, "my.yaml": ACCELERATE, "fsdp2.yaml": ACCELERATE}
MATH_VERIFY = '''"""Stands in for math-verify where that is not installed: answers are numbers."""

import re


class LatexExtractionConfig:
    def __init__(self, **settings): ...


class ExprExtractionConfig(LatexExtractionConfig): ...


def parse(text, extraction_config=()):
    return re.findall(r"-?[0-9.]+", text)[-1:]


def verify(gold, given):
    return gold == given
'''
REASONING_GYM = '''"""Stands in for reasoning-gym where that is not installed: sums."""

import types


def create_dataset(name, size, seed, datasets):
    for n in range(300):
        question = {"question": f"{seed} + {n} = ?", "answer": str(seed + n)}
        yield {**question, "metadata": {"source_dataset": datasets[0]["name"]}}


def get_score_answer_fn(name):
    return lambda answer, entry: float(answer == entry["answer"])


composite = types.SimpleNamespace(DatasetSpec=dict)
'''
PACKAGES = {
    "math_verify": {"math_verify.py": MATH_VERIFY},
    "reasoning_gym": {
        "reasoning_gym/__init__.py": REASONING_GYM,
        "reasoning_gym/utils.py": "def extract_answer(text):\n    return text.strip()\n",
    },
}
"""What examples import: files in the folder that they run in, where the package is missing."""


def make_world(folder: Path) -> None:
    """Fills an empty folder `here` beneath folder, and what pages find beside it."""
    here = folder / "here"
    here.mkdir(parents=True)
    model = _policy()
    kept = ("architectures", "id2label", "label2id", "num_labels")
    config = LlamaConfig(**{k: v for k, v in model.config.to_dict().items() if k not in kept}, num_labels=1)
    config.pad_token_id = PAD
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reward_model = AutoModelForSequenceClassification.from_config(config)
        reward_model.score.weight.data.neg_()  # It prefers what was chosen, which the doctor looks for.
    for names, own, template in (
        (POLICIES, model, None),
        (REWARD_MODELS, reward_model, CHATML),
        (CHAT_POLICIES, model, CHATML),
    ):
        if names is CHAT_POLICIES:
            model.generation_config.eos_token_id = [EOS, END]
        for name in names:
            own.save_pretrained(here / name)
            toy_tokenizer("<s> $A", bos_token="<s>", chat_template=template).save_pretrained(here / name)
    for name, rows in FILES.items():
        _write(here / name, rows)
    for name, kind in DATASETS.items():
        for split, rows in SPLITS.items():
            _write(here / name / f"{split}.jsonl", rows[kind])
    splits = [{"split": split, "path": f"{split}.jsonl"} for split in SPLITS]
    card = yaml.safe_dump({"configs": [{"config_name": "main", "data_files": splits}]})
    (here / "openai/gsm8k/README.md").write_text(f"---\n{card}---\n")
    _write(here / "pairs" / "gold_train.jsonl", SPLITS["validation"]["pairs"])
    (here / "rewards.py").write_text(REWARDS)
    for name, settings in SETTINGS.items():
        (here / name).write_text(yaml.safe_dump(settings, sort_keys=False))
    for name in ("benchmarks", "examples"):
        shutil.copytree(REPOSITORY / name, here / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    _make_runs(here)


def _policy() -> Any:
    """A model that ends its completions after a few tokens, as one does that was fine-tuned."""
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, max_position_embeddings=4096, bos_token_id=BOS, eos_token_id=EOS)
    with torch.no_grad():  # No layer writes into the first coordinate, and only the logit of EOS reads it.
        model.model.embed_tokens.weight[:, 0] = 8.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight.mul_(0.5)
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[EOS, 0] = EOS_WEIGHT
    model.generation_config.eos_token_id = EOS
    return model


def _make_runs(here: Path) -> None:
    """Trains for two steps, so that there are runs with metrics, evaluations and checkpoints."""
    before = Path.cwd()
    os.chdir(here)
    try:
        assert main(["train", "--config", "run.yaml"]) == 0
    finally:
        os.chdir(before)
    shutil.rmtree(here / "rl")
    for name in ("rl", "OUT2"):
        shutil.copytree(here / "OUT", here / name)


def enter_world(world: Path, folder: Path, example: Path | None = None) -> Path:
    """Makes a world like that one and returns the place in it to work in; with an example, a copy of that is there.

    Runs, data and files are copies. Folders that are only read are the world's own, see `contents`.
    """
    here = folder / "here"
    here.mkdir(parents=True)
    (folder / "shared").symlink_to(world / "shared")
    for path in (world / "here").iterdir():
        if not path.is_dir():
            shutil.copy(path, here)
        elif path.name in COPIED:
            shutil.copytree(path, here / path.name)
        else:
            (here / path.name).symlink_to(path)
    if example is not None:
        shutil.copytree(example, here, dirs_exist_ok=True)
        for package, files in PACKAGES.items():
            for name, text in files.items() if find_spec(package) is None else ():
                (here / name).parent.mkdir(exist_ok=True)
                (here / name).write_text(text)
    return here


COPIED = ("OUT", "OUT2", "rl", "data", "openings", "pairs")


def contents(world: Path) -> dict[str, float]:
    """Returns all paths of a world and when they were changed: what pages share has to stay as it is."""
    return {str(path): path.stat().st_mtime for path in world.rglob("*")}


def _write(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")

"""Recipes: settings of `remax train` that belong together, for `remax init` and for the examples."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One training as it is meant to be run."""

    summary: str
    """What it does, in a line."""
    before: str
    """What has to be there first, and where the settings come from."""
    settings: dict[str, Any]
    """Those that differ from the defaults, by the names of the flags."""
    command: str = "remax train --config"
    """What its file is given to."""


RECIPES = {
    "sentiment": Recipe(
        "Steer a small story model with a reward model trained on film reviews; minutes on a CPU.",
        """model is a small story model in Hugging Face format (tinystories-260k), reward/model and gold/model come
        from `remax reward` on two disjoint sets of pairs of a positive and a negative sentence, and the
        prompts are openings of stories; docs/sentiment.md tells what came of it.""",
        {
            "model": "models/tinystories-260k",
            "train_dataset": "openings/train.jsonl",
            "reward_model": "reward/model",
            "eval_dataset": "openings/test.jsonl",
            "gold_reward_model": "gold/model",
            "output_dir": "policy",
            "logging_steps": 10,
            "max_completion_length": 64,
            "beta": 0.1,
            "max_steps": 100,
            "learning_rate": 3e-4,
        },
    ),
    "rlhf-7b": Recipe(
        "The paper's Llama-2-7B on pairs of helpful and harmless answers, with the settings of the authors' code.",
        """sft/model comes from `remax sft` and reward/model from `remax reward`, both from meta-llama/Llama-2-7b-hf
        with learning rate 1e-5, a cosine schedule and 2 epochs; the data (Dahoas/rm-static) is split
        2:4:4 over fine-tuning, reward model and this training, whose prompts are data/rl.jsonl. Source:
        Li et al., arXiv 2310.10505, and the authors' script for Llama-2-7B; their top_p of 0.9 in
        sampling is left out, since their gradient ignores it.""",
        {
            "model": "sft/model",
            "train_dataset": "data/rl.jsonl",
            "reward_model": "reward/model",
            "eval_dataset": "data/rl_test.jsonl",
            "output_dir": "rl",
            "max_prompt_length": 256,
            "max_completion_length": 256,
            "beta": 0.05,
            "kl_mode": "one_step",
            "gamma": 0.99,
            "loss_aggregation": "token",
            "reward_clip": 5.0,
            "reward_clip_mode": "difference",
            "num_train_epochs": 1.0,
            "learning_rate": 1e-6,
            "lr_scheduler_type": "cosine",
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "max_grad_norm": 1.0,
            "bf16": True,
            "gradient_checkpointing": True,
        },
    ),
    "gsm8k": Recipe(
        "Qwen2.5-0.5B on grade-school mathematics, with a reward that checks the answer.",
        """data/train.jsonl and data/test.jsonl are GSM8K with the question as a column prompt (one message of a
        user) and the number that is right as a column answer; rewards.py has a function
        correct(completions, answer, **columns), which gives 1.0 where a completion's answer is that
        number, and 0.0 elsewhere.""",
        {
            "model": "Qwen/Qwen2.5-0.5B-Instruct",
            "train_dataset": "data/train.jsonl",
            "reward_funcs": ["rewards.py:correct"],
            "eval_dataset": "data/test.jsonl",
            "output_dir": "gsm8k",
            "max_prompt_length": 256,
            "system_prompt": "Reason step by step, and put your final answer into \\boxed{}.",
            "max_completion_length": 512,
            "beta": 0.005,
            "batch_size": 64,
            "eval_steps": 50,
            "max_steps": 300,
            "learning_rate": 1e-6,
            "warmup_steps": 10,
            "bf16": True,
            "gradient_checkpointing": True,
        },
    ),
    "summarise": Recipe(
        "Summaries of forum posts (TL;DR) with a reward model trained on people's preferences.",
        """sft/model comes from `remax sft --train_dataset trl-lib/tldr`, reward/model from `remax reward
        --train_dataset trl-lib/tldr-preference`, both from a small model such as Qwen/Qwen2.5-0.5B.
        Longer summaries please reward models: watch completions/mean_length, and compare with `remax
        winrate`, which controls for length.""",
        {
            "model": "sft/model",
            "train_dataset": "trl-lib/tldr",
            "reward_model": "reward/model",
            "eval_dataset": "trl-lib/tldr",
            "output_dir": "summaries",
            "eval_split": "validation",
            "max_prompt_length": 512,
            "max_completion_length": 64,
            "beta": 0.05,
            "batch_size": 64,
            "eval_steps": 50,
            "max_steps": 400,
            "learning_rate": 1e-6,
            "warmup_steps": 10,
            "bf16": True,
            "gradient_checkpointing": True,
        },
    ),
    "lora-24gb": Recipe(
        "A LoRA adapter for Qwen2.5-7B, with a reward model beside it, on one card of 24 GB.",
        """The prompts are messages, and reward/model is a reward model of at most half a billion weights with a
        chat template, from `remax reward --model Qwen/Qwen2.5-0.5B-Instruct --train_dataset
        trl-lib/ultrafeedback_binarized`. Weights are held in bfloat16; the reference is the same model
        with the adapter off, so it takes no memory. `remax plan --config` with this file and
        --device_memory 24GB tells what it takes, and what other sizes would.""",
        {
            "model": "Qwen/Qwen2.5-7B-Instruct",
            "train_dataset": "trl-lib/ultrafeedback-prompt",
            "reward_model": "reward/model",
            "eval_dataset": "trl-lib/ultrafeedback-prompt",
            "output_dir": "lora",
            "max_prompt_length": 512,
            "max_completion_length": 512,
            "rollout_batch_size": 32,
            "micro_batch_tokens": 4096,
            "beta": 0.05,
            "batch_size": 32,
            "max_steps": 300,
            "learning_rate": 1e-5,
            "warmup_steps": 10,
            "dtype": "bfloat16",
            "bf16": True,
            "gradient_checkpointing": True,
            "use_peft": True,
            "lora_r": 32,
            "lora_alpha": 64,
        },
    ),
    "reasoning-gym": Recipe(
        "Qwen2.5-0.5B on puzzles that are generated and checked by reasoning-gym: no prompt comes twice.",
        """data/train.jsonl and data/test.jsonl have generated questions as a column prompt (one message of a user)
        and, in a column entry, what reasoning-gym needs to check an answer; rewards.py has a function
        solved(completions, entry, **columns), which gives its score, from 0.0 to 1.0.""",
        {
            "model": "Qwen/Qwen2.5-0.5B-Instruct",
            "train_dataset": "data/train.jsonl",
            "reward_funcs": ["rewards.py:solved"],
            "eval_dataset": "data/test.jsonl",
            "output_dir": "puzzles",
            "max_prompt_length": 512,
            "system_prompt": "Think step by step, and put your final answer between <answer> and </answer>.",
            "max_completion_length": 512,
            "beta": 0.005,
            "batch_size": 64,
            "eval_steps": 50,
            "num_train_epochs": 1.0,
            "learning_rate": 1e-6,
            "warmup_steps": 10,
            "bf16": True,
            "gradient_checkpointing": True,
        },
    ),
    "several-rewards": Recipe(
        "A reward model and two functions with weights: happy stories that neither repeat themselves nor break off.",
        """model, reward/model and the openings are those of the recipe sentiment; rewards.py has the functions
        variety and ending. The sum of the weighted rewards is what is maximised; each of them has a curve
        of its own in the report.""",
        {
            "model": "models/tinystories-260k",
            "train_dataset": "openings/train.jsonl",
            "reward_model": "reward/model",
            "reward_funcs": ["rewards.py:variety", "rewards.py:ending"],
            "reward_weights": [1.0, 4.0, 2.0],
            "eval_dataset": "openings/test.jsonl",
            "output_dir": "several",
            "logging_steps": 10,
            "max_completion_length": 64,
            "beta": 0.1,
            "max_steps": 100,
            "learning_rate": 3e-4,
        },
    ),
    "reward-server": Recipe(
        "A reward that another process or machine computes: the recipe sentiment with its reward model served.",
        """model and the openings are those of the recipe sentiment, and `remax serve-reward reward/model` runs in
        another terminal or on another machine, with the same REMAX_REWARD_TOKEN in the environment if it
        has one; docs/reward-server.md has the protocol, for servers of your own.""",
        {
            "model": "models/tinystories-260k",
            "train_dataset": "openings/train.jsonl",
            "reward_url": "http://127.0.0.1:8000",
            "eval_dataset": "openings/test.jsonl",
            "output_dir": "served",
            "reward_timeout_seconds": 60.0,
            "logging_steps": 10,
            "max_completion_length": 64,
            "beta": 0.1,
            "max_steps": 100,
            "learning_rate": 3e-4,
        },
    ),
    "custom-engine": Recipe(
        "The recipe sentiment with a rollout engine of your own, from a short Python script.",
        """model, reward/model and the openings are those of the recipe sentiment. `remax train` reads this file too,
        but an engine is an argument of ReMaxTrainer: train.py passes one, and takes everything else from
        here.""",
        {
            "model": "models/tinystories-260k",
            "train_dataset": "openings/train.jsonl",
            "reward_model": "reward/model",
            "eval_dataset": "openings/test.jsonl",
            "output_dir": "custom",
            "logging_steps": 10,
            "max_completion_length": 64,
            "beta": 0.1,
            "max_steps": 100,
            "learning_rate": 3e-4,
        },
        command="python train.py",
    ),
}

"""Folders such as `remax train` leaves, with figures that tests know."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

VERSIONS = {"python": "3.12.0", "torch": "2.13.0", "remax-rlhf": "0.1.0"}


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def metrics_of(step: int, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {
        "step": step,
        "reward": 0.1 * step,
        "reward/greedy": 0.1 * step + 0.05,
        "reward/missing_fraction": 0.0,
        "rewards/length/mean": 0.05 * step,
        "rewards/style/mean": 0.05 * step,
        "kl": 0.5 * step,
        "entropy": 2.0 - 0.01 * step,
        "grad_norm": 3.0,
        "gradient/zero_signal_fraction": 0.25,
        "completions/mean_length": 10.0 + step,
        "completions/greedy_mean_length": 11.0 + step,
        "completions/clipped_ratio": 0.5,
        "time/rollout": 1.0,
        "time/reward": 0.5,
        "time/update": 0.25,
        "time/step": 2.0,
        "memory/rollout": 3 * 2**20,
        "memory/update": 5 * 2**20,
        "skipped_steps": 0,
        **more,
    }


def held_out(step: int, index: int, **more: Any) -> dict[str, Any]:
    """A line of eval_completions.jsonl: prompt 0 gains 1 reward a step, prompt 1 gains 2, and so on."""
    reward = step * (index + 1.0) + index
    return {
        "step": step,
        "prompt_index": index,
        "prompt": f"Question {index}",
        "completion": f"the cat number {index} sat for {step} steps",
        "greedy_completion": f"a cat sat {step}",
        "length": 7 + index,
        "truncated": False,
        "values": {"reward": reward, "reward/greedy": reward - 0.5, "gold": -reward, "gold/greedy": 0.0, "kl": step},
        **more,
    }


def sampled(step: int, index: int, **more: Any) -> dict[str, Any]:
    """A line of completions.jsonl."""
    return {
        "step": step,
        "prompt_index": index,
        "sample_index": 0,
        "prompt": f"Training question {index}",
        "completion": f"answer {index} of step {step}",
        "greedy_completion": f"greedy answer {index}",
        "reward": float(step + index),
        "greedy_reward": 1.0,
        "advantage": 0.0,
        "length": 5,
        "truncated": True,
        **more,
    }


def write_run(folder: Path, *, steps: int = 4, prompts: int = 3, ended: bool = True, **config: Any) -> Path:
    """A run with evaluations before training, after every second step and at the end."""
    folder.mkdir(parents=True)
    write_lines(folder / "metrics.jsonl", [metrics_of(step) for step in range(1, steps + 1)])
    evaluated = [step for step in range(steps + 1) if step % 2 == 0 or step == steps]
    lines = [held_out(step, prompt) for step in evaluated for prompt in range(prompts)]
    write_lines(folder / "eval_completions.jsonl", lines)
    means = []
    for step in evaluated:
        own = [line["values"] for line in lines if line["step"] == step]
        means.append({"step": step} | {f"eval/{n}": sum(v[n] for v in own) / prompts for n in own[0]})
    write_lines(folder / "eval.jsonl", means)
    write_lines(folder / "completions.jsonl", [sampled(s, p) for s in range(1, steps + 1) for p in range(prompts)])
    settings = {"method": "remax", "max_steps": steps, "learning_rate": 1e-3, "reward_funcs": []}
    settings |= {
        "reward_model": "rm/model",
        "gold_reward_model": "gold/model",
        "eval_dataset": "held_out.jsonl",
        **config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    start = {"step": 0, "date": "2026-01-02T03:04:05+00:00", "command": "remax train --model M", "num_processes": 1}
    start |= {
        "directory": str(folder.parent),
        "versions": VERSIONS,
        "hardware": {"cpu": "A CPU", "gpus": ["A GPU", "A GPU"]},
        "commit": "abc123",
    }
    (folder / "provenance.json").write_text(json.dumps({"starts": [start]}), encoding="utf-8")
    if ended:
        (folder / "model").mkdir()
    return folder

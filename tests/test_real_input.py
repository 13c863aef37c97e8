"""The pipeline on a real pretrained model and real preference data, shrunk; needs the folder ../shared."""

import json
import subprocess
import sys
from pathlib import Path

from remax.cli import main

OPENINGS = Path(__file__).parents[1] / "examples" / "sentiment" / "openings.py"


def test_a_reward_model_from_human_labels_steers_a_story_model(shared: Path, tinystories: Path, tmp_path: Path) -> None:
    """A reward model on film reviews, then ReMax on story openings: the learned reward of held-out stories rises."""
    subprocess.run([sys.executable, str(OPENINGS), str(tmp_path)], check=True)
    pairs = (shared / "data" / "sentiment" / "train.jsonl").read_text().splitlines()
    held_out = (shared / "data" / "sentiment" / "test.jsonl").read_text().splitlines()
    short = [pair for pair in pairs if len(pair) < 260][:960]
    (tmp_path / "pairs.jsonl").write_text("\n".join(short))
    (tmp_path / "held_out.jsonl").write_text("\n".join(sorted(held_out, key=len)[:100]))

    reward = ["reward", "--model", tinystories, "--train_dataset", tmp_path / "pairs.jsonl"]
    reward += ["--eval_dataset", tmp_path / "held_out.jsonl", "--output_dir", tmp_path / "reward"]
    reward += ["--max_steps", 60, "--batch_size", 16, "--learning_rate", 2e-3, "--report_to", "none"]
    assert main([str(part) for part in reward]) == 0
    quality = json.loads((tmp_path / "reward" / "eval.json").read_text())
    assert quality["num_pairs"] == 100

    train = ["train", "--model", tinystories, "--reward_model", tmp_path / "reward" / "model"]
    train += ["--train_dataset", tmp_path / "train.jsonl", "--eval_dataset", tmp_path / "test.jsonl"]
    train += ["--num_eval_prompts", 64, "--output_dir", tmp_path / "policy", "--max_steps", 20, "--batch_size", 16]
    train += ["--max_completion_length", 32, "--learning_rate", 1e-3, "--beta", 0.02, "--report_to", "none"]
    train += ["--reward_weights", 10]  # after so few steps the reward model tells stories apart by tenths
    assert main([str(part) for part in train]) == 0
    before, after = (json.loads(line) for line in (tmp_path / "policy" / "eval.jsonl").read_text().splitlines())
    assert after["eval/reward"] > before["eval/reward"] + 0.5
    assert before["eval/kl"] == 0 or abs(before["eval/kl"]) < 1e-4
    assert after["eval/kl"] > 0.1
    records = [json.loads(line) for line in (tmp_path / "policy" / "completions.jsonl").read_text().splitlines()]
    assert len(records) == 20 * 16
    assert any(record["completion"].startswith(" ") for record in records), "the space after the prompt is kept"

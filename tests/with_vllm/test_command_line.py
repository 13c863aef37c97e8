"""`remax train` with the real vLLM as it is typed: in one process, in two, and with a server; each ends in peace."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it in an environment of its own")

from toy_tokenizers import toy_tokenizer
from toy_training import PROMPTS, policy, read

pytestmark = pytest.mark.slow
GAP, LARGEST = "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"
RATIO = "sampling/importance_sampling_ratio"
REWARD = "def vowels(completions, **_):\n    return [sum(c in 'aeiou' for c in text) / 4 for text in completions]\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of a shape that vLLM's kernels take, prompts and a reward."""
    folder = tmp_path_factory.mktemp("typed")
    policy(head_dim=64, hidden_size=128).save_pretrained(folder / "model")
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (folder / "rewards.py").write_text(REWARD)
    return folder


def train(world: Path, name: str, *flags: str) -> list[dict[str, Any]]:
    """Returns the metrics of a training that has ended without a word of trouble."""
    words = f"""train --model model --reward_funcs rewards.py:vowels --train_dataset prompts.jsonl --output_dir {name}
        --max_steps 3 --batch_size 8 --num_generations 2 --max_prompt_length 32 --max_completion_length 16
        --learning_rate 3e-3 --beta 0.1 --rollout_engine vllm --report_to none""".split()
    command = [sys.executable, "-m", "remax", *words, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=world, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr, result.stderr
    assert f"The trained model is in {name}/model." in result.stdout
    return read(world / name / "metrics.jsonl")


@pytest.fixture(scope="module")
def alone(world: Path) -> list[dict[str, Any]]:
    return train(world, "alone")


def row(mode: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a row of the table; the model's embeddings are not tied."""
    return {
        "mode": mode,
        "embeddings": "untied",
        "steps": len(lines),
        "largest mean gap (nats)": f"{max(line[GAP] for line in lines):.1e}",
        "largest gap of a token": f"{max(line[LARGEST] for line in lines):.1e}",
        "importance ratios": f"{min(line[f'{RATIO}/min'] for line in lines):.5f} to "
        f"{max(line[f'{RATIO}/max'] for line in lines):.5f}",
    }


def assert_like(lines: list[dict[str, Any]], alone: list[dict[str, Any]]) -> None:
    names = ["reward", "reward/greedy", "completions/mean_length", "loss", "kl", "grad_norm"]
    assert len(lines) == 3
    for ours, theirs in zip(lines, alone, strict=True):
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-3, abs=1e-5)
        assert 0 < ours[LARGEST] < 1e-3


def test_in_one_process(alone, figures):
    assert [line["num_processes"] for line in alone] == [1, 1, 1]
    assert all(0 < line[LARGEST] < 1e-3 for line in alone)
    figures.append(row("`remax train`, colocate", alone))


def test_in_two_processes_each_with_an_engine(world, alone, figures):
    lines = train(world, "two", "--accelerate_config", "ddp", "--num_processes", "2")
    assert [line["num_processes"] for line in lines] == [2, 2, 2]
    assert_like(lines, alone)
    figures.append(row("`remax train`, colocate in two processes", lines))


def test_with_a_server(world, alone, serve, figures):
    server = serve(policy(head_dim=64, hidden_size=128))
    lines = train(world, "served", "--vllm_mode", "server", "--vllm_server_base_url", server.url)
    assert_like(lines, alone)
    server.end()
    assert "Traceback" not in server.log.read_text()
    figures.append(row("`remax train`, server", lines))

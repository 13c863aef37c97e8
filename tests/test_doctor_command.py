"""`remax doctor` from the command line: the whole table, the exit codes, and what `remax train` says by itself."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from doctor_checks import TEXTS, write_lines
from remax.cli import main
from remax.config import DoctorOptions, ReMaxConfig, TrainInputs
from remax.doctor import machine, quick_warnings
from remax.doctor.command import CHECKS
from remax.doctor.context import Context
from remax.flags import parse
from toy_tokenizers import EOS, PAD, toy_tokenizer
from toy_training import policy

REWARD_FILE = """
def lively(completions, **kwargs):
    return [sum(map(ord, text)) % 17 / 8 for text in completions]

def broken(completions, **kwargs):
    raise RuntimeError("\\x1b[31mno")
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy that ends its completions, a reward model, data, pairs and functions."""
    folder = tmp_path_factory.mktemp("world")
    tokens, model = toy_tokenizer("<s> $A", bos_token="<s>"), policy(eos_token_id=EOS)
    with torch.no_grad():  # every now and then the likeliest token
        weight = model.lm_head.weight
        weight[EOS] = 2.0 * weight[40]
    model.save_pretrained(folder / "policy")
    tokens.save_pretrained(folder / "policy")
    settings = {**model.config.to_dict(), "num_labels": 1, "pad_token_id": PAD, "architectures": None}
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(LlamaConfig(**settings)).save_pretrained(folder / "reward")
    tokens.save_pretrained(folder / "reward")
    write_lines(folder / "train.jsonl", TEXTS)
    write_lines(folder / "eval.jsonl", [{"prompt": f"held out {c}"} for c in "abcd"])
    write_lines(
        folder / "pairs.jsonl", [{"chosen": f"{a}{b} fine", "rejected": f"{b}{a} bad!"} for a in "abcd" for b in "ef"]
    )
    (folder / "rewards.py").write_text(REWARD_FILE)
    return folder


def flags(world: Path, out: Path, **changes: Any) -> list[str]:
    given = {
        "model": world / "policy",
        "reward_funcs": f"{world / 'rewards.py'}:lively",
        "train_dataset": world / "train.jsonl",
        "eval_dataset": world / "eval.jsonl",
        "output_dir": out / "run",
        "batch_size": 4,
        "max_completion_length": 32,
        **changes,
    }
    return [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]


def read_json(path: Path) -> dict[str, Any]:
    report = json.loads(path.read_text())
    return {own["check"]: own["status"] for own in report["findings"]}


def test_a_sound_set_up_exits_with_0_and_writes_nothing_but_the_report(
    world: Path, tmp_path: Path, capsys: Any
) -> None:
    report = tmp_path / "report.json"
    pairs = world / "pairs.jsonl"
    more = ["--json", str(report), "--pairs", str(pairs), "--reward_weights", "1", "1"]
    assert main(["doctor", *flags(world, tmp_path, reward_model=world / "reward"), *more]) == 0
    found = read_json(report)
    assert "fail" not in found.values()
    assert found["stopping"] in ("pass", "warn")
    passing = {"versions", "EOS", "vocabulary", "prompt lengths", "leakage", "memory", "reward batch", "reward padding"}
    assert {name: found[name] for name in (*passing, "reward order", "reward position", "log probabilities")} == (
        dict.fromkeys((*passing, "reward order", "reward position", "log probabilities"), "pass")
    )
    out = capsys.readouterr().out
    assert "0 failed" in out
    assert all(name in out for name in found)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_fault_exits_with_2_and_later_checks_go_on(world: Path, tmp_path: Path, capsys: Any) -> None:
    report = tmp_path / "report.json"
    broken = flags(world, tmp_path, reward_funcs=f"{world / 'rewards.py'}:broken", json=report)
    with pytest.raises(SystemExit) as stopped, pytest.warns(UserWarning, match="broken raised"):
        main(["doctor", *broken])
    assert stopped.value.code == 2
    found = read_json(report)
    assert found["rewards"] == "fail"
    assert found["log probabilities"] == "pass"
    captured = capsys.readouterr()
    assert "1 failed" in captured.out
    assert "remax:" not in captured.err
    assert "\x1b" not in captured.out


def test_exit_code_of_the_process_where_nothing_can_be_loaded(tmp_path: Path) -> None:
    """Every check has its row, there is no traceback, and what needed the missing parts says so."""
    command = [sys.executable, "-m", "remax", "doctor", "--model", "./nothing", "--reward_funcs", "no.py:f"]
    command += ["--train_dataset", "no.jsonl", "--json", "report.json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert "remax:" not in result.stderr
    found = read_json(tmp_path / "report.json")
    assert found["EOS"] == "fail"
    assert found["prompt lengths"] == "fail"
    assert found["versions"] == "pass"
    assert found["stopping"] == "skip"
    assert result.stdout.count("there is no such folder") == 2, "in the first row that needs it, and for its weights"
    assert len(found) > len(CHECKS) / 2


def test_a_wrong_flag_is_one_sentence(world: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["doctor", *flags(world, tmp_path, num_prompts=0)]) == 2
    assert "remax: --num_prompts is 0" in capsys.readouterr().err
    assert main(["doctor", *flags(world, tmp_path, json=tmp_path / "no" / "report.json")]) == 2
    assert "remax: --json is" in capsys.readouterr().err


def test_train_prints_what_looks_wrong_and_goes_on(world: Path, tmp_path: Path, capsys: Any) -> None:
    leaking = flags(world, tmp_path, eval_dataset=world / "train.jsonl", max_steps=1, report_to="none")
    assert main(["train", *leaking]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("doctor: ")]
    assert len(lines) == 1
    assert "16 of 16 prompts of --eval_dataset (100.0%) are in --train_dataset" in lines[0]
    context = Context(*parse("", "", (TrainInputs, ReMaxConfig), leaking, example=""), DoctorOptions(), list)
    predicted = machine._written(context)
    files = [file for file in (tmp_path / "run").rglob("*") if file.suffix in (".safetensors", ".pt")]
    sizes = {name: sum(f.stat().st_size for f in files if name in f.parts) for name in ("model", "checkpoints")}
    headers = 2**15  # of tensors' names, and random generators
    assert predicted["model"] <= sizes["model"] < predicted["model"] + headers
    assert predicted["1 checkpoint"] <= sizes["checkpoints"] < predicted["1 checkpoint"] + headers


def test_what_train_checks_takes_well_under_a_second(world: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"a prompt of about twenty words that is number {i} of so many" + " word" * 9} for i in range(10_000)
    ]
    inputs = TrainInputs(
        model=str(world / "policy"),
        train_dataset=write_lines(tmp_path / "train.jsonl", rows),
        eval_dataset=write_lines(tmp_path / "eval.jsonl", rows[:1]),
        reward_funcs=["a.py:f"],
    )
    seconds = []
    for _ in range(3):
        started = time.process_time()
        lines = quick_warnings(inputs, ReMaxConfig(max_completion_length=64))
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1.0
    assert len(lines) == 1


def test_on_a_real_model_and_real_data(shared: Path, tinystories: Path, world: Path, tmp_path: Path) -> None:
    """A story model that was never taught EOS: that is found, and nothing else fails."""
    openings = [{"prompt": f"Once upon a time there was a {animal}"} for animal in ("cat", "dog", "fox", "bird") * 2]
    found_in = tmp_path / "report.json"
    data = shared / "data" / "sentiment" / "test.jsonl"
    given = flags(
        world,
        tmp_path,
        model=tinystories,
        train_dataset=write_lines(tmp_path / "openings.jsonl", openings),
        eval_dataset=None,
        pairs=data,
        json=found_in,
    )
    with pytest.raises(SystemExit):
        main(["doctor", *given])
    found = read_json(found_in)
    assert [name for name, status in found.items() if status == "fail"] == ["stopping"]
    assert found["duplicates"] == "warn"
    assert found["log probabilities"] == "pass"

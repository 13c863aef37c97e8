"""Starting a training in several processes: real ones, through `remax train --accelerate_config`, on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from remax import launch, launched
from remax.cli import main
from remax.config import LaunchOptions, ReMaxConfig
from remax.errors import GuardStop, Interrupted, UserError
from tiny_models import tiny_model
from toy_tokenizers import EOS, VOCAB_SIZE, toy_tokenizer

REWARDS = """
import time

def length(completions, **kwargs):
    return [float(len(text)) for text in completions]

def slow(completions, **kwargs):
    time.sleep(0.3)
    return length(completions)
"""
no_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="says what holds without a GPU")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, eos_token_id=EOS)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder / "policy")
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(folder / "policy")
    prompts = [{"prompt": f"{a} {b}"} for a in "abcd" for b in ("cat", "dog")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def command(world: Path, out: Path, **changes: Any) -> list[str]:
    """Returns a small training's command line, of two processes unless changed; None leaves a flag out."""
    flags = {
        "model": world / "policy",
        "reward_funcs": f"{world / 'rewards.py'}:length",
        "train_dataset": world / "prompts.jsonl",
        "output_dir": out,
        "max_steps": 1,
        "batch_size": 4,
        "max_completion_length": 4,
        "report_to": "none",
        "reward_timeout_seconds": 0,  # functions run in the process itself, without one of their own
        "accelerate_config": "ddp",
        "num_processes": 2,
        **changes,
    }
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "remax", "train", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(words: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment(), check=False)


def metrics(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# Real processes -------------------------------------------------------------------------------------------------------


def test_two_processes_train_together(world: Path, tmp_path: Path) -> None:
    done = run(command(world, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (line,) = metrics(tmp_path / "out")
    assert line["num_processes"] == 2
    assert sum(text.startswith("step 1/1") for text in done.stdout.splitlines()) == 1, "one process tells"
    assert (tmp_path / "out" / "model" / "config.json").exists()


def test_a_mistake_is_one_sentence_and_its_exit_code_comes_through(world: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(launch._path("ddp").read_text())
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**config, "mixed_precision": "bf16", "main_process_port": 0}))
    done = run(command(world, tmp_path / "out", accelerate_config=tmp_path / "own.yaml"))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "remax: mixed_precision is bf16 in the Accelerate config: --bf16 decides on that; set the flag, and 'no' there."
    ]
    assert not done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_stops_all_is_told_once(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text("def some(completions, **_):\n    return [1.0, *[None] * len(completions)][:-1]\n")
    done = run(command(world, tmp_path / "out", reward_funcs=f"{path}:some", max_missing_rewards=0.1))
    assert done.returncode == 3, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("remax: ")]
    assert "completions have no reward, more than --max_missing_rewards 0.1" in told
    assert "process" not in told


@pytest.mark.slow
def test_more_processes_than_prompts(world: Path, tmp_path: Path) -> None:
    done = run(command(world, tmp_path / "out", batch_size=1))
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("remax: ")]
    assert "--batch_size is 1: 2 processes share the prompts" in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["torch.distributed.run --standalone --nproc_per_node 2", "accelerate"])
def test_other_launchers(world: Path, tmp_path: Path, starter: str) -> None:
    words = command(world, tmp_path / "out", accelerate_config=None, num_processes=None)
    if starter == "accelerate":
        path = launch._path("ddp")
        starter = f"accelerate.commands.launch --config_file {path} --num_processes 2 --main_process_port 0"
    done = run([sys.executable, "-m", *starter.split(), *words[1:]])
    assert done.returncode == 0, done.stderr
    assert [line["num_processes"] for line in metrics(tmp_path / "out")] == [2]
    twice = command(world, tmp_path / "twice", num_processes=None)
    refused = run([sys.executable, "-m", *starter.split(), *twice[1:]])
    assert "--accelerate_config is ddp: a launcher has started this process already" in refused.stderr


@pytest.fixture
def running(world: Path, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A training in two processes that saves after every third step."""
    words = command(world, tmp_path / "out", max_steps=40, save_steps=3, reward_funcs=f"{world / 'rewards.py'}:slow")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    until = time.monotonic() + 120
    while len(metrics(tmp_path / "out")) < 4 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    yield process
    process.terminate()
    process.communicate(timeout=100)


def started_by(parent: int) -> list[tuple[int, int]]:
    """Returns rank and process id of a launcher's processes."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status, variables = (folder / "stat").read_text(), (folder / "environ").read_bytes()
            except OSError:
                continue
            ranks = [int(word[5:]) for word in variables.split(b"\0") if word.startswith(b"RANK=")]
            if int(status.rpartition(")")[2].split()[1]) == parent and ranks:
                found.append((ranks[0], int(folder.name)))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_a_killed_process_ends_the_run_which_then_goes_on(
    world: Path, tmp_path: Path, running: "subprocess.Popen[str]"
) -> None:
    processes = dict(started_by(running.pid))
    assert set(processes) == {0, 1}
    killed = time.monotonic()
    os.kill(processes[1], signal.SIGKILL)
    _, told = running.communicate(timeout=100)
    assert time.monotonic() - killed < 60
    assert running.returncode == 128 + signal.SIGKILL
    assert "remax: process 1 was ended by SIGKILL" in told
    assert "Traceback" not in told
    assert all(not Path(f"/proc/{pid}").exists() for pid in processes.values())

    slow = f"{world / 'rewards.py'}:slow"
    resumed = run(command(world, tmp_path / "out", max_steps=40, save_steps=3, reward_funcs=slow, resume="auto"))
    assert resumed.returncode == 0, resumed.stderr
    assert [line["step"] for line in metrics(tmp_path / "out")] == list(range(1, 41))


@pytest.mark.slow
def test_ctrl_c_saves_in_all_processes(tmp_path: Path, running: "subprocess.Popen[str]") -> None:
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=100)
    assert running.returncode == 130
    assert told.count("with its state saved in") == 1
    last = metrics(tmp_path / "out")[-1]["step"]
    assert (tmp_path / "out" / "checkpoints" / f"step-{last:06d}").exists()


# What is said ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "code", "said"),
    [
        ({0: (5, 2), 1: (5, -15)}, 2, None),
        ({0: (5, -15), 1: (5, 3)}, 3, None),
        ({0: (5, 1), 1: (5, -9)}, 137, "process 1 was ended by SIGKILL"),
        ({0: (5, 1), 1: (35, -9)}, 1, None),
        ({0: (5, 1), 1: (5, 2)}, 2, None),
        ({0: (5, -11), 1: (5, -15)}, 139, "process 0 was ended by SIGSEGV"),
        ({0: (5, -15)}, 143, "process 0 was ended by SIGTERM"),
    ],
)
def test_exit_code_is_that_of_the_first_failure(
    failures: dict[int, tuple[int, int]], code: int, said: str | None, capsys: Any
) -> None:
    assert launch.exit_code(failures) == code
    told = capsys.readouterr().err
    assert (said in told) if said else not told


@pytest.mark.parametrize("name", launch.NAMES)
def test_own_configs(name: str) -> None:
    config = load_config_from_file(str(launch._path(name)))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert config.distributed_type == kind
    assert config.mixed_precision == "no"
    assert config.num_processes == -1, "the launcher counts GPUs, not the file"
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
        assert not {"gradient_clipping", "gradient_accumulation_steps"} & set(config.deepspeed_config)


def refused(capsys: Any, *words: str) -> str:
    assert main(list(words)) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    return str(sentence)


def test_what_cannot_be_launched(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train = ["train", "--model", "m", "--train_dataset", "d", "--reward_model", "r", "--output_dir", str(tmp_path)]
    assert "did you mean fsdp2" in refused(capsys, *train, "--accelerate_config", "fdsp2")
    (tmp_path / "none.yaml").write_text("- a\n")
    assert "is no Accelerate config" in refused(capsys, *train, "--accelerate_config", str(tmp_path / "none.yaml"))
    (tmp_path / "tpu.yaml").write_text("distributed_type: XLA\n")
    sentence = refused(capsys, *train, "--accelerate_config", str(tmp_path / "tpu.yaml"))
    assert "distributed_type is XLA" in sentence
    assert "ddp, fsdp2, zero2, zero3" in sentence
    (tmp_path / "one.yaml").write_text("distributed_type: 'NO'\n")
    words = ["--accelerate_config", str(tmp_path / "one.yaml"), "--num_processes", "2"]
    assert "so one would be started" in refused(capsys, *train, *words)
    assert "without --accelerate_config" in refused(capsys, *train, "--num_processes", "2")
    assert "set 1 or more" in refused(capsys, *train, "--accelerate_config", "ddp", "--num_processes", "0")
    for other in ("evaluate", "compare", "lab"):
        said = refused(capsys, other, "--accelerate_config", "ddp")
        assert "sft, reward and dpo, the commands that work in several" in said
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert "DeepSpeed is not installed" in refused(capsys, *train, "--accelerate_config", "zero3")
    monkeypatch.setattr(launch, "_num_devices", lambda: 4)
    words = ["--accelerate_config", "ddp", "--num_processes", "5"]
    assert "there are 4 GPUs" in refused(capsys, *train, *words)


@no_gpu
def test_fsdp2_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="leave every process with all weights; set ddp"):
        launch.check_launch(LaunchOptions(accelerate_config="fsdp2"))


@pytest.mark.parametrize(
    ("variable", "value", "settings", "said"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", {"bf16": True}, None),
        ("ACCELERATE_MIXED_PRECISION", "fp16", {"bf16": True}, "--bf16 decides"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", {}, "--torch_compile decides"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", {}, None),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", {}, "--micro_batch_tokens decides"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", {}, "--max_grad_norm decides"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", {}, "--gradient_checkpointing decides"),
        ("FSDP_VERSION", "1", {}, "fsdp_version: 2"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", {}, "set it to false"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1", {}, "set 2 or 3"),
        ("ACCELERATE_USE_DEEPSPEED", "true", {}, None),
        ("ACCELERATE_USE_DEEPSPEED", "true", {"method": "ppo"}, None),
        ("ACCELERATE_USE_DEEPSPEED", "true", {"optim": "adamw_torch_8bit"}, "--optim is adamw_torch_8bit"),
        ("ACCELERATE_USE_DEEPSPEED", "true", {"optim": "adafactor"}, "--optim is adafactor"),
        ("ACCELERATE_USE_DEEPSPEED", "true", {"bf16": True}, None),
    ],
)
def test_no_setting_is_overruled_silently(
    variable: str, value: str, settings: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    args = ReMaxConfig(output_dir="out", **settings)
    if said is None:
        launch.check_launcher(args)
    else:
        with pytest.raises(UserError, match=said):
            launch.check_launcher(args)


def known(error: Any) -> Any:
    error.known_to_all = True
    return error


@pytest.mark.parametrize(
    ("rank", "world_size", "error", "said", "deed"),
    [
        (0, 0, UserError("wrong"), "remax: wrong\n", ""),
        (1, 0, UserError("wrong"), "remax: process 1: wrong\n", "waits"),
        (0, 1, UserError("wrong"), "remax: wrong\n", ""),
        (0, 2, known(UserError("wrong")), "remax: wrong\n", "meets"),
        (1, 2, known(GuardStop("wrong")), "", "meets"),
        (0, 2, UserError("wrong"), "remax: process 0: wrong\n", ""),
        (1, 2, UserError("wrong"), "remax: process 1: wrong\n", "waits"),
        (0, 2, Interrupted("wrong", 130), "remax: wrong\n", "meets"),
        (1, 2, Interrupted("wrong", 130), "", "meets"),
        (1, 2, KeyboardInterrupt(), "", ""),
        (1, 2, RuntimeError("Connection closed by peer"), "remax: process 1: wrong\n", "waits"),
    ],
)
def test_who_tells(
    rank: int, world_size: int, error: Exception, said: str, deed: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    deeds: list[str] = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(launched, "_meet", lambda: deeds.append("meets"))
    monkeypatch.setattr(launched, "_wait_for_end", lambda seconds: deeds.append("waits"))
    monkeypatch.setattr(launched, "_is_joined", lambda: world_size > 1)
    launched.tell_once("wrong", error)
    assert capsys.readouterr().err == said
    assert "".join(deeds) == deed


def test_only_the_main_process_prints(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with launched.only_main_prints():
            print("process", rank)
    assert capsys.readouterr().out == "process 0\n"

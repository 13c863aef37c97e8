"""The supervised stages in several processes: the same as in one, whatever each of them has to do."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from transformers import LlamaForCausalLM

import stages_together as together
from remax import launch
from remax.cli import main
from remax.config import LaunchOptions, ReMaxConfig, SFTConfig
from remax.errors import UserError
from remax.processes import Processes
from remax.stages.batches import MicroBatches
from toy_tokenizers import toy_tokenizer

FOLDER = Path(__file__).parent
TOLERANCE = 1e-5
QUICK = ["sft: whole shares", "sft: uneven shares", "reward: small parts", "dpo: uneven shares"]
SPECIAL = ("bf16", "fused", "dropout")
SLOW = [f"{stage}: {name}" for stage in together.STAGES for name in together.SETTINGS if name not in SPECIAL]
SLOW = ["sft: fused", *(case for case in SLOW if case not in QUICK)]


def torchrun(*words: str, num_processes: int = 2) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    return start([*command, *words])


def start(words: list[str]) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=600, check=False)


# What each process trains on ------------------------------------------------------------------------------------------


def epoch_of(num: int, num_examples: int, batch_size: int, micro_batch_size: int) -> list[list[list[Any]]]:
    """Returns the micro-batches of every process."""
    return [
        list(MicroBatches(num_examples, batch_size, micro_batch_size, 5, Processes(index, num))) for index in range(num)
    ]


@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize(
    ("num_examples", "batch_size", "micro_batch_size"), [(9, 4, 0), (9, 4, 1), (11, 5, 2), (2, 8, 3)]
)
def test_every_step_has_the_same_examples_on_any_number_of_processes(
    num: int, num_examples: int, batch_size: int, micro_batch_size: int
) -> None:
    """transformers takes so many micro-batches for a step, and fewer for the last one of an epoch alone."""
    order = list(chain.from_iterable(epoch_of(1, num_examples, batch_size, 0)[0]))
    steps = [[index for index, _ in order[start : start + batch_size]] for start in range(0, num_examples, batch_size)]
    hands = epoch_of(num, num_examples, batch_size, micro_batch_size)
    batches = MicroBatches(num_examples, batch_size, micro_batch_size, 5, Processes(0, num))
    assert len({tuple(map(len, hand)) for hand in hands}) == 1, "TRL gathers tensors of one shape"
    assert all(len(batch) <= (micro_batch_size or batch_size) for hand in hands for batch in hand)
    assert len(hands[0]) == len(batches)
    assert len(steps) == batches.num_steps == -(-len(batches) // batches.per_step)
    for number, step in enumerate(steps):
        parts = slice(number * batches.per_step, (number + 1) * batches.per_step)
        taken = [index for hand in hands for batch in hand[parts] for index, counts in batch if counts]
        assert sorted(taken) == sorted(step)


def test_the_order_is_that_of_transformers_in_one_process_and_another_one_in_every_epoch() -> None:
    theirs = SeedableRandomSampler(range(9), data_seed=7)
    ours = MicroBatches(9, 4, 0, 7)
    epochs = []
    for epoch in range(2):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        epochs.append([index for batch in ours for index, _ in batch])
        assert epochs[-1] == list(theirs)
    assert epochs[0] != epochs[1]


# Real processes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have run the quick cases."""
    return run_together(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have run the others."""
    return run_together(tmp_path_factory.mktemp("slow"), [*SLOW, "sft: bf16", "reward: dropout"])


def run_together(folder: Path, cases: list[str]) -> Path:
    done = torchrun("stages_together.py", str(folder), *cases)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 5/5") == len(cases), "one process tells"
    return folder


def check_same(folder: Path, case: str, tmp_path: Path) -> None:
    alone = together.run(tmp_path, case)
    one, two = together.outcome(alone), together.outcome(folder / alone.name)
    assert (one["weights"] - two["weights"]).norm() <= TOLERANCE * one["weights"].norm()
    same = ("step", "epoch", "loss", "grad_norm", "learning_rate", "accuracy", "margin", "mean_reward")
    same += ("rewards/chosen", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    assert len(two["lines"]) == 5
    for ours, theirs in zip(two["lines"], one["lines"], strict=True):
        assert (ours["num_processes"], theirs["num_processes"]) == (2, 1)
        names = [name for name in same if name in theirs]
        expected = {name: theirs[name] for name in names}
        assert {name: ours[name] for name in names} == pytest.approx(expected, rel=TOLERANCE, abs=2e-6)
    assert two["quality"] == pytest.approx(one["quality"], rel=TOLERANCE, abs=1e-6)
    assert {path.name for path in (folder / alone.name).iterdir()} == {path.name for path in alone.iterdir()}


@pytest.mark.parametrize("case", QUICK)
def test_two_processes_train_as_one(case: str, quick: Path, tmp_path: Path) -> None:
    """The loss is the mean over a step's tokens, or pairs, also where it does not divide; so is the evaluation."""
    check_same(quick, case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_two_processes_train_as_one_with_any_settings(case: str, slow: Path, tmp_path: Path) -> None:
    check_same(slow, case, tmp_path)


@pytest.mark.slow
def test_what_does_not_count_is_not_measured(slow: Path) -> None:
    """With the dropout of an adapter, the stub of a pair that does not count prefers one side of itself too."""
    for line, num_pairs in zip(lines_of(slow / "reward_dropout"), (5, 4, 5, 4, 5), strict=True):
        assert line["accuracy"] * num_pairs == pytest.approx(round(line["accuracy"] * num_pairs), abs=1e-5)
        assert 0 <= round(line["accuracy"] * num_pairs) <= num_pairs


@pytest.mark.slow
def test_in_bfloat16_two_processes_train_as_one_to_its_precision(slow: Path, tmp_path: Path) -> None:
    alone = together.run(tmp_path, "sft: bf16")
    one, two = together.outcome(alone), together.outcome(slow / alone.name)
    assert [line["loss"] for line in two["lines"]] == pytest.approx([line["loss"] for line in one["lines"]], rel=2e-3)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    stages = list(together.STAGES)
    settings = {"allow_config_change": True, "save_steps": 2, "resume": "auto"}
    for stage in stages:
        together.run(tmp_path, f"{stage}: small parts", out=f"{stage}_alone", max_steps=2, save_steps=2)
    begun = [f"{stage}: small parts to 2" for stage in stages]
    continued = [f"{stage}: small parts in {stage}_alone" for stage in stages]
    done = torchrun("stages_together.py", str(tmp_path), *begun, *continued)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in stages:
        case = f"{stage}: small parts"
        saved = tmp_path / f"{stage}_begun" / "checkpoints" / "step-000002"
        noise = [torch.load(saved / f"rng_state_{index}.pth", weights_only=False)["cpu"] for index in (0, 1)]
        assert not torch.equal(*noise), "dropout would leave out the same units in both"
        whole = together.outcome(together.run(tmp_path, case, out=f"{stage}_whole"))
        together.run(tmp_path, case, out=f"{stage}_begun", **settings)
        for how in ("begun", "alone"):
            found = together.outcome(tmp_path / f"{stage}_{how}")
            assert (found["weights"] - whole["weights"]).norm() <= TOLERANCE * whole["weights"].norm(), how
            numbers = [line["num_processes"] for line in found["lines"]]
            assert numbers == ([2, 2, 1, 1, 1] if how == "begun" else [1, 1, 2, 2, 2])
            losses = [line["loss"] for line in found["lines"]]
            assert losses == pytest.approx([line["loss"] for line in whole["lines"]], rel=TOLERANCE)


# The commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    LlamaForCausalLM(together.CONFIG).save_pretrained(folder / "base")
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(folder / "base")
    for name, rows in (("answers", together.ANSWERS), ("pairs", together.PAIRS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(stage: str, world: Path, out: Path, **changes: Any) -> list[str]:
    """Returns a small run's command line, in two processes unless changed; None leaves a flag out."""
    data = world / ("answers.jsonl" if stage == "sft" else "pairs.jsonl")
    flags = {
        **{"model": world / "base", "train_dataset": data, "eval_dataset": data, "output_dir": out, "max_steps": 2},
        **{"batch_size": 4, "report_to": "none", "accelerate_config": "ddp", "num_processes": 2, **changes},
    }
    return [stage, *(word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value)))]


def started(stage: str, world: Path, out: Path, **changes: Any) -> "subprocess.CompletedProcess[str]":
    return start([sys.executable, "-m", "remax", *command(stage, world, out, **changes)])


def lines_of(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(together.STAGES))
def test_commands_start_their_processes(stage: str, world: Path, tmp_path: Path) -> None:
    done = started(stage, world, tmp_path / "out", report_to="tensorboard")
    assert done.returncode == 0, done.stderr
    assert [line["num_processes"] for line in lines_of(tmp_path / "out")] == [2, 2]
    assert sum(text.startswith("step 2/2") for text in done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "out" / "tensorboard").rglob("events*"))) <= 2, "one process tracks"
    assert (tmp_path / "out" / "model" / "README.md").exists()
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["loss" if stage != "reward" else "accuracy"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["torch.distributed.run --standalone --nproc_per_node 2", "accelerate"])
def test_other_launchers(starter: str, world: Path, tmp_path: Path) -> None:
    words = command("sft", world, tmp_path / "out", accelerate_config=None, num_processes=None)
    if starter == "accelerate":
        path = launch._path("ddp")
        starter = f"accelerate.commands.launch --config_file {path} --num_processes 2 --main_process_port 0"
    done = start([sys.executable, "-m", *starter.split(), "-m", "remax", *words])
    assert done.returncode == 0, done.stderr
    assert [line["num_processes"] for line in lines_of(tmp_path / "out")] == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 1}, "--batch_size is 1: 2 processes share the examples of a step"),
        ({"max_length": 1}, "--max_length is 1: no example of --train_dataset is left"),
        ({"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 6}, "nothing is learned from here on"),
    ],
)
def test_a_mistake_is_one_sentence_and_all_processes_end(
    changes: dict[str, Any], said: str, world: Path, tmp_path: Path
) -> None:
    done = started("sft", world, tmp_path / "out", **changes)
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("remax: ")]
    assert said in sentence
    assert "Traceback" not in done.stderr
    if "max_steps" not in changes:
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_saves_in_all_processes_and_another_number_goes_on(world: Path, tmp_path: Path) -> None:
    out, changes = tmp_path / "out", {"max_steps": 3000, "save_steps": 0}
    words = [sys.executable, "-m", "remax", *command("dpo", world, out, **changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    until = time.monotonic() + 120
    while len(lines_of(out)) < 3 and running.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=100)
    assert running.returncode == 130, told
    assert told.count("with its state saved in") == 1
    last = lines_of(out)[-1]["step"]
    assert (out / "checkpoints" / f"step-{last:06d}").exists()
    again = {"max_steps": last + 2, "save_steps": 0, "allow_config_change": True}
    words = command("dpo", world, out, **again, resume="auto", accelerate_config=None, num_processes=None)
    assert start([sys.executable, "-m", "remax", *words]).returncode == 0
    assert [line["num_processes"] for line in lines_of(out)] == [2] * last + [1, 1]


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_configs_that_divide_weights_are_refused(name: str, world: Path, tmp_path: Path, capsys: Any) -> None:
    for stage in together.STAGES:
        assert main(command(stage, world, tmp_path / "out", accelerate_config=name)) == 2
        said = f"remax: --accelerate_config is {name}: remax sft, reward and dpo train with all of the weights in each "
        assert (
            capsys.readouterr().err
            == f"{said}process; set --accelerate_config ddp, and --use_peft true if memory is short.\n"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "distributed_type is FSDP in the Accelerate config: remax sft, reward and dpo"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "distributed_type is DEEPSPEED in the Accelerate config"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "--bf16 decides"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--micro_batch_size decides on that"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "nothing is compiled in this command"),
    ],
)
def test_no_setting_of_a_launcher_is_ignored(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=said):
        launch.check_launcher(SFTConfig())


def test_ddp_and_no_config_are_not_refused() -> None:
    launch.check_replicates(LaunchOptions())
    launch.check_replicates(LaunchOptions(accelerate_config="ddp", num_processes=2))
    launch.check_launcher(SFTConfig())
    launch.check_launcher(ReMaxConfig())

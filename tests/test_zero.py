"""DeepSpeed's ZeRO-2 and ZeRO-3 with real processes on the CPU (gloo): the steps that one process takes alone.

A training goes on from the checkpoints of any number of processes, under ZeRO, FSDP2 or in one process alone.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

import zero_steps
from remax import learner, zero
from remax.checkpoint.shards import _is_covered, _Reader, deal, read_shards, write_shards
from test_launch import command, run, world  # noqa: F401
from toy_training import calm_policy, lively, make_trainer, read

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
CASES = list(zero_steps.SETTINGS)


def launch(stage: int, folder: Path, *cases: str, num_processes: int = 2) -> None:
    """Runs cases in several processes. stage: of ZeRO; 0 for FSDP2."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    variables = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    }
    done = subprocess.run(
        [*command, zero_steps.__file__, str(folder), *cases],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(variables if stage else {})},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# Without DeepSpeed ----------------------------------------------------------------------------------------------------


def test_weights_are_dealt_evenly() -> None:
    assert deal([5, 1, 4, 2, 3], 2) == [0, 0, 1, 0, 1]
    assert deal([1, 9], 3) == [1, 0]
    assert deal([], 2) == []
    sizes = [size * 37 % 101 + 1 for size in range(50)]
    for num in range(1, 8):
        loads = [sum(s for s, owner in zip(sizes, deal(sizes, num), strict=True) if owner == p) for p in range(num)]
        assert max(loads) - min(loads) <= max(sizes)


class DeepSpeedEngine:
    """Has what a checkpoint asks an engine for: its weights, group by group, and vectors of their states."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        groups = [group["params"] for group in optimizer.param_groups]
        vectors = [torch.cat([p.detach().flatten() for p in group]) for group in groups]
        self.optimizer = SimpleNamespace(bit16_groups=groups, single_partition_of_fp32_groups=vectors)

    def zero_optimization_stage(self) -> int:
        return 2


DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"


def test_what_two_processes_write_one_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path / "first", lively, model=calm_policy(1))
    trainer.step(trainer.order.batch(1), 1)
    policy, states = trainer.policy, trainer.policy.optimizer.state
    count = torch.tensor(1.0)  # ZeRO has one for all weights of a vector.

    def state_of(engine: Any, weight: torch.Tensor, vector: torch.Tensor) -> Any:
        return {**states[weight], "step": count}.items()

    monkeypatch.setattr(zero, "state_of", state_of)
    (tmp_path / "shards").mkdir()
    for index in range(2):
        own = SimpleNamespace(
            network=DeepSpeedEngine(policy.optimizer),
            module=policy.module,
            accelerator=SimpleNamespace(num_processes=2, process_index=index),
        )
        others = write_shards(tmp_path / f"of {index}", {"policy": own})
        (file,) = (tmp_path / f"of {index}").iterdir()
        file.rename(tmp_path / "shards" / f"{index}.safetensors")
    torch.save(others, tmp_path / "others.pt")
    other = make_trainer(tmp_path / "second", lively, model=calm_policy(2)).policy
    read_shards(tmp_path / "shards", {"policy": other}, torch.load(tmp_path / "others.pt", weights_only=True))
    for ours, theirs in zip(other.trainable, policy.trainable, strict=True):
        assert torch.equal(ours, theirs)
        assert other.optimizer.state[ours].keys() == states[theirs].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in states[theirs].items():
            assert torch.equal(other.optimizer.state[ours][key], value), key
    counts = {other.optimizer.state[parameter]["step"].data_ptr() for parameter in other.trainable}
    assert len(counts) == len(other.trainable), "every weight counts its own steps"


def test_tensors_without_all_of_their_parts_are_seen() -> None:
    def about(*chunks: tuple[int, int]) -> TensorStorageMetadata:
        parts = [ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([rows, 3])) for start, rows in chunks]
        return TensorStorageMetadata(TensorProperties(), torch.Size([4, 3]), parts)

    assert _is_covered(about((0, 2), (2, 2)))
    assert not _is_covered(about((2, 2)))


def test_what_cannot_be_read_is_an_ordinary_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    reader = _Reader(tmp_path)
    assert torch.equal(reader.whole("a"), torch.ones(2))
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(OSError, match=r"No such file"):
        reader.whole("a")


# Steps ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the results of one process."""
    folder = tmp_path_factory.mktemp("alone")
    patch = pytest.MonkeyPatch()
    patch.setattr(learner, "make_optimizer", learner.make_optimizer)
    patch.setattr(learner, "configure", learner.configure)
    zero_steps.by_sgd()
    results = {case: zero_steps.run(folder, case) for case in CASES}
    patch.undo()
    return folder, results


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_take_the_step_of_one(stage: int, alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    launch(stage, tmp_path, *CASES)
    saved = torch.load(tmp_path / "results.pt", weights_only=True)
    assert saved["num_processes"] == 2
    for case in CASES:
        own, other = saved["results"][case], alone[1][case]
        assert torch.equal(own["before"], other["before"])
        update = other["after"] - other["before"]
        difference = (own["after"] - other["after"]).norm()
        assert (update.norm() > 0) == (case != "no signal")
        tolerance = 0.03 if case == "bf16" else 1e-5  # Other micro-batches round otherwise.
        assert difference <= tolerance * update.norm(), f"{case}: off by {difference / update.norm():.2g}"
        assert own["metrics"]["grad_norm"] == pytest.approx(other["metrics"]["grad_norm"], rel=tolerance)
        if case != "bf16":
            assert own["metrics"] == pytest.approx(other["metrics"], rel=1e-4, abs=1e-6)
        is_divided = stage == 3 and zero_steps.SETTINGS[case].get("divides_all", True)
        assert (own["held"] == 0) == is_divided, "the weights were divided, as ZeRO-3 does and ZeRO-2 does not"
        exported, expected = (
            load_file(folder / f"{case} model" / "model.safetensors") for folder in (tmp_path, alone[0])
        )
        assert exported.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(exported[name], tensor, rtol=1e-5, atol=1e-2 if case == "bf16" else 1e-6)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_the_configs_of_the_package_train(config: str, use_peft: bool, world: Path, tmp_path: Path) -> None:  # noqa: F811
    done = run(command(world, tmp_path / "out", accelerate_config=config, use_peft=use_peft))
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = read(tmp_path / "out" / "metrics.jsonl")
    assert line["num_processes"] == 2
    assert (tmp_path / "out" / "model" / "config.json").exists()


# Checkpoints ----------------------------------------------------------------------------------------------------------

WEIGHTS = {"remax": "model.safetensors", "ppo": "model.safetensors", "lora": "adapter/adapter_model.safetensors"}


def cut(root: Path, name: str, copy: str) -> None:
    """Copies a run as it would be if it had been killed in its third step."""
    shutil.copytree(root / name, root / copy)
    shutil.rmtree(root / copy / "model")
    shutil.rmtree(root / copy / "checkpoints" / "step-000004")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings of four steps: each with all its steps in one way, and some that go on in another way after two."""
    root = tmp_path_factory.mktemp("runs")
    for name in WEIGHTS:
        zero_steps.train(root / f"{name}_alone", name)
    cut(root, "remax_alone", "remax_alone_zero2")
    launch(2, root, *(f"{name} in {name}_zero2" for name in WEIGHTS), "remax in remax_alone_zero2")
    for name in WEIGHTS:
        cut(root, f"{name}_zero2", f"{name}_zero2_zero3")
    launch(3, root, "remax in remax_zero3", *(f"{name} in {name}_zero2_zero3" for name in WEIGHTS))
    cut(root, "remax_zero3", "remax_zero3_fsdp2")
    launch(0, root, "remax in remax_fsdp2", "remax in remax_zero3_fsdp2")
    cut(root, "remax_zero3", "remax_zero3_zero2")
    cut(root, "remax_zero2", "remax_zero2_zero2")
    launch(2, root, "remax in remax_zero3_zero2", "remax in remax_zero2_zero2")
    cut(root, "remax_zero3", "remax_zero3_three")
    cut(root, "remax_fsdp2", "remax_fsdp2_three")
    launch(3, root, "remax in remax_zero3_three", "remax in remax_fsdp2_three", num_processes=3)
    for begun in ("remax_zero2", "remax_zero3", "ppo_zero2", "lora_zero2"):
        cut(root, begun, f"{begun}_alone")
        zero_steps.train(root / f"{begun}_alone", begun.partition("_")[0])
    return root


RESUMED = {
    "remax_alone_zero2": (1, 2),
    "remax_zero2_zero2": (2, 2),
    "remax_zero2_zero3": (2, 2),
    "remax_zero2_alone": (2, 1),
    "remax_zero3_zero2": (2, 2),
    "remax_zero3_fsdp2": (2, 2),
    "remax_zero3_three": (2, 3),
    "remax_zero3_alone": (2, 1),
    "remax_fsdp2_three": (2, 3),
    "ppo_zero2_zero3": (2, 2),
    "ppo_zero2_alone": (2, 1),
    "lora_zero2_zero3": (2, 2),
    "lora_zero2_alone": (2, 1),
}
"""How many processes took the first two steps, and how many the last two."""


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("resumed", RESUMED)
def test_a_run_goes_on_in_another_way(runs: Path, resumed: str) -> None:
    name = resumed.partition("_")[0]
    ours, theirs = (read(runs / folder / "metrics.jsonl") for folder in (resumed, f"{name}_alone"))
    assert [line["num_processes"] for line in ours] == [number for number in RESUMED[resumed] for _ in range(2)]
    others = ("value/loss", "value/grad_norm") if name == "ppo" else ()
    for metric in ("loss", "grad_norm", "kl", "reward", "learning_rate", "entropy", *others):
        assert [line[metric] for line in ours] == pytest.approx([line[metric] for line in theirs], rel=1e-4, abs=1e-5)
    expected = load_file(runs / f"{name}_alone" / "model" / WEIGHTS[name])
    exported = load_file(runs / resumed / "model" / WEIGHTS[name])
    assert exported.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (exported[key] - tensor).norm() <= 1e-5 * tensor.norm(), key


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("run", "num"), [("remax_zero2", 2), ("remax_zero3", 2), ("lora_zero2", 2)])
def test_every_process_writes_its_share_as_safetensors(runs: Path, run: str, num: int) -> None:
    checkpoint = runs / run / "checkpoints" / "step-000002"
    files = sorted(path for path in (checkpoint / "shards").rglob("*") if path.is_file())
    assert len(files) == num
    parts = [load_file(file) for file in files]
    assert not set.intersection(*(set(part) for part in parts))
    sizes = [sum(tensor.numel() for tensor in part.values()) for part in parts]
    assert max(sizes) - min(sizes) <= max(tensor.numel() for part in parts for tensor in part.values())
    one = runs / run.replace("zero2", "alone").replace("zero3", "alone") / "checkpoints" / "step-000002"
    weights = load_file(one / "policy.safetensors")
    expected = {f"policy/weights/model.{key}": tensor for key, tensor in weights.items()}
    optimizer = torch.load(one / "training.pt", weights_only=True)["learners"]["policy"]["optimizer"]
    for number, state in optimizer.items():
        expected |= {f"policy/optimizer/{number}/{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    together = {key: tensor for part in parts for key, tensor in part.items()}
    assert together.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (together[key] - tensor).norm() <= 1e-4 * tensor.norm(), key

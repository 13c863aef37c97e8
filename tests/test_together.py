"""Several processes on one step: the same as one process, whatever each of them has to do."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import together
from toy_training import read

FOLDER = Path(__file__).parent
STEPS = [f"{kind}: {name}" for kind in ("ddp", "fsdp2") for name in together.SETTINGS]
TRAINED = ("remax", "ppo", "lora")
BEGUN = [f"{kind}: {name} to 2 in {kind}_{name}" for kind in ("ddp", "fsdp2") for name in TRAINED]
CONTINUED = [f"fsdp2: {name} to 4 in alone_{name}" for name in TRAINED]
TOLERANCE = 1e-5


def torchrun(*arguments: str, num_processes: int = 2, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have done everything, after one alone had begun what they go on with.

    Several workers of pytest share it: the first one makes it, and the others wait.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "together"
    with (root / "together.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            make(folder)
    return folder


def make(folder: Path) -> None:
    together.save_reward_model(folder / "reward_model")
    for name in TRAINED:
        together.run(folder, f"alone: {name} to 2 in alone_{name}")
        together.run(folder, f"alone: {name} to 4 in whole_{name}")
    done = torchrun("together.py", str(folder), *STEPS, *BEGUN, *CONTINUED, cwd=FOLDER)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """What two processes gave, by case."""
    both = torch.load(folder / "results.pt", weights_only=False)
    assert both["num_processes"] == 2
    return both["results"]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process gives, by name."""
    return {name: together.run(folder, f"alone: {name}") for name in together.SETTINGS}


@pytest.mark.parametrize("case", [case for case in STEPS if "bf16" not in case])
def test_a_step_of_two_processes_is_that_of_one(results: dict[str, Any], alone: dict[str, Any], case: str) -> None:
    two, one = results[case], alone[case.partition(": ")[2]]
    assert two["texts"] == one["texts"]
    for ours, theirs in zip(two["gradients"], one["gradients"], strict=True):
        assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()
    for ours, theirs in zip(two["weights"], one["weights"], strict=True):
        assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_in_bfloat16_a_step_of_two_processes_is_that_of_one_to_its_precision(
    results: dict[str, Any], alone: dict[str, Any], kind: str
) -> None:
    """Other micro-batches round otherwise; and sharded weights are gathered in bfloat16, so that norms round too."""
    (ours,), (theirs,) = results[f"{kind}: bf16"]["gradients"], alone["bf16"]["gradients"]
    assert (ours - theirs).norm() <= 0.03 * theirs.norm()
    scored, expected = (found["reward model in bf16"]["metrics"] for found in (_of(kind, results), alone))
    for name in ("reward", "rewards/reward_model/std", "kl"):
        assert scored[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name


def _of(kind: str, results: dict[str, Any]) -> dict[str, Any]:
    return {case.partition(": ")[2]: found for case, found in results.items() if case.startswith(f"{kind}: ")}


def test_cases_are_what_they_are_named_for(alone: dict[str, Any]) -> None:
    silent = {name: one["metrics"]["gradient/zero_signal_fraction"] for name, one in alone.items()}
    assert 0 < silent["few signals"] < 1
    assert silent["no signal"] == 1
    assert alone["logging"]["metrics"]["rewards/logging_reward/mean"] != pytest.approx(0)
    assert set(alone["logging"]["texts"][1]) == {"first"}
    assert alone["clipped"]["metrics"]["grad_norm"] > 10 * together.SETTINGS["clipped"]["max_grad_norm"]


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_goes_on_with_another_number_of_processes(folder: Path, results: dict[str, Any], name: str) -> None:
    whole = together.run(folder, f"alone: {name} to 4 in {name}_at_once")["weights"]
    others = {f"from one to two, {name}": results[f"fsdp2: {name} to 4 in alone_{name}"]["weights"]}
    for kind in ("ddp", "fsdp2"):
        begun = folder / f"{kind}_{name}"
        in_parts = sorted((begun / "checkpoints" / "step-000002" / "shards").glob("*.safetensors"))
        assert len(in_parts) == (2 if kind == "fsdp2" else 0)
        others[f"from two to one, {kind}"] = together.run(folder, f"alone: {name} to 4 in {kind}_{name}")["weights"]
    for how, weights in others.items():
        for ours, theirs in zip(weights, whole, strict=True):
            assert (ours - theirs).norm() <= TOLERANCE * theirs.norm(), how
    assert len(read(folder / f"fsdp2_{name}" / "metrics.jsonl")) == 4
    for kind in ("ddp", "fsdp2"):
        evaluations = zip(*(read(folder / f"{own}_{name}" / "eval.jsonl") for own in (kind, "alone")), strict=True)
        assert all(ours == pytest.approx(theirs, rel=1e-4) for ours, theirs in evaluations)


@pytest.mark.parametrize("name", TRAINED)
def test_sharded_weights_are_exported_to_one_folder(folder: Path, results: dict[str, Any], name: str) -> None:
    from safetensors.torch import load_file

    exported = load_file(folder / f"alone_{name}" / "model" / "model.safetensors")
    expected = load_file(folder / f"whole_{name}" / "model" / "model.safetensors")
    assert exported.keys() == expected.keys()
    for key, tensor in exported.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-6)

"""DeepSpeed's ZeRO-2 and ZeRO-3 with two real processes on the CPU (gloo): the step that one process takes alone."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import zero_steps
from remax import learner
from remax.errors import UserError
from remax.zero import PARTS, check_parts

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
CASES = list(zero_steps.SETTINGS)


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
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", zero_steps.__file__, str(tmp_path)]
    variables = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *words, *CASES], capture_output=True, text=True, env={**os.environ, **variables}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
        assert (own["held"] == 0) == (stage == 3), "the weights were divided, as ZeRO-3 does and ZeRO-2 does not"
        exported, expected = (
            load_file(folder / f"{case} model" / "model.safetensors") for folder in (tmp_path, alone[0])
        )
        assert exported.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(exported[name], tensor, rtol=1e-5, atol=1e-2 if case == "bf16" else 1e-6)


class DeepSpeedEngine:
    """Has nothing but the module that tells an engine, and a stage."""

    def zero_optimization_stage(self) -> int:
        return 3


DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"


def test_checkpoints_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    engine, folder = DeepSpeedEngine(), tmp_path / "shards"
    check_parts(torch.nn.Linear(1, 1), folder)
    with pytest.raises(UserError, match=r"no checkpoint of DeepSpeed.*start the processes with .* ddp or fsdp2"):
        check_parts(engine, folder)
    (folder / PARTS).mkdir(parents=True)
    for rank in range(3):
        (folder / PARTS / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(UserError, match=r"3 processes wrote it.*set --num_processes 3"):
        check_parts(engine, folder)
    with pytest.raises(UserError, match="start the processes with --accelerate_config zero2 or zero3"):
        check_parts(torch.nn.Linear(1, 1), folder)
    (folder / PARTS / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    check_parts(engine, folder)
    (folder / PARTS / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(UserError, match=r"a checkpoint of ZeRO-2.*--accelerate_config zero2"):
        check_parts(engine, folder)

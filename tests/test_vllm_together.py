"""Two real processes that train together on one server (a stand-in for vLLM behind the real HTTP server)."""

import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fake_vllm import fake_vllm  # noqa: F401
from served_together import train
from served_vllm import Served
from toy_training import calm_policy, read

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fake_vllm")]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
}


def run(folder: Path, url: str, kind: str, *arguments: str) -> Any:
    folder.mkdir()
    script = str(Path(__file__).with_name("served_together.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(ZERO3 if kind == "zero3" else {})}
    words = [*command, script, str(folder), url, kind, *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture
def served(fake_vllm):  # noqa: F811
    served = Served(calm_policy(1))
    yield served
    served.end()


def keep_pushed(served: Served) -> list[dict[str, torch.Tensor]]:
    """Returns a list that gets what the server is sent, push by push."""
    pushed = []
    own = served.llm.collective_rpc

    def collective_rpc(method: str, args: tuple[Any, ...] = ()) -> Any:
        pushed.append({k: t for path in Path(args[0]).glob("*.safetensors") for k, t in load_file(path).items()})
        return own(method, args)

    served.llm.collective_rpc = collective_rpc
    return pushed


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_two_processes_are_served_like_one(tmp_path, served, kind):
    pushed = keep_pushed(served)
    result = run(tmp_path / "two", served.server.url, kind)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(pushed) == 3, "one process pushes, once a version"
    train(tmp_path / "one", served.server.url)
    one, two = (read(tmp_path / name / "run" / "metrics.jsonl") for name in ("one", "two"))
    assert [line["num_processes"] for line in two] == [2, 2, 2]
    names = ["loss", "reward", "reward/greedy", "kl", "grad_norm", "sampling/importance_sampling_ratio/max"]
    for ours, theirs in zip(one, two, strict=True):
        assert [theirs[n] for n in names] == pytest.approx([ours[n] for n in names], rel=1e-3, abs=1e-5)
        assert 0 < theirs["sampling/sampling_logp_difference/max"] < 1e-4
    begun = calm_policy(1).state_dict()
    assert pushed[0].keys() == begun.keys()
    assert all(torch.equal(tensor, begun[name]) for name, tensor in pushed[0].items())
    assert not any(torch.equal(pushed[0][name], tensor) for name, tensor in pushed[2].items()), "all are trained"
    for ours, theirs in zip(pushed[:3], pushed[3:], strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert (tensor - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


def test_when_the_server_ends_all_processes_stop_and_the_state_is_saved(tmp_path, served):
    def end() -> None:
        while not (tmp_path / "two" / "end").exists():
            time.sleep(0.05)
        served.end()
        (tmp_path / "two" / "ended").touch()

    threading.Thread(target=end, daemon=True).start()
    started = time.monotonic()
    result = run(tmp_path / "two", served.server.url, "ddp", "3")
    assert result.returncode != 0
    assert f"stopped: the vLLM server at {served.server.url} does not answer" in result.stdout
    assert time.monotonic() - started < 120
    assert [line["step"] for line in read(tmp_path / "two" / "run" / "metrics.jsonl")] == [1, 2]
    assert [path.name for path in (tmp_path / "two" / "run" / "checkpoints").iterdir() if "2" in path.name]
    served.start()

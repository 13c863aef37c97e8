"""Two real processes that train together on one server (a stand-in for vLLM behind the real HTTP server)."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fake_vllm import fake_vllm  # noqa: F401
from served_together import train
from test_vllm_engine import Served
from toy_training import calm_policy, read

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fake_vllm")]


def run(folder: Path, url: str, *arguments: str) -> Any:
    folder.mkdir()
    script = str(Path(__file__).with_name("served_together.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run([*command, script, str(folder), url, *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture
def served(fake_vllm):  # noqa: F811
    served = Served(calm_policy(1))
    yield served
    served.end()


def test_two_processes_are_served_like_one(tmp_path, served):
    result = run(tmp_path / "two", served.server.url)
    assert result.returncode == 0, result.stdout + result.stderr
    pushes = served.llm.calls.count("remax_load_files")
    assert pushes == 3, "one process pushes, once a version"
    train(tmp_path / "one", served.server.url)
    one, two = (read(tmp_path / name / "run" / "metrics.jsonl") for name in ("one", "two"))
    assert [line["num_processes"] for line in two] == [2, 2, 2]
    names = ["loss", "reward", "reward/greedy", "kl", "grad_norm", "sampling/importance_sampling_ratio/max"]
    for ours, theirs in zip(one, two, strict=True):
        assert [theirs[n] for n in names] == pytest.approx([ours[n] for n in names], rel=1e-3, abs=1e-5)
        assert 0 < theirs["sampling/sampling_logp_difference/max"] < 1e-4


def test_when_the_server_ends_all_processes_stop_and_the_state_is_saved(tmp_path, served):
    def end() -> None:
        while not (tmp_path / "two" / "end").exists():
            time.sleep(0.05)
        served.end()
        (tmp_path / "two" / "ended").touch()

    threading.Thread(target=end, daemon=True).start()
    started = time.monotonic()
    result = run(tmp_path / "two", served.server.url, "3")
    assert result.returncode != 0
    assert f"stopped: the vLLM server at {served.server.url} does not answer" in result.stdout
    assert time.monotonic() - started < 120
    assert [line["step"] for line in read(tmp_path / "two" / "run" / "metrics.jsonl")] == [1, 2]
    assert [path.name for path in (tmp_path / "two" / "run" / "checkpoints").iterdir() if "2" in path.name]
    served.start()

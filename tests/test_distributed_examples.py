"""The scripts for several nodes, where Slurm and Accelerate's launcher are stubs."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

SCRIPTS = Path(__file__).resolve().parents[1] / "examples/distributed"
STUBS = {
    "accelerate": """
        printf '%s\\n' "$@" > "$OUT/arguments-$SLURM_NODEID"
        trap 'touch "$OUT/told-$SLURM_NODEID"; exit 143' TERM
        touch "$OUT/started-$SLURM_NODEID"
        while [[ ! -e $OUT/told-0 ]]; do sleep 0.02; done
        exit ${CODE:-143}
    """,
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        SLURM_NODEID=1 "$@" & other=$!
        SLURM_NODEID=0 "$@" & wait $! || code=$?
        wait $other || true
        exit ${code:-0}
    """,
    "scontrol": """
        case $1 in show) printf 'first\\nsecond\\n' ;; *) echo "$@" > "$OUT/scontrol" ;; esac
    """,
}


@pytest.fixture
def on_two_nodes(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], Path]]]:
    """Starts train.slurm where Slurm and Accelerate are stubs, and returns what runs and the folder that they fill."""
    stubs, jobs = tmp_path / "stubs", []
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text("#!/bin/bash\n" + textwrap.dedent(text))
        (stubs / name).chmod(0o755)

    def start(*arguments: str, **variables: str) -> tuple[subprocess.Popen[str], Path]:
        out = tmp_path / f"out-{len(jobs)}"
        out.mkdir()
        slurm = {"JOB_ID": "7", "NNODES": "2", "JOB_NODELIST": "n", "GPUS_ON_NODE": "4", "SUBMIT_DIR": str(SCRIPTS)}
        path = f"{stubs}:{Path(sys.executable).parent}:/usr/bin:/bin"
        environment = {"PATH": path, "OUT": str(out), "TMPDIR": str(out), **variables}
        environment |= {f"SLURM_{name}": value for name, value in slurm.items()}
        job = subprocess.Popen(
            ["bash", str(SCRIPTS / "train.slurm"), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        jobs.append(job)
        return job, out

    yield start
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)  # What a failed test leaves.
        job.communicate()


def wait_for_start(job: subprocess.Popen[str], out: Path) -> None:
    deadline = time.monotonic() + 60
    while not all((out / f"started-{rank}").exists() for rank in range(2)):
        assert job.poll() is None, f"it ended: {job.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["train.slurm", "multi_node.sh"])
def test_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)


def test_a_job_starts_every_node_and_queues_itself_again_when_it_is_told_to_stop(on_two_nodes: Any) -> None:
    job, out = on_two_nodes("--config", "a run.yaml", "--output_dir", "/shared/run")
    wait_for_start(job, out)
    for rank in range(2):
        command, *flags = (out / f"arguments-{rank}").read_text().splitlines()
        assert command == "launch"
        given = launch_command_parser().parse_args(flags)
        assert (given.num_machines, given.num_processes, given.machine_rank) == (2, 8, rank)
        assert (given.main_process_ip, given.main_process_port) == ("first", 20007)
        assert given.module
        assert given.training_script == "remax"
        sent = ["train", "--config", "a run.yaml", "--output_dir", "/shared/run", "--resume", "auto"]
        assert given.training_script_args == sent
        assert "fsdp_version: 2" in Path(given.config_file).read_text()
    job.terminate()
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == 143, printed
    assert (out / "scontrol").read_text() == "requeue 7\n"
    assert not (out / "told-1").exists(), "one launcher is told; its training tells the others"


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_ends_by_itself_is_not_queued_again(on_two_nodes: Any, code: int) -> None:
    job, out = on_two_nodes(CODE=str(code))
    wait_for_start(job, out)
    (out / "told-0").touch()
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == code, printed
    assert not (out / "scontrol").exists()

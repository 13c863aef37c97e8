"""Runs `remax train` on a tiny random model in processes of their own, kills them, goes on, and compares what is left.

A process is either what a user starts (`python -m remax train`), or a fork of one that has imported everything already
and calls the same `main`: it takes a second less per library, and dies just as well.
"""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_models import tiny_model
from toy_tokenizers import EOS, VOCAB_SIZE, toy_tokenizer

REWARDS = """
import time

def lively(completions, **kwargs):
    time.sleep(0.03)
    return [sum(map(ord, text)) % 17 / 8 for text in completions]
"""
PATIENCE_SECONDS = 120.0
WRITING = "in a half-written checkpoint"
NOISE = ("time/", "memory", "tokens_per_second")


def make_world(folder: Path) -> Path:
    """Fills a folder with a policy, prompts and a reward function, and returns it."""
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, eos_token_id=EOS)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder / "policy")
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(folder / "policy")
    for name, words in (("prompts", "abcdefgh"), ("held_out", "xy")):
        lines = [json.dumps({"prompt": f"{word} {animal}"}) for word in words for animal in ("cat", "dog")]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def flags(world: Path, out: Path, method: str, **changes: Any) -> list[str]:
    """Returns the arguments of a small training in which every kind of state is at work."""
    settings: dict[str, Any] = {
        "model": world / "policy",
        "reward_funcs": f"{world / 'rewards.py'}:lively",
        "reward_timeout_seconds": 0,
        "train_dataset": world / "prompts.jsonl",
        "eval_dataset": world / "held_out.jsonl",
        "eval_steps": 4,
        "output_dir": out,
        "method": method,
        "max_steps": 12,
        "save_steps": 1,
        "batch_size": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "report_to": "none",
        **({"target_kl": 0.05, "num_mini_batches": 2} if method == "ppo" else {"greedy_every": 2}),
        **changes,
    }
    return ["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


@dataclass
class Running:
    """A process that was started."""

    pid: int
    log: Path
    poll: Callable[[], int | None]
    """Returns the exit code, minus the number of the signal that killed it; None while it lives."""

    def wait(self, patience_seconds: float = PATIENCE_SECONDS) -> int:
        """Returns the exit code once it has ended."""
        for _ in until(patience_seconds):
            if (code := self.poll()) is not None:
                return code
        raise AssertionError(f"still running: {self.log.read_text()}")


def until(seconds: float) -> Iterator[None]:
    """Comes back every millisecond until the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.0005)


def start(arguments: list[str], log: Path, *, real: bool) -> Running:
    """Starts the command line; real: as a user does."""
    if real:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            command = [sys.executable, "-m", "remax", *arguments]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        return Running(process.pid, log, process.poll)
    return forked(_main, (arguments,), log)


def forked(function: Callable[..., int], arguments: tuple[Any, ...], log: Path) -> Running:
    """Starts a function, whose value is the exit code, in a fork of a process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["remax.trainer", "remax.commands"])
    fork = context.Process(target=_in_child, args=(function, arguments, str(log)))
    fork.start()
    assert fork.pid is not None
    return Running(fork.pid, log, lambda: fork.exitcode)


def _main(arguments: list[str]) -> int:
    from remax.cli import main

    return main(arguments)


def _in_child(function: Callable[..., int], arguments: tuple[Any, ...], log: str) -> None:
    import torch

    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(function(*arguments))


def steps_done(out: Path) -> int:
    """Returns the number of lines in metrics.jsonl."""
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def partials(out: Path) -> list[Path]:
    """Returns the checkpoints that are being written."""
    return list((out / "checkpoints").glob(".step-*.partial"))


def kill(running: Running, out: Path, moment: random.Random, *, wanted: int, while_writing: bool) -> str | None:
    """Kills a training at a random moment and returns a description of it; None if it had ended before.

    wanted: not before so many steps are done. while_writing: when a checkpoint is half-written.
    """
    for _ in until(PATIENCE_SECONDS):  # The start of Python and its libraries is no training.
        if (out / "config.yaml").exists() or running.poll() is not None:
            break
    for _ in until(PATIENCE_SECONDS):
        if running.poll() is not None or (steps_done(out) >= wanted and (not while_writing or partials(out))):
            break
    time.sleep(moment.uniform(0.0, 0.001 if while_writing else 0.05))
    if running.poll() is None:
        os.kill(running.pid, signal.SIGKILL)
    code = running.wait()
    assert code in (-signal.SIGKILL, 0), f"it failed on its own: {running.log.read_text()}"
    if code == 0:
        return None
    return f"after {steps_done(out)} steps" + (f" {WRITING}" if partials(out) else "")


def survive(
    out: Path, arguments: list[str], moment: random.Random, *, max_steps: int, kills: int, writing: int, real: bool
) -> list[str]:
    """Trains to the end in spite of so many kills and tells when they fell: writing of them in a half-written
    checkpoint."""
    told: list[str] = []
    arguments = [*arguments, "--resume", "auto"]
    for number in range(5 * kills):
        written = sum(WRITING in line for line in told)
        if len(told) >= kills and written >= writing:
            break
        left = max(kills - len(told), 1)
        stretch = max(0, (max_steps - 4 - steps_done(out)) // left)
        running = start(arguments, out.with_suffix(f".{number}.log"), real=real)
        wanted = steps_done(out) + moment.randint(0, stretch)
        what = kill(running, out, moment, wanted=wanted, while_writing=written < writing)
        if what is not None:
            told.append(what)
        else:  # It got to its end before.
            shutil.rmtree(out)
    else:
        raise AssertionError(f"the kills do not fall where they should: {told}")
    last = start(arguments, out.with_suffix(".last.log"), real=real)
    assert last.wait() == 0, last.log.read_text()
    return told


def outcome(out: Path) -> dict[str, Any]:
    """Returns what has to be the same however often a run was killed: digests, and lines without times and memory."""
    models = [*(out / "model").glob("*.safetensors"), *(out / "best_model").glob("*.safetensors")]
    digests = {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in models}
    for name in ("completions.jsonl", "eval.jsonl"):
        digests[name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        **digests,
        "steps": [line["step"] for line in lines],
        "metrics": [json.dumps({k: v for k, v in line.items() if not k.startswith(NOISE)}) for line in lines],
    }

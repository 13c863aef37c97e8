"""A long run: memory stays flat, and every step leaves its lines."""

import json
import statistics
from pathlib import Path

import pytest

from kill_harness import flags, make_world, start

NUM_STEPS = 2000
WARM_UP = 200
BATCH_SIZE = 4


@pytest.mark.slow
def test_two_thousand_steps_hold_memory_flat_and_lose_no_line(tmp_path: Path) -> None:
    world, out, log = make_world(tmp_path), tmp_path / "out", tmp_path / "log"
    (world / "rewards.py").write_text(
        "def lively(completions, **kwargs):\n    return [sum(map(ord, text)) % 17 / 8 for text in completions]\n"
    )
    changes = {
        "max_steps": NUM_STEPS,
        "save_steps": 50,
        "eval_steps": 100,
        "learning_rate": 1e-4,
        "reward_timeout_seconds": 60,
        "logging_steps": 100,
    }
    running = start(flags(world, out, "remax", **changes), log, real=True)
    assert running.wait(600) == 0, log.read_text()[-2000:]

    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [own["step"] for own in metrics] == list(range(1, NUM_STEPS + 1))
    completions = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert [own["step"] for own in completions] == [step for step in range(1, NUM_STEPS + 1) for _ in range(BATCH_SIZE)]
    sizes = [own["memory/update"] for own in metrics]
    early = statistics.median(sizes[WARM_UP : 2 * WARM_UP])
    late = statistics.median(sizes[-WARM_UP:])
    seconds = sum(own["time/step"] for own in metrics)
    print(f"{early / 2**20:.1f} MiB early, {late / 2**20:.1f} MiB late ({late / early - 1:+.2%}); {seconds:.0f} s")
    assert late < 1.02 * early

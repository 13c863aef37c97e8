"""Whole trainings whose reward functions fail, are slow or change: what is missing is counted, not learned."""

import asyncio
import warnings
from pathlib import Path
from typing import Any

import pytest

from remax.errors import GuardStop, UserError
from remax.rewards import load_reward_function
from remax.rewards.isolation import IsolatedReward
from remax.rewards.named import named_function
from toy_training import make_trainer, read

RUN_CODE = """
import os, time
def lively(completions, trainer_state, log_extra, log_metric, **_):
    log_extra("size", [len(text) for text in completions])
    log_metric("shown_step", trainer_state.global_step)
    return [sum(map(ord, text)) % 17 / 8 for text in completions]
def some(completions, trainer_state, **_):
    many = trainer_state.global_step == 1
    return [None if (row < len(completions) * 3 // 4 if many else row == 0) else float("nan") if row == 1 else 1.0 * row
            for row in range(len(completions))]
def outage(completions, trainer_state, **_):
    if trainer_state.global_step == 1 and not os.path.exists(__file__ + ".fixed"):
        os._exit(1)
    return [float(len(text)) for text in completions]
def late(completions, trainer_state, **_):
    if trainer_state.global_step == 1:
        time.sleep(60)
    return [float(len(text)) for text in completions]
def never(completions, **_):
    raise ValueError("broken")
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "run.py").write_text(RUN_CODE)
    return tmp_path / "run.py"


def test_the_process_changes_no_reward_of_a_seeded_run(run_file: Path, tmp_path: Path) -> None:
    metrics = []
    for name, reward in [
        ("here", load_reward_function(f"{run_file}:lively")),
        ("there", IsolatedReward(f"{run_file}:lively", timeout_seconds=20.0)),
    ]:
        make_trainer(tmp_path / name, reward).train()
        metrics.append(read(tmp_path / name / "metrics.jsonl"))
    here, there = ((tmp_path / name / "completions.jsonl").read_bytes() for name in ("here", "there"))
    assert here == there
    assert b'"size"' in here
    assert [step["step"] for step in metrics[1]] == [1, 2]
    for first, second in zip(*metrics, strict=True):
        for name in first:
            if not name.startswith(("time/", "memory/", "tokens_per_second")):
                assert first[name] == second[name], name


def test_missing_rewards_are_counted_by_function_and_in_all(run_file: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", IsolatedReward(f"{run_file}:some", timeout_seconds=20.0), max_steps=1)
    trainer.train()
    metrics = read(tmp_path / "out" / "metrics.jsonl")[0]
    assert metrics["rewards/some/missing_fraction"] == 1 / 8, "None is no failure"
    assert metrics["reward/missing_fraction"] == 2 / 4


@pytest.mark.filterwarnings("ignore:late took longer")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("some", r"^6 of the step's 8 completions have no reward, more than --max_missing_rewards 0.5 allows \(the"),
        ("late", r"^8 of .*\(late took longer than the 0.5 s of --reward_timeout_seconds and was stopped\)"),
    ],
)
def test_a_run_stops_when_too_much_is_missing_before_it_learns_from_the_rest(
    name: str, said: str, run_file: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path / "out", IsolatedReward(f"{run_file}:{name}", timeout_seconds=0.5), max_steps=3)
    with pytest.raises(GuardStop, match=said):
        trainer.train()
    assert [step["step"] for step in read(tmp_path / "out" / "metrics.jsonl")] == [1]
    tolerant = make_trainer(
        tmp_path / "tolerant",
        IsolatedReward(f"{run_file}:{name}", timeout_seconds=0.5),
        max_steps=3,
        max_missing_rewards=1.0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tolerant.train()
    assert [step["step"] for step in read(tmp_path / "tolerant" / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore:outage lost its process")
def test_a_run_goes_on_after_an_outage_as_if_there_had_been_none(run_file: Path, tmp_path: Path) -> None:
    def train(name: str, **settings: Any) -> None:
        make_trainer(
            tmp_path / name, IsolatedReward(f"{run_file}:outage", timeout_seconds=20.0), max_steps=3, **settings
        ).train()

    with pytest.raises(GuardStop, match=r"\(outage lost its process, which ended with exit code 1\); see to that"):
        train("out")
    Path(f"{run_file}.fixed").write_text("")
    train("out", resume="auto")
    train("whole")
    for name in ("completions.jsonl", "model/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("timeout_seconds", [0.0, 20.0])
def test_a_file_that_changed_between_a_run_and_its_resume_is_refused(
    run_file: Path, tmp_path: Path, timeout_seconds: float, capsys: Any
) -> None:
    def train(**settings: Any) -> None:
        reward = named_function(f"{run_file}:lively", timeout_seconds)
        make_trainer(tmp_path / "out", reward, **settings).train()

    train(max_steps=1)
    run_file.write_text(run_file.read_text() + "# other\n")
    with pytest.raises(UserError, match=r"other settings \(the file of the reward lively: \w{16} -> \w{16}\)"):
        train(max_steps=1, resume="auto")
    train(max_steps=1, resume="auto", allow_config_change=True)
    assert "the file of the reward lively: " in capsys.readouterr().out


def test_no_reward_at_all_in_the_first_step_is_a_mistake(run_file: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", IsolatedReward(f"{run_file}:never", timeout_seconds=20.0))
    with (
        pytest.warns(UserWarning, match="never raised ValueError: broken"),
        pytest.raises(UserError, match="gave no number for any completion of the first step"),
    ):
        trainer.train()
    assert not (tmp_path / "out").exists()


def test_timeouts_of_named_and_of_given_functions_come_from_the_settings(tmp_path: Path) -> None:
    async def slow(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(60)
        return []

    trainer = make_trainer(tmp_path / "out", slow, reward_timeout_seconds=0.2)
    with pytest.warns(UserWarning, match="slow took longer than the 0.2 s"), pytest.raises(UserError):
        trainer.train()

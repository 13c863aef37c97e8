"""Alarms: planted figures raise them once and say what they must; a healthy run is silent."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from remax.config import GuardOptions, ReMaxConfig, TrainInputs
from remax.errors import GuardStop, UserError
from remax.evaluate import Evaluation
from remax.guards.alarms import Alarms
from toy_training import PROMPTS, lively, make_trainer, read, vowels

HEALTHY = {"kl": 5.0, "completions/clipped_ratio": 0.2, "completions/mean_length": 100.0, "entropy": 2.0}


def raised(args: GuardOptions, series: list[dict[str, float]]) -> list[tuple[int, str]]:
    """The alarms of a series of metrics: step and name."""
    alarms = Alarms(args)
    found = [alarm for step, metrics in enumerate(series, start=1) for alarm in alarms.after_step(step, metrics)]
    return [(alarm["step"], alarm["alarm"]) for alarm in found]


def healthy(num_steps: int, seed: int = 0) -> list[dict[str, float]]:
    """A run that learns: the KL grows to 30 nats, completions to twice their length, entropy falls to 40%; with noise
    and one wild batch."""
    generator = np.random.default_rng(seed)
    series = []
    for share in np.linspace(0, 1, num_steps):
        noise = generator.lognormal(0.0, 0.3, 4)
        figures = (30 * share, 0.1 + 0.4 * share, 100 * (1 + share), 2 * (1 - 0.6 * share))
        series.append({name: float(f * n) for name, f, n in zip(HEALTHY, figures, noise, strict=True)})
        series[-1]["completions/clipped_ratio"] = min(1.0, series[-1]["completions/clipped_ratio"])
    series[num_steps // 2] |= {"kl": 200.0, "completions/mean_length": 500.0, "completions/clipped_ratio": 1.0}
    return series


@pytest.mark.parametrize("num_steps", [8, 30, 300])
def test_a_healthy_run_is_silent(num_steps: int) -> None:
    for seed in range(20):
        assert raised(GuardOptions(), healthy(num_steps, seed)) == []


def test_a_short_limit_from_the_start_is_no_explosion() -> None:
    """Completions that are all cut from the start, as with a small --max_completion_length."""
    assert raised(GuardOptions(), [{**HEALTHY, "completions/clipped_ratio": 1.0}] * 50) == []


PLANTED = {
    "kl": ("kl", 60.0, 50.0),
    "truncated": ("completions/clipped_ratio", 0.95, 0.9),
    "length": ("completions/mean_length", 320.0, 300.0),
    "entropy": ("entropy", 0.15, 0.2),
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_alarm_is_raised_once_says_everything_and_clears(name: str) -> None:
    """From step 21 on a value beyond its bound; the mean of ten steps follows when the arithmetic says so."""
    metric, value, bound = PLANTED[name]
    start = HEALTHY[metric]
    bad, good = {**HEALTHY, metric: value}, HEALTHY
    alarms = Alarms(GuardOptions())
    found = []
    for step in range(1, 61):
        found += alarms.after_step(step, bad if 20 < step <= 40 or step > 50 else good)
    # n bad values of ten have the mean start + n (value - start) / 10.
    needed = next(n for n in range(11) if (value - bound) * (start + n * (value - start) / 10 - bound) > 0)
    assert [alarm["step"] for alarm in found] == [20 + needed, 50 + needed], "once, and again after it had cleared"
    assert found[1]["since_step"] == 51
    alarm = found[0]
    mean = start + needed * (value - start) / 10
    assert (alarm["alarm"], alarm["metric"], alarm["since_step"]) == (name, metric, 21)
    assert alarm["value"] == pytest.approx(mean)
    assert alarm["threshold"] == pytest.approx(bound)
    for part in (metric, f"{mean:.3g}", f"{bound:.3g}", "since step 21", "what may help is"):
        assert part in alarm["message"], part
    assert ". " not in alarm["message"]


def test_values_that_are_missing_are_passed_over() -> None:
    series: list[dict[str, float]] = [{**HEALTHY, "kl": 100.0}] * 5 + [{"kl": math.nan}] * 20
    assert raised(GuardOptions(), series) == [], "five values are no window"
    assert raised(GuardOptions(), [*series, *[{"kl": 100.0}] * 5]) == [(30, "kl")]


def test_off_is_off() -> None:
    assert raised(GuardOptions(alarms="off"), [{"kl": 1000.0}] * 50) == []


# The gold reward ------------------------------------------------------------------------------------------------------


def evaluations(learned: list[float], gold: list[float], *, prompts: int = 64) -> list[tuple[list[float], list[float]]]:
    """Evaluations on prompts that differ much, and whose answers differ by a standard deviation of 0.4 each time."""
    generator = np.random.default_rng(0)
    hardness = generator.normal(0, 5, prompts)
    return [
        tuple((hardness + mean + generator.normal(0, 0.4, prompts)).tolist() for mean in means)  # type: ignore[misc]
        for means in zip(learned, gold, strict=True)
    ]


@pytest.mark.parametrize(
    ("learned", "gold", "expected"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], []),
        ([0, 1, 2, 3], [0, 0, 0, 0], []),
        ([0, 1, 2, 3], [1, 0.8, 0.6, 0.4], [2]),
        ([3, 2, 1, 0], [1, 0.8, 0.6, 0.4], []),
        ([0, 1, 2, 3, 4, 5], [0, 1, 0.5, 0.4, 1, 0.2], [3, 5]),
    ],
)
def test_gold_falls_while_the_reward_rises(learned: list[float], gold: list[float], expected: list[int]) -> None:
    """Differences are taken within prompts: between them they would drown in the prompts' own spread."""
    alarms = Alarms(GuardOptions())
    found = []
    for step, (rewards, golden) in enumerate(evaluations(learned, gold)):
        found += alarms.after_evaluation(step, rewards, golden)
    assert [alarm["step"] for alarm in found] == expected
    for alarm in found:
        assert alarm["since_step"] == alarm["step"] - 2
        assert "eval/reward rose by" in alarm["message"]
        assert alarm["value"] < alarm["threshold"] < 0


def test_the_size_of_a_fall_is_compared_with_its_standard_error() -> None:
    """Three prompts fall by 1, 2 and 3: mean 2, standard error 1 / sqrt(3); two of those are less than 2. With 4, 0
    and 2 it is 2 / sqrt(3), twice of which is more."""
    for falls, number in (([1.0, 2.0, 3.0], 1), ([4.0, 0.0, 2.0], 0)):
        alarms = Alarms(GuardOptions(gold_evaluations=2))
        assert alarms.after_evaluation(1, [0.0, 0.0, 0.0, math.nan], [5.0, 6.0, 7.0, 99.0]) == []
        gold = [value - fall for value, fall in zip([5.0, 6.0, 7.0], falls, strict=True)]
        assert len(alarms.after_evaluation(2, [1.0, 1.0, 1.0, 9.0], [*gold, math.nan])) == number


# State ----------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_raises_the_same_alarms(tmp_path: Path) -> None:
    series = healthy(20) + [{**HEALTHY, "kl": 90.0, "entropy": 0.01}] * 12 + [HEALTHY] * 20
    judged = evaluations([0, 1, 2, 3, 4], [2, 1, 0, -1, 2])

    def news(alarms: Alarms, step: int) -> list[dict[str, Any]]:
        own = alarms.after_step(step, series[step])
        return own + (alarms.after_evaluation(step, *judged[step // 10 - 1]) if step % 10 == 0 and step else [])

    whole = Alarms(GuardOptions())
    expected = [line for step in range(len(series)) for line in news(whole, step)]
    assert {line["alarm"] for line in expected} == {"kl", "entropy", "gold"}
    for split in range(0, len(series), 3):
        first, second = Alarms(GuardOptions()), Alarms(GuardOptions())
        found = [line for step in range(split) for line in news(first, step)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        found += [line for step in range(split, len(series)) for line in news(second, step)]
        assert json.dumps(found) == json.dumps(expected), split


# In a run -------------------------------------------------------------------------------------------------------------


def test_a_run_records_and_tells_an_alarm_and_names_the_last_checkpoint(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "alarm_window": 2, "min_entropy_ratio": 0.999, "learning_rate": 3e-2}
    trainer = make_trainer(tmp_path / "warn", **settings, save_steps=1)
    notes: list[str] = []
    trainer.view.note = notes.append
    trainer.train()
    alarms = read(tmp_path / "warn" / "alarms.jsonl")
    entropies = [line["entropy"] for line in read(tmp_path / "warn" / "metrics.jsonl")]
    means = [(a + b) / 2 for a, b in itertools.pairwise(entropies)]
    step = 2 + next(n for n, mean in enumerate(means) if mean < 0.999 * means[0])
    assert (alarms[0]["step"], alarms[0]["alarm"]) == (step, "entropy")
    assert alarms[0]["value"] == pytest.approx(means[step - 2])
    assert alarms[0]["last_checkpoint"] == f"checkpoints/step-{step - 1:06d}"
    (note,) = (note for note in notes if note.startswith(f"Alarm after step {step}: "))
    assert note.endswith(f"; the last checkpoint is {tmp_path / 'warn' / 'checkpoints' / f'step-{step - 1:06d}'}.")

    trainer = make_trainer(tmp_path / "stop", **settings, alarms="stop")
    with pytest.raises(GuardStop, match=r"--alarms is stop.*entropy .*--min_entropy_ratio.*there is no checkpoint yet"):
        trainer.train()
    assert [line["step"] for line in read(tmp_path / "stop" / "metrics.jsonl")] == list(range(1, step + 1))
    assert (tmp_path / "stop" / "checkpoints" / f"step-{step:06d}").is_dir()


def test_evaluations_are_judged_by_the_gold_reward(tmp_path: Path) -> None:
    """The policy learns to write vowels; gold likes everything else, and is never asked in training."""
    asked = []

    def consonants(completions: list[str], **_: Any) -> list[float | None]:
        asked.append(len(completions))
        return [None if not text else -vowels([text])[0] for text in completions]

    folder = tmp_path / "out"
    trainer = make_trainer(
        folder,
        eval_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS]),
        gold_reward_funcs=[consonants, lively],
        **{"max_steps": 16, "batch_size": 8, "num_generations": 4, "learning_rate": 2e-2, "beta": 0.0},
        eval_steps=8,
        gold_evaluations=2,
    )
    before = trainer.evaluate()
    asked.clear()
    trainer.train()
    assert len(asked) == 3, "evaluations after steps 0, 8 and 16"
    lines = read(folder / "eval.jsonl")
    evaluation = trainer.evaluate()
    texts = [c.text for c in evaluation.rollout.samples]
    literal = [x - v for x, v in zip(lively(texts), vowels(texts), strict=True)]
    assert lines[-1]["eval/gold"] == pytest.approx(sum(literal) / len(literal), rel=1e-5)
    greedy = [c.text for c in before.rollout.greedy]
    of_greedy = [x - v for x, v in zip(lively(greedy), vowels(greedy), strict=True)]
    assert lines[0]["eval/gold/greedy"] == pytest.approx(sum(of_greedy) / len(of_greedy), rel=1e-5)
    assert lines[0]["eval/gold/greedy"] != lines[0]["eval/gold"]
    assert evaluation.gold is not None
    assert evaluation.gold.tolist() == pytest.approx(literal)
    falls = [line for line in read(folder / "alarms.jsonl") if line["alarm"] == "gold"]
    assert falls
    gains = [b["eval/reward"] - a["eval/reward"] for a, b in itertools.pairwise(lines)]
    index = [line["step"] for line in lines].index(falls[0]["step"])
    assert gains[index - 1] > 0
    assert falls[0]["value"] == pytest.approx(lines[index]["eval/gold"] - lines[index - 1]["eval/gold"], rel=1e-4)


def test_an_evaluation_without_most_of_its_rewards_decides_nothing(tmp_path: Path) -> None:
    """The rewards rise from evaluation to evaluation, and in the second one three quarters of them are missing."""

    def rising(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        step, of_training = trainer_state.global_step, len(completions) == 8
        return [math.nan if step == 2 and row % 4 and not of_training else step for row in range(len(completions))]

    for allowed, best in ((0.5, 1), (0.8, 2)):
        trainer = make_trainer(
            tmp_path / str(allowed),
            rising,
            eval_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS[:8]]),
            **{"max_steps": 2, "batch_size": 4, "eval_steps": 1, "max_missing_rewards": allowed},
        )
        trainer.train()
        assert trainer.state.best_global_step == best
        assert [line["eval/reward"] for line in read(tmp_path / str(allowed) / "eval.jsonl")] == [0.0, 1.0, 2.0]
    values = {"reward": np.array([1.0, np.nan]), "rewards/a/mean": np.array([np.nan, np.nan]), "kl": np.ones(2)}
    evaluation = Evaluation(trainer.evaluate().rollout, trainer.evaluate().rewards, values)
    assert evaluation.deciding("reward", 0.5) == 1.0
    assert evaluation.deciding("reward", 0.4) is None
    assert evaluation.deciding("rewards/a/mean", 1.0) is None
    assert evaluation.deciding("kl", 0.0) == 1.0


def test_what_cannot_be_is_refused() -> None:
    inputs = {"model": "m", "train_dataset": "d", "reward_funcs": ["f.py:f"]}
    with pytest.raises(UserError, match=r"--gold_reward_funcs is g.py:g: .*set --eval_dataset too"):
        TrainInputs(**inputs, gold_reward_funcs=["g.py:g"])
    with pytest.raises(UserError, match=r"--max_kl is 0"):
        ReMaxConfig(max_kl=0)
    for name, value in {
        "max_skipped_steps": -1,
        "alarm_window": 0,
        "max_truncated": 1.5,
        "max_length_ratio": 1.0,
        "min_entropy_ratio": 1.0,
        "gold_evaluations": 1,
    }.items():
        with pytest.raises(UserError, match=f"--{name} is {value}: "):
            GuardOptions(**{name: value})

"""The benchmark of the greedy baseline: its figures against numbers worked out by hand and by enumeration."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks import greedy_baseline  # noqa: E402
from benchmarks.greedy_baseline import Table, describe  # noqa: E402


def test_three_prompts_by_hand() -> None:
    table = Table(np.array([[1.0, 3.0], [4.0, 8.0], [0.0, 0.0]]), np.array([3.0, 4.0, 1.0]))

    shown = describe(table)

    # Means 2, 6, 0 and variances 2, 8, 0; a mean of two samples has half of these, 5/3 on average.
    assert shown["within_prompts"] == pytest.approx(10 / 3)
    missed = {"none": 40 / 3 - 5 / 3, "constant": 56 / 9 - 5 / 3 * 2 / 3, "greedy": 6 / 3 - 5 / 3, "expected": 0.0}
    assert shown["missed"] == pytest.approx(missed)
    assert shown["between_prompts"] == shown["missed"]["constant"]
    assert shown["squared_advantage"] == pytest.approx({name: 10 / 3 + own for name, own in missed.items()})
    assert (shown["mean_reward"], shown["mean_greedy_reward"]) == pytest.approx((8 / 3, 8 / 3))
    assert shown["mean_minus_greedy"] == pytest.approx(0.0)
    # Of mean on greedy: products of deviations add up to 26/3, squares of greedy's to 14/3.
    assert shown["regression_of_mean_on_greedy"]["slope"] == pytest.approx(26 / 14)
    assert shown["correlation_greedy_mean"] == pytest.approx(26 / 3 / (56 / 3 * 14 / 3) ** 0.5)
    assert shown["greedy_above_mean"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("num_samples", [2, 5])
def test_what_is_missed_does_not_depend_on_the_number_of_samples(num_samples: int) -> None:
    """Many tables of the same prompts: on average each figure is the one of the expected rewards themselves."""
    generator = np.random.default_rng(0)
    expected, greedy, spread = np.array([-1.0, 0.5, 2.0]), np.array([-0.5, 1.5, 1.0]), 1.5
    tables = [Table(expected[:, None] + spread * generator.normal(size=(3, num_samples)), greedy) for _ in range(4000)]

    shown = [describe(table) for table in tables]

    exact = {"none": (expected**2).mean(), "constant": expected.var(), "greedy": ((expected - greedy) ** 2).mean()}
    for name, square in exact.items():
        assert np.mean([own["missed"][name] for own in shown]) == pytest.approx(square, abs=0.08)
        noise = spread**2 + square
        assert np.mean([own["squared_advantage"][name] for own in shown]) == pytest.approx(noise, abs=0.12)


def test_a_missing_reward_is_not_averaged_over() -> None:
    rewards = greedy_baseline.Draw(None, _Rewards(torch.tensor([1.0, torch.nan]), torch.tensor([2.0])))
    with pytest.raises(SystemExit, match="no reward"):
        greedy_baseline.table_of(rewards)


class _Rewards:
    def __init__(self, sampled: torch.Tensor, greedy: torch.Tensor) -> None:
        self.sampled, self.greedy = sampled, greedy


def test_variances_under_every_baseline_are_the_enumerated_ones(tmp_path: Path) -> None:
    """Completions of one token, whose gradients and probabilities can all be written down."""
    from remax.config import LabConfig
    from test_lab import PROMPTS, TokenReward, components, scores

    parts = components(max_completion_length=1)
    exact: dict[str, float] = dict.fromkeys(greedy_baseline.BASELINES, 0.0)
    by_prompt = [(*scores(parts.policy, prompt), TokenReward.table.double() + prompt.index) for prompt in PROMPTS]
    means = torch.stack([probs @ rewards for probs, _, rewards in by_prompt])
    for (probs, rows, rewards), mean in zip(by_prompt, means, strict=True):
        signal = ((probs * rewards) @ rows).square().sum()
        baselines = {"none": 0.0, "constant": means.mean(), "greedy": rewards[probs.argmax()], "expected": mean}
        for name, baseline in baselines.items():
            exact[name] += float((probs * (rewards - baseline) ** 2) @ rows.square().sum(1) - signal) / 4
    greedy = np.array([float(rewards[probs.argmax()]) for probs, _, rewards in by_prompt])
    table = Table(means.numpy()[:, None].repeat(2, axis=1), greedy)
    args = LabConfig(methods=["remax", "reinforce"], num_gradients=100, kl_mode="none", seed=0)

    measured = greedy_baseline.gradients(parts, args, PROMPTS, table, tmp_path)["baselines"]

    assert max(exact.values()) > 1.5 * min(exact.values()), "baselines that cannot be told apart prove nothing"
    for name, own in measured.items():
        low, high = own["interval"]
        assert exact[name] / 2 < low <= exact[name] <= high < exact[name] * 2, name
    ratio = measured["none"]["variance"] / measured["expected"]["variance"]
    assert measured["none"]["ratio_to_expected"] == pytest.approx(ratio)


def test_the_command_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the measuring itself replaced: what it writes, and that both pictures are drawn of it."""
    sampled = [[1.0, 2.0], [0.0, 4.0], [3.0, 3.5]]
    shown = describe(Table(np.array(sampled), np.array([1.5, 2.0, 3.0])))
    own = {"ratio_to_expected": 1.2, "ratio_interval": (1.1, 1.3)}
    case = {"rewards": shown, "gradients": {"baselines": dict.fromkeys(greedy_baseline.BASELINES, own)}}
    seen = []

    def measure(*arguments: object) -> dict[str, object]:
        seen.append(arguments)
        return case | {"greedy": [1.5, 2.0, 3.0], "sampled": sampled}

    monkeypatch.setattr(greedy_baseline, "measure", measure)
    cases = ["--case", "one", "m", "p.jsonl", "--case", "two", "m2", "p2.jsonl"]

    output = tmp_path / "x.json"
    greedy_baseline.main([*cases, "--reward_model", "r", "--output", str(output), "--images", str(tmp_path)])

    results = json.loads(output.read_text(encoding="utf-8"))
    assert [arguments[:3] for arguments in seen] == [("m", "r", "p.jsonl"), ("m2", "r", "p2.jsonl")]
    assert list(results["cases"]) == ["one", "two"]
    assert {"hardware", "versions", "OMP_NUM_THREADS", "seconds", "sizes"} < set(results)
    for name in ("greedy-baseline.png", "greedy-variance.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"

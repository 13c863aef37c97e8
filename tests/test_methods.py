"""Every method through the real loop: invariances of a step, missing rewards, states, and that it learns."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remax.interfaces import Prompt
from toy_training import calm_policy, make_trainer, policy, read, step_result, vowels

METHODS: dict[str, dict[str, Any]] = {
    "remax": {"method": "remax"},
    "leave_one_out": {"baseline": "leave_one_out"},
    "mixed": {"baseline": "mixed"},
    "cached": {"greedy_every": 2},
    "reinforce": {"method": "reinforce"},
    "moving_average": {"method": "reinforce", "baseline": "moving_average"},
    "rloo": {"method": "rloo"},
    "grpo": {"method": "grpo"},
    "dr_grpo": {"method": "dr_grpo"},
    "ppo": {"method": "ppo", "num_ppo_epochs": 2, "num_mini_batches": 3},
}
GREEDY = ("remax", "mixed", "cached")
each_method = pytest.mark.parametrize("name", METHODS)


def flat(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def use_sgd(trainer: Any, lr: float = 0.1) -> Any:
    """Adam divides by the gradient's size: where that is nearly 0, rounding would decide the sign of a step."""
    trainer.policy.optimizer = torch.optim.SGD(trainer.parts.policy.parameters(), lr=lr)
    if hasattr(trainer.method, "critic"):
        trainer.method.critic.optimizer = torch.optim.SGD(trainer.method.critic.network.parameters(), lr=lr)
    return trainer


@each_method
def test_a_step_depends_on_neither_micro_batches_nor_rollout_groups(tmp_path: Path, name: str) -> None:
    settings = {**METHODS[name], "beta": 0.2}
    gradient, weights = step_result(tmp_path / "whole", **settings)
    assert gradient.norm() > 1e-2
    for variant in ({"micro_batch_tokens": 25}, {"micro_batch_tokens": 60, "rollout_batch_size": 5}):
        other_gradient, other_weights = step_result(tmp_path / str(variant), **settings, **variant)
        assert distance(other_gradient, gradient) < 1e-6
        # PPO takes six updates, each on what the rounding of the one before has moved.
        assert distance(other_weights, weights) < (5e-6 if name == "ppo" else 1e-6)


def test_the_value_model_does_not_depend_on_micro_batches_either(tmp_path: Path) -> None:
    moved = []
    for size in (25, 16384):
        settings = {**METHODS["ppo"], "beta": 0.0, "batch_size": 8, "micro_batch_tokens": size}
        trainer = use_sgd(make_trainer(tmp_path / str(size), model=calm_policy(1), **settings), lr=0.01)
        torch.manual_seed(0)
        network = trainer.method.critic.network
        nn.init.normal_(network.head.weight)
        start = flat(network)
        trainer.step(trainer.order.batch(1), 1)
        moved.append(flat(network) - start)
    assert moved[0].norm() > 1e-2
    assert distance(*moved) < 1e-4, "a difference of weights has fewer digits than they"


@each_method
def test_a_missing_reward_is_a_sample_that_was_not_drawn(tmp_path: Path, name: str) -> None:
    """Three samples a prompt of which the last has no reward, against two samples: the tokens are the same."""

    def without_third(completions: list[str], **_: Any) -> list[float | None]:
        rewards: list[float | None] = list(vowels(completions))
        for prompt in range(4):
            rewards[3 * prompt + 2] = (None, math.nan)[prompt % 2]
        return rewards

    results, records = [], []
    for num_generations, reward in ((2, vowels), (3, without_third)):
        trainer = make_trainer(
            tmp_path / str(num_generations),
            reward,
            model=calm_policy(1),
            beta=0.2,
            num_generations=num_generations,
            **METHODS[name],
        )
        use_sgd(trainer)
        start = flat(trainer.parts.policy)
        records.append(trainer.step(trainer.order.batch(1), 1))
        results.append(flat(trainer.parts.policy) - start)
    two, three = records
    assert three.trained.tolist() == [True, True, False] * 4
    assert [c.token_ids for c in two.rollout.samples] == [
        c.token_ids for c, kept in zip(three.rollout.samples, three.trained.tolist(), strict=True) if kept
    ]
    torch.testing.assert_close(three.advantages[three.trained], two.advantages, rtol=1e-5, atol=1e-6)
    assert results[0].norm() > 1e-3
    assert distance(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("name", ["rloo", "leave_one_out", "mixed", "grpo"])
def test_a_sample_without_another_to_compare_with_is_left_out(tmp_path: Path, name: str) -> None:
    def patchy(completions: list[str], **_: Any) -> list[float | None]:
        return [None if row == 1 else r for row, r in enumerate(vowels(completions))]

    trainer = make_trainer(tmp_path / "out", patchy, **METHODS[name])
    record = trainer.step(trainer.order.batch(1), 1)
    assert record.trained.tolist() == [False, False] + [True] * 6


def test_without_any_reward_nothing_moves(tmp_path: Path) -> None:
    for name, settings in METHODS.items():
        trainer = make_trainer(tmp_path / name, lambda completions, **_: [None] * len(completions), **settings)
        before = flat(trainer.parts.policy)
        record = trainer.step(trainer.order.batch(1), 1)
        assert not record.trained.any()
        assert torch.equal(flat(trainer.parts.policy), before), name


@pytest.mark.parametrize("name", ["remax", "leave_one_out", "mixed", "cached", "rloo", "grpo", "dr_grpo"])
def test_equal_rewards_are_no_signal_and_move_nothing(tmp_path: Path, name: str) -> None:
    trainer = make_trainer(tmp_path / "out", lambda completions, **_: [3.0] * len(completions), **METHODS[name], beta=0)
    before = flat(trainer.parts.policy)
    record = trainer.step(trainer.order.batch(1), 1)
    assert record.no_signal.all()
    assert record.grad_norm == 0
    assert torch.equal(flat(trainer.parts.policy), before)


def test_reinforce_takes_equal_rewards_for_a_signal(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", lambda completions, **_: [3.0] * len(completions), method="reinforce")
    before = flat(trainer.parts.policy)
    record = trainer.step(trainer.order.batch(1), 1)
    assert not record.no_signal.any()
    assert not torch.equal(flat(trainer.parts.policy), before)


# Greedy completions ---------------------------------------------------------------------------------------------------


@each_method
def test_greedy_completions_are_drawn_where_a_baseline_needs_them(tmp_path: Path, name: str) -> None:
    trainer = make_trainer(tmp_path / "out", max_steps=1, **METHODS[name])
    trainer.train()
    (metrics,) = read(tmp_path / "out" / "metrics.jsonl")
    records = read(tmp_path / "out" / "completions.jsonl")
    of_greedy = ("reward/greedy", "reward/gap", "completions/greedy_mean_length")
    if name in GREEDY:
        assert all(math.isfinite(metrics[key]) for key in of_greedy)
        for record in records:
            assert record["greedy_reward"] == pytest.approx(vowels([record["greedy_completion"]])[0])
    else:
        assert [metrics[key] for key in of_greedy] == [None] * 3
        assert all(record["greedy_completion"] is None and record["greedy_reward"] is None for record in records)
    assert math.isfinite(metrics["reward"])
    assert ("baseline/alpha" in metrics) == (name == "mixed")


@pytest.mark.parametrize("baseline", ["greedy", "mixed"])
def test_a_cached_greedy_reward_is_that_of_the_visit_before(tmp_path: Path, baseline: str) -> None:
    """Two steps make an epoch of eight prompts: drawn in the first and the third."""
    trainer = make_trainer(tmp_path / "out", greedy_every=2, baseline=baseline, num_generations=2)
    held: dict[int, float] = {}
    for step in range(1, 7):
        record = trainer.step(trainer.order.batch(step), step)
        drawn = step in (1, 2, 5, 6)
        prompts = [sample.prompt.index for sample in record.rollout.samples[::2]]
        assert [c.prompt.index for c in record.rollout.greedy] == (prompts if drawn else [])
        if drawn:
            held |= dict(zip(prompts, vowels([c.text for c in record.rollout.greedy]), strict=True))
        expected = [held[index] for index in prompts for _ in range(2)]
        assert record.credit.greedy.tolist() == pytest.approx(expected)
        if baseline == "greedy":
            rewards = vowels([c.text for c in record.rollout.samples])
            differences = [r - g for r, g in zip(rewards, expected, strict=True)]
            assert record.advantages.tolist() == pytest.approx(differences)
    assert len(held) == 8


def test_only_prompts_that_are_due_get_a_greedy_completion(tmp_path: Path) -> None:
    """Another batch than the first: some of its prompts were seen."""
    trainer = make_trainer(tmp_path / "out", greedy_every=2)
    prompts = trainer.parts.prompts
    trainer.step(prompts[:3], 1)
    record = trainer.step([prompts[2], prompts[5], prompts[0], prompts[6]], 2)
    assert [c.prompt.index for c in record.rollout.greedy] == [5, 6]
    assert record.trained.all()


# State ----------------------------------------------------------------------------------------------------------------


@each_method
def test_the_state_of_a_method_determines_its_next_credit(tmp_path: Path, name: str) -> None:
    """Another trainer takes it up, with the same weights; the state was copied before the first one went on."""
    settings = {**METHODS[name], "num_generations": 3, "beta": 0.1}
    if name == "mixed":
        settings["greedy_every"] = 3
    if name == "ppo":
        settings |= {"target_kl": 0.01, "kl_horizon": 20}
    first = make_trainer(tmp_path / "first", **settings)
    for step in (1, 2):
        first.step(first.order.batch(step), step)
    state = copy.deepcopy(first.method.state_dict())
    second = make_trainer(tmp_path / "second", **settings)
    second.method.load_state_dict(copy.deepcopy(state))
    assert second.method.state_dict() == state
    prompts: list[Prompt] = first.order.batch(3)
    wanted = [trainer.method.greedy_wanted(prompts) for trainer in (first, second)]
    assert wanted[0] == wanted[1]
    rollout = first.parts.roll_out(prompts, num_samples=3, greedy=wanted[0], seed=1, step=3)
    rewards = first.parts.score(rollout)
    credits = [trainer.method.credit(rollout, rewards) for trainer in (first, second)]
    for one, other in zip(*credits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert second.method.state_dict() == first.method.state_dict()
    if name in ("mixed", "cached", "moving_average"):
        fresh = make_trainer(tmp_path / "fresh", **settings).method
        assert fresh.state_dict() != state
        if name == "moving_average":
            assert not torch.equal(fresh.credit(rollout, rewards).advantages, credits[0].advantages)
        else:
            assert fresh.greedy_wanted(prompts) != wanted[0]


def test_the_recorded_alpha_is_the_one_that_the_step_used(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", baseline="mixed", num_generations=3)
    expected = 0.5
    for step in (1, 2, 3):
        record = trainer.step(trainer.order.batch(step), step)
        assert record.metrics["baseline/alpha"] == pytest.approx(expected)
        state = trainer.method.state_dict()["baseline"]
        expected = min(1.0, max(0.0, state["products"] / state["squares"]))
        assert expected != 0.5


# Learning -------------------------------------------------------------------------------------------------------------


@each_method
def test_it_learns(tmp_path: Path, name: str) -> None:
    """From one vowel in seven characters to most, on fresh samples: of 2.0, eight characters of a quarter each."""
    settings = {**METHODS[name], "num_generations": 4, "beta": 0.0}
    if name == "ppo":
        settings |= {"num_ppo_epochs": 2, "num_mini_batches": 1}
    trainer = make_trainer(
        tmp_path / "out",
        model=policy(),
        max_steps=60,
        batch_size=8,
        learning_rate=2e-2,
        log_completions=False,
        **settings,
    )
    rewards = []
    for step in range(1, 61):
        rewards.append(trainer.step(trainer.order.batch(step), step).rewards.sampled.mean().item())
        if sum(rewards[-5:]) / 5 > 1.5:
            break
    assert rewards[0] < 0.6
    assert sum(rewards[-5:]) / 5 > 1.5, rewards

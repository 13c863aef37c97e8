"""Settings made in Python are checked as those of the command line are."""

from pathlib import Path

import pytest

from remax import ReMaxConfig, UserError
from remax.config import RewardConfig, SFTConfig
from remax.demo.settings import DemoConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_mode": "togo"}, "--kl_mode is togo: that is not one of to_go, .*; did you mean to_go"),
        ({"kl_estimator": "k3"}, "--kl_estimator is k3: that is not one of exact, k2"),
        ({"loss_aggregation": "sequences"}, "did you mean sequence"),
        ({"reward_clip_mode": "diff"}, "--reward_clip_mode is diff"),
        ({"method": "pppo"}, "--method is pppo: that is not one of remax, reinforce, .*; did you mean ppo"),
        ({"dtype": "float16x"}, "--dtype is float16x"),
        ({"learning_rate": "1e-6"}, "--learning_rate is '1e-6': that is not a number"),
        ({"max_steps": 1.5}, "--max_steps is 1.5: that is not a whole number"),
        ({"bf16": 1}, "--bf16 is 1: that is not True or False"),
        ({"num_generations": True}, "--num_generations is True"),
        ({"seed": -1}, "--seed is -1"),
        ({"lora_alpha": 0}, "--lora_alpha is 0"),
        ({"weight_decay": -1.0}, "--weight_decay is -1.0"),
        ({"adam_beta1": 1.5}, "--adam_beta1 is 1.5"),
        ({"warmup_steps": 10, "lr_scheduler_type": "constant"}, "--lr_scheduler_type constant_with_warmup"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"epsilon": 0.2}, "ReMaxConfig has no setting epsilon: .*there is no ratio to clip"),
        ({"learning_rat": 1.0}, "did you mean learning_rate"),
        ({"method": "rloo", "num_generations": 1}, "--num_generations is 1: the leave_one_out baseline .* 2 or more"),
        ({"baseline": "mixed", "num_generations": 1}, "--num_generations is 1: the mixed baseline"),
        ({"method": "grpo", "baseline": "greedy"}, "--baseline is greedy: --method grpo has no such baseline"),
        ({"method": "rloo", "greedy_every": 2}, "--greedy_every is 2: .* draws no greedy completions"),
        ({"method": "grpo", "loss_aggregation": "token"}, "--loss_aggregation is token: .*--method dr_grpo"),
        ({"method": "ppo", "kl_mode": "loss"}, "--kl_mode is loss: .*; set to_go or none"),
        ({"method": "ppo", "reward_clip": 1.0, "reward_clip_mode": "difference"}, "--reward_clip_mode is difference"),
        ({"method": "ppo", "beta": 0.0, "target_kl": 5.0}, "--target_kl is 5.0: there is no KL to adapt to"),
        ({"method": "ppo", "num_mini_batches": 33}, "--num_mini_batches is 33: a step has only 32 completions"),
        ({"method": "ppo", "target_kl": 5.0, "kl_horizon": 20}, "--kl_horizon is 20: .* 32 completions .* 32 or more"),
        ({"cliprange": 0.3}, "--cliprange is 0.3: --method remax has no such step and would ignore it"),
    ],
)
def test_a_bad_setting_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReMaxConfig(**settings)


def test_paths_and_single_texts_are_taken_as_they_are_meant() -> None:
    config = ReMaxConfig(output_dir=Path("some") / "where", report_to="none", beta=1)
    assert config.output_dir == str(Path("some") / "where")
    assert config.report_to == ["none"]
    assert config.beta == 1


@pytest.mark.parametrize(
    ("method", "baseline", "num_generations"),
    [
        ("remax", "greedy", 1),
        ("reinforce", "none", 1),
        ("rloo", "leave_one_out", 2),
        ("grpo", "group_mean", 2),
        ("dr_grpo", "group_mean", 2),
        ("ppo", "value", 1),
    ],
)
def test_a_method_decides_its_baseline_and_its_number_of_samples(
    method: str, baseline: str, num_generations: int
) -> None:
    config = ReMaxConfig(method=method)
    assert (config.baseline, config.num_generations) == (baseline, num_generations)
    assert ReMaxConfig(method=method, num_generations=4).num_generations == 4


def test_stages_have_rates_of_their_own() -> None:
    assert SFTConfig().learning_rate == RewardConfig().learning_rate == 1e-5
    assert ReMaxConfig().learning_rate == 1e-6


def test_a_demo_that_cannot_work_is_refused_before_it_starts() -> None:
    with pytest.raises(UserError, match="--num_pairs is 1500: each needs an opening of its own"):
        DemoConfig(num_stories=100)
    with pytest.raises(UserError, match="--num_pairs is 200: 200 of them are held out"):
        DemoConfig(num_pairs=200)

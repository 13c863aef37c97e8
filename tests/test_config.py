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
        ({"method": "ppo"}, "--method is ppo"),
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


def test_stages_have_rates_of_their_own() -> None:
    assert SFTConfig().learning_rate == RewardConfig().learning_rate == 1e-5
    assert ReMaxConfig().learning_rate == 1e-6


def test_a_demo_that_cannot_work_is_refused_before_it_starts() -> None:
    with pytest.raises(UserError, match="--num_pairs is 1500: each needs an opening of its own"):
        DemoConfig(num_stories=100)
    with pytest.raises(UserError, match="--num_pairs is 200: 200 of them are held out"):
        DemoConfig(num_pairs=200)

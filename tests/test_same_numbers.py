"""Optimisations of the loop change no number: a seeded step with each of them on and off."""

import functools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from remax.components import Components
from remax.methods import critic_free
from toy_training import calm_policy, lively, make_trainer, watch_gradients

NEARLY_NOTHING = 1e-30
"""A beta that no float32 return notices, but with which rows without advantage are not skipped."""


def half_without_signal(completions: list[str], **_: Any) -> list[float]:
    """Rewards of 4 samples and their 4 greedy completions: two samples are as good as their baselines."""
    rewards = lively(completions)
    return [*rewards[:2], 0.5, 0.5, *rewards[4:6], 0.5, 0.5]


def close(gradient: torch.Tensor, expected: torch.Tensor) -> bool:
    assert expected.norm() > 1e-2
    return bool((gradient - expected).norm() / expected.norm() < 1e-6)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_rows_without_signal_are_not_differentiated(
    tmp_path: Path, aggregation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    differentiated: list[int] = []
    own = critic_free.policy_gradient_loss

    def watched(network: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        differentiated.append(len(batch.input_ids) if torch.is_grad_enabled() else 0)
        return own(network, batch, *args, **kwargs)

    monkeypatch.setattr(critic_free, "policy_gradient_loss", watched)
    results = {}
    for beta in (0.0, NEARLY_NOTHING):
        differentiated.clear()
        trainer = make_trainer(
            tmp_path / str(beta), half_without_signal, model=calm_policy(1), beta=beta, loss_aggregation=aggregation
        )
        gradients = watch_gradients(trainer)
        record = trainer.step(trainer.order.batch(1), 1)
        results[beta] = gradients[0], record, sum(differentiated)
    (gradient, record, num_rows), (expected, full, num_all) = results.values()
    assert (num_rows, num_all) == (2, 4)
    assert close(gradient, expected)
    assert record.no_signal.tolist() == full.no_signal.tolist() == [False, False, True, True]
    for name in ("entropy", "logprob_difference"):
        torch.testing.assert_close(getattr(record, name), getattr(full, name))
    assert record.loss == pytest.approx(full.loss, abs=1e-6)


def test_a_step_without_any_signal_is_one_with_a_gradient_of_zero(tmp_path: Path) -> None:
    """Momentum and decay go on."""
    weights = {}
    for beta in (0.0, NEARLY_NOTHING):
        trainer = make_trainer(
            tmp_path / str(beta), lively, model=calm_policy(1), beta=beta, weight_decay=0.1, max_grad_norm=1.0
        )
        trainer.step(trainer.order.batch(1), 1)
        before = torch.cat([p.detach().flatten().clone() for p in trainer.parts.policy.parameters()])
        trainer.parts.reward_functions[0].function = lambda completions, **_: [1.0] * len(completions)
        record = trainer.step(trainer.order.batch(2), 2)
        assert record.grad_norm < 1e-20
        assert record.no_signal.all() or beta
        weights[beta] = torch.cat([p.detach().flatten() for p in trainer.parts.policy.parameters()])
        assert (weights[beta] - before).norm() > 1e-3
    torch.testing.assert_close(weights[0.0], weights[NEARLY_NOTHING], rtol=1e-5, atol=1e-6)


def test_the_reference_may_run_beside_the_reward_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, list[bool]] = {"reference": [], "reward": []}

    def rewards(completions: list[str], **_: Any) -> list[float]:
        threads["reward"].append(threading.current_thread() is threading.main_thread())
        return lively(completions)

    own = Components.reference_logprobs

    def watched(*args: Any) -> Any:
        threads["reference"].append(threading.current_thread() is threading.main_thread())
        return own(*args)

    monkeypatch.setattr(Components, "reference_logprobs", watched)
    steps = []
    for overlaps in (False, True):
        monkeypatch.setattr(Components, "overlaps", overlaps)
        trainer = make_trainer(tmp_path / str(overlaps), rewards, model=calm_policy(1), beta=0.1)
        trainer.parts.policy.load_state_dict(calm_policy(2).state_dict())
        gradients = watch_gradients(trainer)
        record = trainer.step(trainer.order.batch(1), 1)
        steps.append((gradients[0], record.kl))
    assert threads == {"reference": [True, False], "reward": [True, True]}
    assert torch.equal(steps[0][0], steps[1][0])
    assert torch.equal(steps[0][1], steps[1][1])
    assert steps[0][1].abs().max() > 1e-2


def test_what_the_reference_raises_beside_the_rewards_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Components, "reference_logprobs", failing)
    monkeypatch.setattr(Components, "overlaps", True)
    trainer = make_trainer(tmp_path / "out", lively, beta=0.1)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.step(trainer.order.batch(1), 1)


@pytest.mark.parametrize("kl", [{"beta": 0.1}, {"beta": 0.1, "kl_mode": "loss"}, {"beta": 0.0}])
def test_the_reference_is_asked_once_and_only_for_samples(
    tmp_path: Path, kl: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the exact KL of the loss it runs beside the policy instead, and without a KL there is none."""
    asked: list[int] = []
    own = Components.token_logprobs
    monkeypatch.setattr(
        Components,
        "token_logprobs",
        functools.wraps(own)(lambda self, scorer, rows, *a: asked.append(len(rows)) or own(self, scorer, rows, *a)),
    )
    trainer = make_trainer(tmp_path / "out", lively, **kl)
    trainer.step(trainer.order.batch(1), 1)
    assert asked == ([4] if kl == {"beta": 0.1} else [])

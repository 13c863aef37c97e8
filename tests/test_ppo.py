"""PPO in the real loop: its updates against plain forward passes, and how a step is cut into updates."""

import copy
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remax.batching import collate
from remax.components import Rewards
from remax.errors import GuardStop
from remax.interfaces import Completion
from remax.methods import ppo
from remax.metrics import StepRecord, step_metrics
from toy_training import PROMPTS, calm_policy, make_trainer, read, vowels

ONE_UPDATE = {"num_ppo_epochs": 1, "num_mini_batches": 1}
Losses = tuple[list[Tensor], list[Tensor]]


class RecordingSGD(torch.optim.SGD):
    """Plain gradient descent that remembers every gradient."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__(network.parameters(), lr=lr)
        self.network = network
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.network.parameters()]
        self.gradients.append(torch.cat([grad.flatten() for grad in grads]))
        super().step()


def make_ppo(folder: Path, reward_funcs: Any = vowels, *, lr: float = 0.05, **settings: Any) -> Any:
    """A trainer whose policy has left its reference, whose value model says something, and which takes plain SGD."""
    trainer = make_trainer(
        folder, reward_funcs, model=calm_policy(1), **{"method": "ppo", "batch_size": 8, "beta": 0.2, **settings}
    )
    trainer.parts.policy.load_state_dict(calm_policy(2).state_dict())
    torch.manual_seed(4)
    nn.init.normal_(trainer.method.critic.network.head.weight, std=0.3)
    nn.init.normal_(trainer.method.critic.network.head.bias)
    trainer.policy.optimizer = RecordingSGD(trainer.policy.network, lr)
    trainer.method.critic.optimizer = RecordingSGD(trainer.method.critic.network, lr=0.05)
    return trainer


# Oracles: one unpadded sequence at a time -----------------------------------------------------------------------------


def literal_logprobs(model: Any, sample: Completion, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    ids = torch.tensor([sample.prompt.token_ids + sample.token_ids])
    logits = model(ids).logits[0, len(sample.prompt.token_ids) - 1 : -1] / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.sort(descending=True).values[:, top_k - 1 : top_k], -math.inf)
    return logits.log_softmax(-1).gather(-1, torch.tensor(sample.token_ids).unsqueeze(-1)).squeeze(-1)


def literal_values(value_model: Any, sample: Completion) -> Tensor:
    ids = torch.tensor([sample.prompt.token_ids + sample.token_ids])
    states = value_model.body(input_ids=ids).last_hidden_state[0, len(sample.prompt.token_ids) - 1 : -1]
    return value_model.head(states).squeeze(-1)


def literal_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    delta = [r + gamma * after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0], strict=True)]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(delta))) for t in range(len(delta))]


class Literal:
    """What a step should make of its samples, from copies of the models that were taken before it."""

    def __init__(self, trainer: Any) -> None:
        self.args = trainer.args
        self.policy = copy.deepcopy(trainer.parts.policy)
        self.reference = trainer.parts.reference.model if trainer.parts.reference else None
        self.value_model = copy.deepcopy(trainer.method.critic.network)

    def observe(self, samples: list[Completion]) -> None:
        args, self.samples = self.args, samples
        self.kl, self.values, plain = [], [], []
        for sample in samples:
            with torch.no_grad():
                values = literal_values(self.value_model, sample)
                ratios = torch.zeros(len(sample.token_ids))
                if self.reference is not None:
                    ratios = literal_logprobs(self.policy, sample, args.temperature, args.top_k)
                    ratios -= literal_logprobs(self.reference, sample, args.temperature)
            reward, clip = vowels([sample.text])[0], args.reward_clip or math.inf
            rewards = [-args.beta * ratio for ratio in ratios.tolist()]
            rewards[-1] += max(-clip, min(clip, reward))
            plain.append(torch.tensor(literal_gae(rewards, values.tolist(), args.gamma, args.lam)))
            self.kl.append(ratios.sum().item())
            self.values.append(values)
        self.returns = [a + v for a, v in zip(plain, self.values, strict=True)]
        self.advantages = plain
        if args.whiten_advantages:
            numbers = torch.cat(plain)
            self.advantages = [(a - numbers.mean()) / numbers.std(correction=0) for a in plain]
        self.num_tokens = len(torch.cat(plain))

    def gradients(self) -> list[Tensor]:
        """Of the first update: REINFORCE with these advantages, and regression on the returns."""
        policy_loss = torch.zeros(())
        value_loss = torch.zeros(())
        for row, sample in enumerate(self.samples):
            logprobs = literal_logprobs(self.policy, sample, self.args.temperature, self.args.top_k)
            policy_loss = policy_loss - (self.advantages[row] * logprobs).sum()
            residuals = self.returns[row] - literal_values(self.value_model, sample)
            value_loss = value_loss + residuals.square().sum() / 2
        count = self.num_tokens if self.args.loss_aggregation == "token" else len(self.samples)
        pairs = (policy_loss / count, self.policy), (value_loss / self.num_tokens, self.value_model)
        results = []
        for loss, network in pairs:
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            results.append(torch.cat([gradient.flatten() for gradient in gradients]))
        return results


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_aggregation": "token", "whiten_advantages": False, "temperature": 0.7},
        {"kl_mode": "none", "gamma": 0.9, "lam": 0.6, "micro_batch_tokens": 40},
        {"reward_clip": 0.2, "num_generations": 2, "whiten_advantages": False},
        {"top_k": 7},
    ],
    ids=["defaults", "token mean, not whitened, cold", "no KL, discounted", "clipped", "truncated"],
)
def test_the_first_update_is_reinforce_with_the_token_advantages_and_regression_on_the_returns(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    trainer = make_ppo(tmp_path / "out", **ONE_UPDATE, **settings)
    literal = Literal(trainer)
    record = trainer.step(trainer.order.batch(1), 1)
    literal.observe(record.rollout.samples)
    expected = literal.gradients()
    for learner, gradient in zip((trainer.policy, trainer.method.critic), expected, strict=True):
        (actual,) = learner.optimizer.gradients
        assert gradient.norm() > 1e-2
        assert (actual - gradient).norm() / gradient.norm() < 1e-5
    # What is recorded of it.
    assert record.grad_norm == pytest.approx(expected[0].norm().item(), rel=1e-4)
    first = torch.stack([own[0] for own in literal.advantages])
    torch.testing.assert_close(record.advantages, first, rtol=1e-4, atol=1e-5)
    kl = torch.tensor(literal.kl if trainer.parts.reference else [math.nan] * len(literal.kl))
    torch.testing.assert_close(record.kl, kl, rtol=1e-4, atol=1e-5, equal_nan=True)
    returns, values = torch.cat(literal.returns), torch.cat(literal.values)
    metrics = record.metrics
    assert metrics["value/loss"] == pytest.approx(((returns - values) ** 2).mean().item() / 2, rel=1e-4)
    assert metrics["value/grad_norm"] == pytest.approx(expected[1].norm().item(), rel=1e-4)
    explained = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert metrics["value/explained_variance"] == pytest.approx(explained.item(), rel=1e-3)
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["beta"] == trainer.args.beta
    assert not record.no_signal.any()
    assert record.entropy.gt(0.1).all()
    assert record.logprob_difference.max() < 1e-4


def test_the_losses_of_some_rows_are_those_of_a_first_update_on_them(tmp_path: Path) -> None:
    trainer = make_ppo(tmp_path / "out", micro_batch_tokens=40)
    literal, parts = Literal(trainer), trainer.parts
    rollout = parts.roll_out(trainer.order.batch(1), num_samples=1, greedy=False, seed=1, step=1)
    rewards = parts.score(rollout)
    ref_logprobs = parts.begin_reference(rollout, trainer.args)()
    record = StepRecord(rollout, rewards, trainer.method.credit(rollout, rewards), ref_logprobs)
    rows = [0, 2, 3, 7]
    sum(trainer.method.losses(record, rows)).backward()
    actual = torch.cat([p.grad.flatten() for p in parts.policy.parameters()])
    literal.observe([rollout.samples[row] for row in rows])
    expected = literal.gradients()[0]
    assert (actual - expected).norm() / expected.norm() < 1e-5
    assert record.entropy.isfinite().tolist() == [row in rows for row in range(8)]


def test_later_updates_compare_with_the_policy_and_the_values_before_the_step(tmp_path: Path) -> None:
    """After large steps many ratios and values are past their bounds; the third update against the formula."""
    settings = {"num_ppo_epochs": 3, "cliprange": 0.05, "cliprange_value": 0.3, "beta": 0.0}
    trainer = make_ppo(tmp_path / "out", lr=0.1, **settings)
    literal = Literal(trainer)
    networks = trainer.parts.policy, trainer.method.critic.network
    before_third: list[Any] = []
    for learner, network in zip((trainer.policy, trainer.method.critic), networks, strict=True):
        own_step = learner.optimizer.step

        def step(optimizer: Any = learner.optimizer, network: Any = network, own_step: Any = own_step) -> None:
            if len(optimizer.gradients) == 2:
                before_third.append(copy.deepcopy(network))
            own_step()

        learner.optimizer.step = step
    record = trainer.step(trainer.order.batch(1), 1)
    literal.observe(record.rollout.samples)
    model, value_model = before_third
    policy_loss, value_loss, num_clipped, num_stopped = torch.zeros(()), torch.zeros(()), 0, 0
    for row, sample in enumerate(literal.samples):
        old = torch.tensor(sample.logprobs)
        ratios = (literal_logprobs(model, sample) - old).exp()
        values = literal_values(value_model, sample)
        for t, advantage in enumerate(literal.advantages[row].tolist()):
            bounded = ratios[t].clamp(0.95, 1.05)
            policy_loss = policy_loss - torch.min(ratios[t] * advantage, bounded * advantage)
            num_clipped += int(ratios[t] != bounded)
            value, target = values[t], literal.returns[row][t]
            near = value.clamp(literal.values[row][t] - 0.3, literal.values[row][t] + 0.3)
            value_loss = value_loss + torch.max((value - target) ** 2, (near - target) ** 2) / 2
            num_stopped += int((near - target).abs() > (value - target).abs())
    assert num_clipped > 5
    assert num_stopped > 5
    losses = policy_loss / len(literal.samples), value_loss / literal.num_tokens
    for loss, network, learner in zip(losses, before_third, (trainer.policy, trainer.method.critic), strict=True):
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        expected = torch.cat([gradient.flatten() for gradient in gradients])
        actual = learner.optimizer.gradients[2]
        assert (actual - expected).norm() / expected.norm() < 1e-4
    assert 0 < record.metrics["policy/clip_fraction"] < 1


def test_the_clip_fraction_is_the_mean_over_the_updates(tmp_path: Path) -> None:
    """One update has no ratio but 1; in the second the policy has moved."""
    trainer = make_ppo(tmp_path / "out", lr=0.3, num_ppo_epochs=2, cliprange=0.05)
    literal = Literal(trainer)
    moved: list[Any] = []
    own_step = trainer.policy.optimizer.step

    def step() -> None:
        own_step()
        moved.append(copy.deepcopy(trainer.parts.policy))

    trainer.policy.optimizer.step = step
    record = trainer.step(trainer.order.batch(1), 1)
    literal.observe(record.rollout.samples)
    with torch.no_grad():
        ratios = torch.cat([(literal_logprobs(moved[0], s) - torch.tensor(s.logprobs)).exp() for s in literal.samples])
    outside = ((ratios - 1).abs() > 0.05).float().mean().item()
    assert outside > 0.1
    assert record.metrics["policy/clip_fraction"] == pytest.approx(outside / 2, abs=1e-6)
    assert record.metrics["value/grad_norm"] == pytest.approx(
        sum(g.norm().item() for g in trainer.method.critic.optimizer.gradients) / 2, rel=1e-5
    )
    assert record.logprob_difference.max() < 1e-4, "of the first pass: agreement with the rollout"


# How a step is cut ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_parts", [1, 3, 8])
def test_mini_batches_are_disjoint_and_cover_all_samples(
    tmp_path: Path, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_ppo(tmp_path / "out", num_ppo_epochs=2, num_mini_batches=num_parts, micro_batch_tokens=40)
    seen: list[int] = []

    def remembering_collate(samples: list[Completion], *args: Any) -> Any:
        seen.extend(sample.prompt.index for sample in samples)
        return collate(samples, *args)

    monkeypatch.setattr(ppo, "collate", remembering_collate)
    parts: dict[str, list[list[int]]] = {"policy": [], "critic": []}
    for name, learner in [("policy", trainer.policy), ("critic", trainer.method.critic)]:
        own_step = learner.optimizer.step

        def step(name: str = name, own_step: Any = own_step) -> None:
            parts[name].append([*seen])
            seen.clear()
            own_step()

        learner.optimizer.step = step
    own_experience = trainer.method.experience
    monkeypatch.setattr(trainer.method, "experience", lambda *args: (own_experience(*args), seen.clear())[0])
    trainer.step(trainer.order.batch(1), 1)
    everything = list(range(len(PROMPTS)))
    for own in parts.values():
        assert len(own) == 2 * num_parts
        for epoch in (own[:num_parts], own[num_parts:]):
            assert sorted(itertools.chain(*epoch)) == everything
            assert max(map(len, epoch)) - min(map(len, epoch)) <= 1
    assert [sorted(part) for part in parts["policy"]] == [sorted(part) for part in parts["critic"]]
    if num_parts > 1:
        first, second = ([sorted(part) for part in parts["policy"][i : i + num_parts]] for i in (0, num_parts))
        assert first != second, "every epoch has an order of its own"


@pytest.mark.parametrize("num_missing", [1, 5, 8])
def test_missing_rewards_leave_fewer_rows_than_mini_batches(tmp_path: Path, num_missing: int) -> None:
    def patchy(completions: list[str], **_: Any) -> list[float | None]:
        return [None if row < num_missing else r for row, r in enumerate(vowels(completions))]

    settings = {"num_ppo_epochs": 2, "num_mini_batches": 8, "lr_scheduler_type": "linear", "max_missing_rewards": 1.0}
    trainer = make_ppo(tmp_path / "out", patchy, **settings)
    learners = trainer.policy, trainer.method.critic
    rates = [learner.learning_rate for learner in learners]
    record = trainer.step(trainer.order.batch(1), 1)
    assert record.trained.tolist() == [row >= num_missing for row in range(8)]
    for learner, rate in zip(learners, rates, strict=True):
        assert len(learner.optimizer.gradients) == 2 * (8 - num_missing)
        assert learner.learning_rate == pytest.approx(rate / 2), "the schedule counts steps, not updates"


def test_every_step_and_every_seed_has_its_own_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[list[int]] = []
    own_randperm = torch.randperm

    def randperm(*args: Any, **kwargs: Any) -> Tensor:
        result = own_randperm(*args, **kwargs)
        orders.append(result.tolist())
        return result

    for seed in (1, 2):
        trainer = make_ppo(tmp_path / str(seed), **{**ONE_UPDATE, "num_mini_batches": 2}, seed=seed)
        batches = [trainer.order.batch(step) for step in (1, 2)]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randperm", randperm)
            for step, batch in enumerate(batches, 1):
                trainer.step(batch, step)
    assert len(orders) == 4
    assert len(set(map(tuple, orders))) == 4


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        settings = {"max_steps": 3, "num_mini_batches": 2, "num_ppo_epochs": 2, "seed": seed}
        make_trainer(tmp_path / name, method="ppo", beta=0.1, **settings).train()
    files = [
        [(tmp_path / name / file).read_bytes() for file in ("completions.jsonl", "model/model.safetensors")]
        for name in ("a", "b", "c")
    ]
    assert files[0] == files[1]
    assert files[0][0] != files[2][0]
    metrics = read(tmp_path / "a" / "metrics.jsonl")[-1]
    assert metrics["reward/greedy"] is None
    for name in ("value/loss", "value/explained_variance", "policy/clip_fraction", "value/grad_norm", "beta", "kl"):
        assert math.isfinite(metrics[name]), name


# KL coefficient and rates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "error"), [(10.0, 0.2), (1.1, 0.1), (0.93, -0.07), (0.1, -0.2)])
def test_beta_moves_by_the_relative_error_of_the_kl(tmp_path: Path, ratio: float, error: float) -> None:
    settings = {**ONE_UPDATE, "num_generations": 2, "beta": 0.3}
    probe = make_ppo(tmp_path / "probe", **settings)
    kl = abs(probe.step(probe.order.batch(1), 1).kl.mean().item())
    assert probe.method.beta == 0.3, "without --target_kl it stays"
    trainer = make_ppo(tmp_path / "out", **settings, target_kl=kl / ratio, kl_horizon=50)
    record = trainer.step(trainer.order.batch(1), 1)
    measured = record.kl.mean().item()
    assert measured == pytest.approx(kl), "a KL above 0, as here, is what the errors below are for"
    assert record.metrics["beta"] == 0.3, "what the step used"
    assert trainer.method.beta == pytest.approx(0.3 * (1 + error * 16 / 50), rel=1e-5)
    later = trainer.step(trainer.order.batch(2), 2)
    assert later.metrics["beta"] == pytest.approx(0.3 * (1 + error * 16 / 50), rel=1e-5)


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_leaves_beta(tmp_path: Path, kl: float) -> None:
    method = make_ppo(tmp_path, beta=0.3, target_kl=1.0).method
    method._adapt_beta(SimpleNamespace(log_ratios=torch.tensor([[kl, 0.1]]), samples=[None] * 8))
    assert method.beta == 0.3


def test_the_next_step_takes_the_adapted_beta_into_its_rewards(tmp_path: Path) -> None:
    trainer = make_ppo(tmp_path / "out", **ONE_UPDATE)
    rollout = trainer.parts.roll_out(trainer.order.batch(1), num_samples=1, greedy=False, seed=1, step=1)
    rewards = Rewards(torch.zeros(len(rollout.samples)), torch.zeros(0), {}, {}, {})
    ref_logprobs = trainer.parts.begin_reference(rollout, trainer.args)()
    record = StepRecord(rollout, rewards, trainer.method.credit(rollout, rewards), ref_logprobs)
    everyone = range(len(rollout.samples))
    plain = trainer.method.experience(record, everyone)
    trainer.method.load_state_dict({"beta": 2.0, "num_steps": 7})
    other = trainer.method.experience(record, everyone)
    last = plain.mask.sum(-1) - 1
    rows = torch.arange(len(everyone))
    change = (other.returns - plain.returns)[rows, last]
    torch.testing.assert_close(change, -1.8 * plain.log_ratios[rows, last], rtol=1e-4, atol=1e-5)
    assert trainer.method.state_dict() == {"beta": 2.0, "num_steps": 7}


def test_the_value_model_has_a_rate_of_its_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "a", method="ppo", beta=0.0)
    assert trainer.method.critic.learning_rate == trainer.policy.learning_rate == 1e-2
    trainer = make_trainer(tmp_path / "b", method="ppo", beta=0.0, value_learning_rate=3e-3, max_skipped_steps=0)
    assert (trainer.policy.learning_rate, trainer.method.critic.learning_rate) == (1e-2, 3e-3)
    assert trainer.method.critic.optimizer.param_groups[0]["lr"] == 3e-3
    trainer.method.critic.network.head.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(GuardStop, match=r"the value model's gradient is not finite.*a lower --value_learning_rate"):
        trainer.train()


def test_the_record_of_several_mini_batches_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    """The loss is a mean over all samples, and only the untouched policy is compared with the rollout."""
    records = []
    for name, num_mini_batches in (("whole", 1), ("parts", 4)):
        settings = {"method": "ppo", "num_ppo_epochs": 1, "num_mini_batches": num_mini_batches, "batch_size": 8}
        trainer = make_trainer(tmp_path / name, learning_rate=1e-12, **settings)
        records.append(trainer.step(trainer.order.batch(1), 1))
    whole, parts = records
    assert parts.loss == pytest.approx(whole.loss, rel=1e-4, abs=1e-6)
    assert whole.logprob_difference.isfinite().sum() == 8
    assert parts.logprob_difference.isfinite().sum() == 2
    assert step_metrics(parts)["sampling/logprob_difference_max"] < 1e-4

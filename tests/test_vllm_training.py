"""Training on samples that another program drew: the correction is exact, the gap is measured and stops a run."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from torch import Tensor, distributed

from enumeration import (
    BETA,
    COMPLETIONS,
    EOS,
    PLAIN,
    POLICY_SCORER,
    PROMPT,
    REFERENCE_SCORER,
    REWARDS,
    assert_close,
    fixed_prefix_kl,
    gradient,
    objective,
    sequence_logprob,
    step_logprobs,
    tiny_gpt2,
)
from fake_vllm import LLM, fake_vllm  # noqa: F401
from remax import estimators
from remax.batching import collate
from remax.cli import main
from remax.config import ReMaxConfig
from remax.errors import GuardStop
from remax.interfaces import Completion
from remax.logprobs import untruncated
from remax.methods import critic_free
from remax.methods.agreement import Agreement, agreement
from remax.objective import policy_gradient_loss
from remax.processes import ALONE, leave_processes
from toy_tokenizers import toy_tokenizer
from toy_training import make_trainer, policy, read, watch_gradients

OTHER = tiny_gpt2(5)
"""What draws the samples in the place of the policy, q."""
SAMPLING = "sampling/sampling_logp_difference/mean"


# The correction, against enumeration


def corrected_gradient(clip_max: float = math.inf, corrects: bool = True, **settings: Any) -> Tensor:
    """Sum over all y of q(y) times the estimate of the code under test from y alone."""
    args = ReMaxConfig(**{"beta": BETA, **settings})
    total = torch.zeros(())
    for tokens in COMPLETIONS:
        batch = collate([Completion(PROMPT, 0, tokens, [], tokens[-1] != EOS)], 0, torch.device("cpu"))
        steps = [step[t].item() for step, t in zip(step_logprobs(OTHER, tokens), tokens, strict=True)]
        drawn = batch.scatter(torch.tensor(steps, dtype=torch.float64))
        advantages = torch.tensor([REWARDS[tuple(tokens)] - 0.3], dtype=torch.float64)
        against: dict[str, Any] = {}
        if args.needs_exact_kl:
            against["reference"] = REFERENCE_SCORER
        elif args.needs_reference:
            against["ref_logprobs"] = REFERENCE_SCORER.logprobs(batch, untruncated(PLAIN))
        if corrects:
            against |= {"drawn_logprobs": drawn, "clip_max": clip_max}
        own = -gradient(
            lambda b=batch, a=advantages, k=against: policy_gradient_loss(POLICY_SCORER, b, a, PLAIN, args, 1, **k).loss
        )
        total = total + math.exp(sum(steps)) * own
    return total


def test_another_distribution_is_corrected_for_exactly() -> None:
    oracle = gradient(lambda: objective(PLAIN, beta=BETA))
    assert_close(corrected_gradient(), oracle)
    wrong = corrected_gradient(corrects=False)
    assert (wrong - oracle).norm() / oracle.norm() > 0.1, "q has to be far enough from pi to show a missing correction"


@pytest.mark.parametrize("estimator", ["one_step", "exact", "k2"])
def test_the_kl_is_corrected_for_as_well(estimator: str) -> None:
    mode = {"kl_mode": "one_step"} if estimator == "one_step" else {"kl_mode": "loss", "kl_estimator": estimator}
    assert_close(corrected_gradient(**mode), gradient(lambda: objective(PLAIN, beta=0) - BETA * fixed_prefix_kl(PLAIN)))


def test_truncation_bounds_the_ratio() -> None:
    policy_model, clip = POLICY_SCORER.model, 1.2

    def oracle() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for tokens in COMPLETIONS:
            logprob, other = sequence_logprob(policy_model, tokens), sequence_logprob(OTHER, tokens).item()
            ratio = min(math.exp(logprob.item() - other), clip)
            total = total + math.exp(other) * ratio * (REWARDS[tuple(tokens)] - 0.3) * logprob
        return total

    assert_close(corrected_gradient(clip, kl_mode="none"), gradient(oracle))
    logs = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -1.0, -1.0]]), torch.tensor([[-1.5, -2.5, 0.0], [-0.5, -1.0, -0.5]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logs[0].requires_grad_()
    ratios = estimators.importance_ratios(*logs, mask, clip_max=2.0)
    assert not ratios.requires_grad
    torch.testing.assert_close(ratios, torch.tensor([2.0, math.exp(-1.0)]))


# The gap


def completions(*logprobs: list[float]) -> list[Completion]:
    return [Completion(PROMPT, 0, [1] * len(own), own, True) for own in logprobs]


def test_gap_and_ratios_by_hand() -> None:
    args = ReMaxConfig(rollout_engine="vllm", max_logprob_gap=0.3, vllm_importance_sampling_clip_max=1.5)
    watch = Agreement("a program", args, ALONE)
    drawn = completions([-1.0, -2.0], [-3.0], [-1.0])
    watch.add([0, 2, 3], drawn, torch.tensor([[-1.1, -2.3], [-2.6, 0.0], [torch.nan, 0.0]]))
    assert watch.check() == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": 0.8 / 3,
            "sampling/sampling_logp_difference/max": 0.4,
            "sampling/importance_sampling_ratio/min": math.exp(-0.4),
            "sampling/importance_sampling_ratio/mean": (math.exp(-0.4) + math.exp(0.4)) / 2,
            "sampling/importance_sampling_ratio/max": math.exp(0.4),
        },
        rel=1e-5,
    )
    assert watch.check() == {}
    watch.add([0], completions([-1.0, -2.0]), torch.tensor([[-1.4, -2.3]]))
    with pytest.raises(GuardStop, match=r"that a program gives .* 0.35 nats per token .* --max_logprob_gap 0.3 allows"):
        watch.check()
    watch.add([0], completions([math.nan]), torch.tensor([[-1.4]]))  # The policy is well, so the other is not.
    with pytest.raises(GuardStop, match="inf nats per token"):
        watch.check()


@pytest.fixture
def train(tmp_path, fake_vllm):  # noqa: F811
    def make(name: str = "run", **settings: Any) -> Any:
        defaults = {"rollout_engine": "vllm", "max_steps": 3, "save_steps": 1, "learning_rate": 3e-2, "beta": 0.0}
        return make_trainer(tmp_path / name, **{**defaults, **settings})

    return make


def test_a_training_measures_that_the_two_agree(train, tmp_path) -> None:
    train().train()
    assert LLM.made[0].calls == ["remax_load", "reset_prefix_cache", "generate"] * 3
    metrics = read(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 3
    for line in metrics:
        assert 0 < line["sampling/sampling_logp_difference/max"] < 1e-4
        assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-3)


def test_autocast_is_not_vllms(train) -> None:
    metrics = train(bf16=True, max_steps=1, max_logprob_gap=9.0).train()
    assert LLM.made[0].settings["dtype"] == "bfloat16"
    assert metrics["sampling/sampling_logp_difference/max"] > 1e-4  # The policy's own pass is in bfloat16.


def weights(trainer: Any) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.parts.policy.parameters()]


@pytest.mark.parametrize("method", ["remax", "ppo"])
def test_a_push_that_did_not_arrive_stops_the_run_before_it_learns(train, tmp_path, method) -> None:
    settings = {"method": method, "model": policy(), "max_logprob_gap": 0.01}
    trainer = train(**settings)
    before: list[list[Tensor]] = []
    own_step = trainer.step

    def step(prompts: Any, number: int) -> Any:
        before.append(weights(trainer))
        LLM.takes_weights = number == 1
        return own_step(prompts, number)

    trainer.step = step
    with pytest.raises(GuardStop, match=r"vLLM in this process .* the engine holds other weights than the policy"):
        trainer.train()
    assert len(before) == 2
    moved = [not torch.equal(a, b) for a, b in zip(*before, strict=True)]
    assert any(moved), "the first step has to move the weights that the second push lost"
    assert all(torch.equal(a, b) for a, b in zip(before[1], weights(trainer), strict=True))
    assert [line["step"] for line in read(tmp_path / "run" / "metrics.jsonl")] == [1]
    LLM.takes_weights = True
    train(**{**settings, "model": policy(), "resume": "auto"}).train()
    train("whole", **{**settings, "model": policy()}).train()
    resumed, whole = (read(tmp_path / name / "metrics.jsonl") for name in ("run", "whole"))
    assert [line["step"] for line in resumed] == [1, 2, 3]
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in whole], rel=1e-4, abs=1e-6)


def test_the_step_is_that_of_the_weighted_samples(train) -> None:
    """Against the formula on a plain forward pass: minus the mean of min(pi/q, c) A log pi(y)."""
    clip = 1.05
    trainer = train(model=policy(), max_logprob_gap=9.0, vllm_importance_sampling_clip_max=clip, max_steps=2)
    LLM.made[0].llm_engine.model.load_state_dict(policy().state_dict())
    with torch.no_grad():
        for parameter in trainer.parts.policy.parameters():
            parameter.mul_(0.97)
    LLM.takes_weights = False
    gradients = watch_gradients(trainer)
    record = trainer.step(trainer.order.batch(1), 1)
    model = trainer.parts.policy
    model.load_state_dict({name: 0.97 * tensor for name, tensor in policy().state_dict().items()})
    model.zero_grad()
    ratios = []
    for sample, advantage in zip(record.rollout.samples, record.advantages, strict=True):
        ids = torch.tensor([sample.prompt.token_ids + sample.token_ids])
        logprobs = model(ids).logits[0, len(sample.prompt.token_ids) - 1 : -1].log_softmax(-1)
        logprob = logprobs.gather(-1, torch.tensor(sample.token_ids)[:, None]).sum()
        ratios.append(min(math.exp(logprob.item() - sum(sample.logprobs)), clip))
        (-ratios[-1] * advantage * logprob / len(record.advantages)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradients[0] - expected).norm() / expected.norm() < 1e-4
    assert min(ratios) < 0.95, "the weights have to differ visibly"
    assert max(ratios) == clip
    assert record.metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(min(ratios), rel=1e-4)
    assert record.metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(clip)


def test_without_the_correction_samples_count_alike(train, monkeypatch) -> None:
    seen: list[dict[str, Any]] = []
    own = critic_free.policy_gradient_loss
    monkeypatch.setattr(critic_free, "policy_gradient_loss", lambda *a, **k: (seen.append(k), own(*a, **k))[1])
    metrics = train(vllm_importance_sampling_correction=False, max_steps=1).train()
    assert "drawn_logprobs" not in seen[0]
    assert SAMPLING in metrics
    assert "sampling/importance_sampling_ratio/mean" not in metrics


def test_the_policys_own_program_is_neither_measured_nor_corrected(train, monkeypatch) -> None:
    seen: list[dict[str, Any]] = []
    own = critic_free.policy_gradient_loss
    monkeypatch.setattr(critic_free, "policy_gradient_loss", lambda *a, **k: (seen.append(k), own(*a, **k))[1])
    trainer = train(rollout_engine="embedded", max_logprob_gap=1e-30, max_steps=2)
    assert agreement(trainer.parts, trainer.args) is None
    metrics = trainer.train()
    assert seen
    assert not any({"drawn_logprobs", "clip_max"} & call.keys() for call in seen)
    assert not any(name.startswith(("sampling/sampling_logp", "sampling/importance")) for name in metrics)
    assert json.loads(json.dumps(metrics))["sampling/logprob_difference_max"] > 1e-30


# The end


@pytest.fixture
def group(tmp_path) -> Iterator[None]:
    """A group of one process, as vLLM makes it."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_only_a_group_of_ours_is_left(group, monkeypatch) -> None:
    PartialState()
    leave_processes()
    assert distributed.is_initialized(), "who has made it still needs it"
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_CPU)
    leave_processes()
    assert not distributed.is_initialized()


def test_the_command_ends_vllm_before_it_leaves_the_others(tmp_path: Path, fake_vllm, monkeypatch) -> None:  # noqa: F811
    left: list[bool] = []
    monkeypatch.setattr("remax.processes.leave_processes", lambda: left.append(LLM.made[0].llm_engine.ended))
    policy().save_pretrained(tmp_path / "model")
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n' * 4)
    (tmp_path / "rewards.py").write_text(
        "def length(completions, **_):\n    return [float(len(t)) for t in completions]"
    )
    words = ["train", "--model", "model", "--reward_funcs", "rewards.py:length", "--train_dataset", "prompts.jsonl"]
    words += ["--output_dir", "run", "--max_steps", "1", "--batch_size", "4", "--max_completion_length", "4"]
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--rollout_engine", "vllm", "--report_to", "none"]) == 0
    assert left == [True]

"""Out of memory: a part of the step is done again in smaller pieces with the same result, or the run stops."""

import gc
import json
import math
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

from faults import OutOfMemory, in_gradient, not_in_gradient
from guarded_runs import PPO, weights
from remax.components import Components
from remax.errors import GuardStop, UserError
from remax.guards.memory import MemoryGuard, is_out_of_memory
from remax.rewards import RewardModel
from toy_tokenizers import PAD, toy_tokenizer
from toy_training import calm_policy, lively, make_trainer, policy, read

METHODS: dict[str, dict[str, Any]] = {"remax": {"beta": 0.2}, "ppo": {**PPO, "beta": 0.2}}


def disturbed_run(folder: Path, method: str, phase: str | None, **settings: Any) -> Any:
    """A run of two steps in which memory does not suffice once, in the second micro-batch of a phase."""
    trainer = make_trainer(
        folder, lively, model=calm_policy(1), micro_batch_tokens=40, **{**METHODS[method], **settings}
    )
    trainer.parts.policy.load_state_dict(calm_policy(2).state_dict())
    for learner in (trainer.policy, *([trainer.method.critic] if method == "ppo" else [])):
        learner.optimizer = torch.optim.SGD(learner.network.parameters(), lr=0.05)
    trainer.drawn = []
    generate = trainer.parts.engine.generate

    def counted(prompts: Any, *args: Any, **kwargs: Any) -> Any:
        trainer.drawn.append(len(prompts))
        return generate(prompts, *args, **kwargs)

    trainer.parts.engine.generate = counted
    if phase is not None:
        critic = trainer.method.critic.network.body if method == "ppo" else None
        places = {
            "rollout": (trainer.parts.policy.model, 3, not_in_gradient),
            "reference": (trainer.parts.reference.model.model, 2, not_in_gradient),
            "update": (trainer.parts.policy.model, 2, in_gradient),
            "later update": (trainer.parts.policy.model, 4, in_gradient),
            "values": (critic, 2, not_in_gradient),
            "value update": (critic, 2, in_gradient),
        }
        fault = OutOfMemory(*places[phase])
    trainer.train()
    if phase is not None:
        assert fault.calls > fault.at_call, "the phase was done again"
    return trainer


PHASES = [("remax", "rollout"), ("remax", "reference"), ("remax", "update")]
PHASES += [("ppo", phase) for phase in ("update", "later update", "values", "value update")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, Path]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return {method: (weights(disturbed_run(folder / method, method, None)), folder / method) for method in METHODS}


@pytest.mark.parametrize(("method", "phase"), PHASES)
def test_what_is_done_again_gives_what_it_would_have_given(
    tmp_path: Path, undisturbed: dict[str, tuple[torch.Tensor, Path]], method: str, phase: str
) -> None:
    expected, folder = undisturbed[method]
    trainer = disturbed_run(tmp_path / "out", method, phase)
    num_prompts = [4, 2, 2, 2, 2] if phase == "rollout" else [trainer.args.batch_size] * 2
    assert trainer.drawn == num_prompts, "together before, then in halves, in the second step too"
    assert (weights(trainer) - expected).norm() / expected.norm() < 1e-6
    setting = "rollout_batch_size" if phase == "rollout" else "micro_batch_tokens"
    (news,) = read(tmp_path / "out" / "alarms.jsonl")
    assert (news["step"], news["event"], news["setting"]) == (1, "out_of_memory", setting)
    assert news["to"] == news["from"] // 2 == trainer.guards.state_dict()["memory"]["limits"][setting]
    assert "alloc" in news["message"]
    lines, others = (read(path / "metrics.jsonl") for path in (tmp_path / "out", folder))
    assert [line.pop("redone_passes") for line in lines] == [1, 1]
    assert [line.pop("redone_passes") for line in others] == [0, 0]
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {key for key in line if key.startswith(("time/", "memory/", "tokens_per"))}:
            tolerance = {"sampling/logprob_difference_max": 1e-4}.get(name, 1e-5)
            ours, theirs = (math.nan if own[name] is None else own[name] for own in (line, other))
            assert ours == pytest.approx(theirs, rel=1e-4, abs=tolerance, nan_ok=True), name
    texts, expected_texts = (read(path / "completions.jsonl") for path in (tmp_path / "out", folder))
    assert [line["completion"] for line in texts] == [line["completion"] for line in expected_texts]


def test_a_reward_model_scores_in_smaller_batches(tmp_path: Path) -> None:
    config = {**policy().config.to_dict(), "num_labels": 1, "pad_token_id": PAD}
    torch.manual_seed(0)
    classifier = LlamaForSequenceClassification(LlamaConfig(**config)).eval()
    tokenizer = toy_tokenizer("<s> $A", bos_token="<s>")
    records, sizes = [], []
    for fails in (False, True):
        reward = RewardModel(classifier, tokenizer, batch_size=6)
        calls: list[str] = []

        def counted(completions: list[str], calls: list[str] = calls, **_: Any) -> list[float]:
            calls.append("call")
            return lively(completions)

        trainer = make_trainer(tmp_path / str(fails), [reward, counted])
        fault = OutOfMemory(classifier.model, 2 if fails else -1)
        records.append(trainer.step(trainer.order.batch(1), 1))
        fault.hook.remove()
        sizes.append((reward.batch_size, calls))
    assert sizes == [(6, ["call"]), (3, ["call"])], "functions are not asked again"
    for rewards in zip(*(record.rewards.sampled_by_function.values() for record in records), strict=True):
        torch.testing.assert_close(*rewards, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_halved_stops_the_run_as_if_the_step_had_not_begun(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "reinforce", "baseline": "moving_average", "beta": 0.0, "max_steps": 3}
    expected = make_trainer(tmp_path / "one", lively, **{**settings, "max_steps": 1})
    expected.train()
    trainer = make_trainer(tmp_path / "out", lively, micro_batch_tokens=1000, **settings)
    fault = OutOfMemory(trainer.parts.policy.model, 0, lambda: in_gradient() and trainer.state.global_step == 1)
    with pytest.raises(GuardStop, match=r"memory does not suffice .*nothing left to be halved: `remax plan`"):
        trainer.train()
    assert fault.calls == 3, "all four rows, two, one of the longest"
    assert torch.equal(weights(trainer), weights(expected))
    assert trainer.method.state_dict() == expected.method.state_dict(), "the baseline has not seen the second batch"
    assert (tmp_path / "out" / "checkpoints" / "step-000001").is_dir()
    assert [line["step"] for line in read(tmp_path / "out" / "metrics.jsonl")] == [1]
    assert [line["step"] for line in read(tmp_path / "out" / "alarms.jsonl")] == [2, 2]


@pytest.mark.parametrize("before", [0, 1])
def test_ppo_stopped_in_the_middle_of_its_updates_saves_the_step_as_far_as_it_came(tmp_path: Path, before: int) -> None:
    """The value model's first update fails: the policy's, which came before it, counts, and no other one is taken."""
    settings: dict[str, Any] = {**PPO, "beta": 0.0, "max_steps": 3, "save_steps": 0}
    trainer = make_trainer(tmp_path / "out", lively, **settings)
    fault = OutOfMemory(
        trainer.method.critic.network.body, 0, lambda: in_gradient() and trainer.state.global_step == before
    )
    taken = []
    trainer.policy.optimizer.optimizer.register_step_post_hook(lambda *_: taken.append(trainer.state.global_step))
    with pytest.raises(GuardStop, match="memory does not suffice"):
        trainer.train()
    assert taken == [0] * 4 * before + [before], "all four updates of the steps before, and one of this one"
    *_, line = read(tmp_path / "out" / "metrics.jsonl")
    assert (line["step"], line["value/loss"], line["value/grad_norm"]) == (before + 1, None, None)
    assert line["grad_norm"] > 0
    fault.hook.remove()
    resumed = make_trainer(tmp_path / "out", lively, **settings, resume="auto")
    resumed.train()
    assert [line["step"] for line in read(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3]


def test_a_run_that_is_stopped_while_it_evaluates_goes_on_with_that_evaluation(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 3,
        "eval_steps": 2,
        "eval_dataset": Dataset.from_list([{"prompt": "tea"}, {"prompt": "no"}]),
    }
    expected = make_trainer(tmp_path / "expected", lively, **settings)
    expected.train()
    trainer = make_trainer(tmp_path / "out", lively, **settings)
    at_evaluation = [False]
    evaluate = trainer.evaluate

    def failing() -> Any:
        at_evaluation[0] = trainer.state.global_step == 2
        return evaluate()

    trainer.evaluate = failing
    OutOfMemory(trainer.parts.policy.model, 0, lambda: at_evaluation[0])
    with pytest.raises(GuardStop, match="memory does not suffice"):
        trainer.train()
    assert [line["step"] for line in read(tmp_path / "out" / "eval.jsonl")] == [0]
    make_trainer(tmp_path / "out", lively, **settings, resume="auto").train()
    # Approximately: from now on rows are decoded one by one.
    found, wanted = (read(tmp_path / name / "eval.jsonl") for name in ("out", "expected"))
    assert found == [pytest.approx(line, rel=1e-4) for line in wanted]


def test_a_step_of_the_optimiser_is_not_done_again(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", lively)
    steps = []

    def step(*_: Any, **__: Any) -> None:
        steps.append(1)
        torch.empty(2**50)

    trainer.policy.optimizer.step = step
    with pytest.raises(UserError, match=r"--optim is adamw_torch_fused: memory does not suffice for its step"):
        trainer.train()
    assert steps == [1]


def test_a_failed_attempt_leaves_no_tensor_in_memory() -> None:
    guard, left = MemoryGuard(), []

    def work(size: int) -> int:
        assert all(reference() is None for reference in left), "the tensors of the last attempt are still there"
        tensor = torch.ones(10)
        left.append(weakref.ref(tensor))
        if size > 3:
            torch.empty(2**50)
        return size

    gc.disable()
    try:
        assert guard.run("micro_batch_tokens", 100, work, whole=12, smallest=1) == 3
    finally:
        gc.enable()
    assert [(news["from"], news["to"]) for news in guard.news] == [(12, 6), (6, 3)]
    assert guard.run("micro_batch_tokens", 100, lambda size: size, whole=50, smallest=1) == 3, "for the rest of the run"
    assert guard.size("rollout_batch_size", 8) == 8

    other = MemoryGuard()
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.run("micro_batch_tokens", 100, lambda size: size, whole=50, smallest=1) == 3


@pytest.mark.parametrize("fault", [UserError("no"), KeyboardInterrupt()])
def test_a_step_that_breaks_off_leaves_no_reference_running(tmp_path: Path, monkeypatch: Any, fault: Any) -> None:
    begun, ended = threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        begun.set()
        time.sleep(0.3)
        ended.set()
        raise ValueError("nobody hears of it")

    def rewards(*args: Any) -> Any:
        begun.wait(5)
        raise fault

    monkeypatch.setattr(Components, "overlaps", True)
    monkeypatch.setattr(Components, "reference_logprobs", slow)
    monkeypatch.setattr(Components, "score", rewards)
    trainer = make_trainer(tmp_path / "out", lively, beta=0.1)
    with pytest.raises(type(fault)):
        trainer.step(trainer.order.batch(1), 1)
    assert ended.is_set()


def test_other_errors_pass() -> None:
    def work(size: int) -> None:
        raise RuntimeError("expected scalar type Float but found Half")

    with pytest.raises(RuntimeError, match="scalar type"):
        MemoryGuard().run("micro_batch_tokens", 100, work, whole=50, smallest=1)
    guard = MemoryGuard()
    guard.halves = False
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        guard.run("micro_batch_tokens", 100, lambda size: torch.empty(2**50), whole=50, smallest=1)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("not enough memory: you tried to allocate 8 bytes."))
    assert not is_out_of_memory(ValueError("can't allocate memory"))

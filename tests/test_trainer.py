"""The training loop: invariances of a full step, the run's folder, and that it learns."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from remax.batching import collate
from remax.errors import GuardStop, UserError
from toy_tokenizers import BOS, EOS, PAD, toy_tokenizer
from toy_training import PROMPTS, calm_policy, lively, make_trainer, policy, read, step_result, vowels, watch_gradients


@pytest.mark.parametrize("kl", [{"kl_mode": "to_go"}, {"kl_mode": "loss"}, {"kl_mode": "one_step", "gamma": 0.9}])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_a_step_depends_on_neither_micro_batches_nor_row_order_nor_padding(
    tmp_path: Path, kl: dict[str, Any], aggregation: str
) -> None:
    settings = {**kl, "loss_aggregation": aggregation, "beta": 0.2}
    gradient, weights = step_result(tmp_path / "whole", **settings)
    assert gradient.norm() > 1e-2
    variants = {
        "micro-batches": {"micro_batch_tokens": 25},
        "order": {"shuffle": True, "micro_batch_tokens": 40},
        "padding": {"pad_token_id": EOS, "micro_batch_tokens": 60},
        "padding with BOS": {"pad_token_id": BOS},
        "rollout groups": {"rollout_batch_size": 5},
        "checkpointing": {"gradient_checkpointing": True},
    }
    for name, variant in variants.items():
        other_gradient, other_weights = step_result(tmp_path / name, **settings, **variant)
        assert (other_gradient - gradient).norm() / gradient.norm() < 1e-6, name
        assert (other_weights - weights).norm() / weights.norm() < 1e-6, name


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_every_step_takes_the_mean_over_its_whole_batch(tmp_path: Path, aggregation: str) -> None:
    """Against plain forward passes of single sequences; the second step shows that no gradient is left over."""
    trainer = make_trainer(
        tmp_path / "out",
        model=calm_policy(1),
        loss_aggregation=aggregation,
        beta=0.0,
        num_generations=2,
        micro_batch_tokens=30,
    )
    model = trainer.parts.policy
    trainer.policy.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in (1, 2):
        before = [p.detach().clone() for p in model.parameters()]
        record = trainer.step(trainer.order.batch(step), step)
        after = [p.detach().clone() for p in model.parameters()]
        model.load_state_dict(dict(zip(dict(model.named_parameters()), before, strict=True)), strict=False)
        samples = record.rollout.samples
        objective = torch.zeros(())
        for row, sample in enumerate(samples):
            ids = torch.tensor([sample.prompt.token_ids + sample.token_ids])
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)[len(sample.prompt.token_ids) - 1 :]
            drawn = logprobs.gather(-1, torch.tensor(sample.token_ids).unsqueeze(-1)).sum()
            objective = objective + record.advantages[row] * drawn
        count = len(samples) if aggregation == "sequence" else sum(len(c.token_ids) for c in samples)
        gradients = torch.autograd.grad(objective / count, list(model.parameters()))
        assert sum(g.abs().sum() for g in gradients) > 0.1
        for start, end, gradient in zip(before, after, gradients, strict=True):
            torch.testing.assert_close(end, start + 0.1 * gradient, rtol=1e-5, atol=1e-6)
        model.load_state_dict(dict(zip(dict(model.named_parameters()), after, strict=True)), strict=False)


def test_several_samples_share_one_greedy_baseline(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", num_generations=3)
    record = trainer.step(trainer.order.batch(1), 1)
    assert len(record.rollout.samples) == 12
    assert len(record.rollout.greedy) == 4
    for row, sample in enumerate(record.rollout.samples):
        greedy = record.rollout.greedy[row // 3]
        assert sample.prompt is greedy.prompt
        expected = vowels([sample.text])[0] - vowels([greedy.text])[0]
        assert record.advantages[row].item() == pytest.approx(expected)


def test_greedy_rows_are_not_trained_on_and_do_not_depend_on_sampling(tmp_path: Path) -> None:
    first, second = (
        make_trainer(tmp_path / name, temperature=temperature, top_k=top_k, seed=seed)
        for name, temperature, top_k, seed in [("a", 1.0, 0, 1), ("b", 0.5, 3, 2)]
    )
    prompts = first.parts.prompts
    rollouts = [
        t.parts.roll_out(prompts, num_samples=1, greedy=True, seed=t.args.seed, step=1) for t in (first, second)
    ]
    assert [c.token_ids for c in rollouts[0].greedy] == [c.token_ids for c in rollouts[1].greedy]
    assert [c.token_ids for c in rollouts[0].samples] != [c.token_ids for c in rollouts[1].samples]
    for change in ({"seed": 2}, {"step": 2}):
        other = first.parts.roll_out(prompts, **{"num_samples": 1, "greedy": True, "seed": 1, "step": 1, **change})
        assert [c.token_ids for c in rollouts[0].samples] != [c.token_ids for c in other.samples]


def test_rows_without_a_reward_are_left_out_and_their_pairs_with_them(tmp_path: Path) -> None:
    """The gradient equals that of the remaining rows alone: a missing reward is never a reward of 0."""

    def patchy(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        # In a step of 4 prompts: rows 0-3 are samples, 4-7 their baselines. Row 0 and the baseline of row 2 fail.
        return [None if i == 0 else math.nan if i == 6 else r for i, r in enumerate(lively(completions))]

    trainer = make_trainer(tmp_path / "out", patchy, model=calm_policy(1))
    gradient = watch_gradients(trainer)
    record = trainer.step(trainer.order.batch(1), 1)
    assert record.trained.tolist() == [False, True, False, True]

    alone = make_trainer(tmp_path / "alone", lively, model=calm_policy(1), batch_size=2)
    expected = watch_gradients(alone)
    alone.step(trainer.order.batch(1)[1::2], 1)
    assert expected[0].norm() > 1e-2
    assert (gradient[0] - expected[0]).norm() / expected[0].norm() < 1e-6


def test_the_reference_is_the_policy_as_given_and_stays(tmp_path: Path) -> None:
    model = policy()
    trainer = make_trainer(tmp_path / "out", model=model, beta=0.1, batch_size=8)
    before = [p.clone() for p in trainer.parts.reference.model.parameters()]
    first = trainer.step(trainer.order.batch(1), 1)
    assert first.kl.abs().max() < 1e-4, "at the first step the policy is its reference"
    later = [trainer.step(trainer.order.batch(step), step) for step in (2, 3, 4)]
    assert max(record.kl.abs().max() for record in later) > 1e-2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parts.reference.model.parameters(), strict=True))
    assert make_trainer(tmp_path / "none", beta=0.0).parts.reference is None
    assert make_trainer(tmp_path / "mode", kl_mode="none").parts.reference is None


def test_dropout_is_off_in_rollout_and_gradient(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", model=policy(attention_dropout=0.5), gradient_checkpointing=True)
    record = trainer.step(trainer.order.batch(1), 1)
    assert trainer.parts.policy.training, "checkpointing needs train mode"
    assert record.logprob_difference.max() < 1e-4


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_trainer(tmp_path / name, max_steps=3, top_p=0.9).train()
    first, second = ((tmp_path / name) for name in ("a", "b"))
    assert (first / "completions.jsonl").read_bytes() == (second / "completions.jsonl").read_bytes()
    weights = [AutoModelForCausalLM.from_pretrained(folder / "model").state_dict() for folder in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    make_trainer(tmp_path / "c", max_steps=3, top_p=0.9, seed=7).train()
    assert (first / "completions.jsonl").read_bytes() != (tmp_path / "c" / "completions.jsonl").read_bytes()


def test_lora_trains_only_the_adapter_and_saves_merged_weights(tmp_path: Path) -> None:
    model = policy()
    trainer = make_trainer(tmp_path / "out", model=model, use_peft=True, lora_r=4, beta=0.1, batch_size=8, max_steps=3)
    trainer.train()
    base = policy().state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    changed = {name for name, tensor in saved.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed
    assert all("proj" in name for name in changed)
    ids = torch.tensor([[BOS, 20, 30, 40]])
    adapted = trainer.parts.policy(ids).logits
    torch.testing.assert_close(saved(ids).logits, adapted, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "out" / "model" / "adapter" / "adapter_model.safetensors").exists()
    assert read(tmp_path / "out" / "metrics.jsonl")[-1]["kl"] != 0


def test_the_folder_of_a_run(tmp_path: Path) -> None:
    events = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            events.append(("step", state.global_step))

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
            events.append(("evaluate", round(metrics["eval/reward"], 6)))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            if state.global_step == 3 and "reward" in logs:
                control.should_training_stop = True

    folder = tmp_path / "out"
    rows = [{"prompt": p, "answer": p.upper()} for p in PROMPTS]

    def uses_column(
        completions: list[str], answer: list[str], log_metric: Any, log_extra: Any, **_: Any
    ) -> list[float]:
        assert all(a.isupper() for a in answer)
        log_metric("answers", len(answer))
        log_extra("first_letter", [a[0] for a in answer])
        return [float(len(c)) for c in completions]

    trainer = make_trainer(
        folder,
        [vowels, uses_column],
        rows=rows,
        reward_weights=[2.0, 0.5],
        max_steps=5,
        eval_steps=2,
        beta=0.1,
        eval_dataset=Dataset.from_list(rows),
        callbacks=[Recorder()],
    )
    trainer.train()
    metrics = read(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3], "a callback stopped the run after step 3"
    last = metrics[-1]
    for name in ("reward", "reward/greedy", "reward/gap", "kl", "entropy", "completions/mean_length", "num_processes"):
        assert math.isfinite(last[name]), name
    assert last["reward"] == pytest.approx(
        2 * last["rewards/vowels/mean"] + 0.5 * last["rewards/uses_column/mean"], rel=1e-5
    )
    assert last["answers"] == 8
    completions = read(folder / "completions.jsonl")
    assert len(completions) == 12
    for record in completions:
        assert record["advantage"] == pytest.approx(record["reward"] - record["greedy_reward"], abs=1e-6)
        assert record["rewards"]["uses_column"] == len(record["completion"])
        assert record["first_letter"] == record["prompt"][0].upper()
    assert sum(r["reward"] for r in completions if r["step"] == 3) / 4 == pytest.approx(last["reward"], rel=1e-5)
    assert [e for e in events if e[0] == "step"] == [("step", 1), ("step", 2), ("step", 3)]
    evaluations = read(folder / "eval.jsonl")
    assert [e["step"] for e in evaluations] == [0, 2, 3]
    assert [round(e["eval/reward"], 6) for e in evaluations] == [e[1] for e in events if e[0] == "evaluate"]
    best = max(evaluations, key=lambda e: e["eval/reward"])
    assert trainer.state.best_global_step == best["step"]
    assert (folder / "best_model" / "model.safetensors").exists() == (best["step"] > 0)
    assert "beta: 0.1" in (folder / "config.yaml").read_text()
    card = (folder / "model" / "README.md").read_text()
    assert "ReMax" in card
    assert json.loads((folder / "model" / "generation_config.json").read_text())["eos_token_id"] == EOS


@pytest.mark.parametrize("settings", [{"bf16": True}, {"dtype": "bfloat16"}], ids=["autocast", "weights"])
def test_bfloat16_runs_and_keeps_logprobs_in_float32(tmp_path: Path, settings: dict[str, Any]) -> None:
    policy().save_pretrained(tmp_path / "policy")
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(tmp_path / "policy")
    trainer = make_trainer(tmp_path / "out", model=str(tmp_path / "policy"), beta=0.1, **settings)
    record = trainer.step(trainer.order.batch(1), 1)
    weights = next(trainer.parts.policy.parameters())
    assert weights.dtype == (torch.bfloat16 if "dtype" in settings else torch.float32)
    assert record.logprob_difference.max() < 0.5, "bfloat16 has three digits"
    batch = collate(record.rollout.samples, PAD, torch.device("cpu"))
    with trainer.accelerator.autocast():
        assert trainer.policy.network(batch, trainer.parts.sampling).logprobs.dtype == torch.float32


def test_it_learns(tmp_path: Path) -> None:
    """From one vowel in seven characters to nearly all, against an independent count on fresh samples."""
    model = policy()
    trainer = make_trainer(
        tmp_path / "out", model=model, max_steps=60, batch_size=8, num_generations=4, learning_rate=2e-2, beta=0.0
    )
    trainer.train()
    metrics = read(tmp_path / "out" / "metrics.jsonl")
    assert metrics[0]["reward"] < 0.6
    assert sum(m["reward"] for m in metrics[-5:]) / 5 > 1.5, "of 2.0: eight characters of a quarter each"


def test_a_useless_reward_stops_at_the_first_step_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gave no number for any completion"):
        make_trainer(tmp_path / "out", lambda completions, **_: [None] * len(completions)).train()
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="returned 1 rewards"):
        make_trainer(tmp_path / "out", lambda completions, **_: [1.0]).train()
    assert not (tmp_path / "out").exists()


def test_whatever_fails_in_the_first_step_leaves_an_existing_folder_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")

    def interrupted(completions: list[str], **_: Any) -> list[float]:
        raise KeyboardInterrupt

    dataset = Dataset.from_list([{"prompt": p} for p in PROMPTS])
    trainer = make_trainer(folder, interrupted, report_to=["tensorboard"], eval_dataset=dataset)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_gradient_that_is_not_finite_is_never_applied(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", max_skipped_steps=0)
    before = [p.detach().clone() for p in trainer.parts.policy.parameters()]
    trainer.parts.policy.lm_head.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(
        GuardStop, match=r"1 step skipped, .*: the policy's gradient is not finite; .*a lower --learning_rate"
    ):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parts.policy.parameters(), strict=True))
    assert [line["skipped_steps"] for line in read(tmp_path / "out" / "metrics.jsonl")] == [1]


def test_a_trained_adapter_is_its_own_reference(tmp_path: Path) -> None:
    """Passed as an object, it is the policy as given: the KL starts at 0, not at its distance to the base model."""
    adapted = get_peft_model(policy(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer = make_trainer(tmp_path / "out", model=adapted, beta=0.1)
    assert trainer.step(trainer.order.batch(1), 1).kl.abs().max() < 1e-4


def test_an_unknown_metric_for_the_best_model_is_refused(tmp_path: Path) -> None:
    dataset = Dataset.from_list([{"prompt": p} for p in PROMPTS])
    trainer = make_trainer(tmp_path / "out", eval_dataset=dataset, metric_for_best_model="reward")
    with pytest.raises(UserError, match=r"--metric_for_best_model is reward: .*set one of eval/reward"):
        trainer.train()
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--eval_steps is 2: without --eval_dataset"):
        make_trainer(tmp_path / "out", eval_steps=2)


def test_a_batch_larger_than_the_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--batch_size is 9: --train_dataset has only 8 usable prompts.*set --batch"):
        make_trainer(tmp_path / "out", batch_size=9)


def test_a_context_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--max_completion_length is 250.*context of 256.*244 or less"):
        make_trainer(tmp_path / "out", max_completion_length=250)

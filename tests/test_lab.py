"""The estimator laboratory: variances against enumeration, gradients against the trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from remax import ReMaxConfig, ReMaxTrainer
from remax.assembly import choose_engine
from remax.components import Components
from remax.config import LabConfig, OptimiserOptions
from remax.interfaces import Completion, Prompt, Sampling
from remax.lab.gradients import Draw, Estimator, draw_all, layers_of
from remax.lab.measurement import NUM_WARMUP, measure
from remax.lab.statistics import Floats
from remax.learner import Learner
from remax.logprobs import CompletionScorer
from remax.processes import make_accelerator
from tiny_models import tiny_model
from toy_tokenizers import EOS, VOCAB_SIZE, characters, toy_tokenizer


class TokenReward:
    """Rewards the first token of a completion by a table, plus what its prompt is worth."""

    name = "token"
    table = torch.randn(VOCAB_SIZE, generator=torch.manual_seed(5)).sign() * 0.7 + 0.33

    def __call__(self, completions: Sequence[Completion]) -> list[float | None]:
        return [float(self.table[c.token_ids[0]]) + c.prompt.index for c in completions]


TEMPERATURE = 4.0
"""Near enough to uniform that no rare completion dominates a variance."""
PROMPTS = [Prompt(i, text, characters(text)) for i, text in enumerate(("a cat", "a longer dog"))]


def components(max_completion_length: int) -> Components:
    policy, tokenizer = tiny_model("llama", vocab_size=VOCAB_SIZE), toy_tokenizer()
    return Components(
        accelerator=make_accelerator(False),
        policy=policy,
        reference=None,
        tokenizer=tokenizer,
        engine=choose_engine(policy, tokenizer, ReMaxConfig(), False),
        reference_placed=None,
        reward_functions=[TokenReward()],
        reward_weights=[1.0],
        sampling=Sampling(max_completion_length, (EOS,), temperature=TEMPERATURE),
        prompts=PROMPTS,
        eval_prompts=[],
        model_name="tiny",
    )


def estimator(parts: Components, entry: str, **settings: Any) -> Estimator:
    learner = Learner(
        CompletionScorer(parts.policy), OptimiserOptions(), parts.accelerator, max_steps=1, rate_flag="learning_rate"
    )
    return Estimator(parts, LabConfig(methods=[entry], **settings).training(entry), learner)


def room(parts: Components, num: int) -> np.ndarray:
    return np.zeros((num, sum(p.numel() for p in parts.policy.parameters())), dtype=np.float32)


def draws_of(parts: Components, num: int, *, start: int = 1) -> list[Draw]:
    return draw_all(parts, PROMPTS, num_samples=2, greedy=True, seed=0, steps=range(start, start + num))


def scores(policy: Any, prompt: Prompt) -> tuple[Tensor, Floats]:
    """The probability of each token after the prompt, [V], and the gradients of their logarithms, [V, D]."""
    logprobs = policy(torch.tensor([prompt.token_ids])).logits[0, -1].div(TEMPERATURE).log_softmax(-1)
    parameters = list(policy.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])
        for value in logprobs
    ]
    return logprobs.detach().exp().double(), torch.stack(rows).double()


def exact_variances(policy: Any) -> dict[str, float]:
    """By enumeration of all completions of one token: the variance of the mean over both prompts."""
    totals = dict.fromkeys(("remax", "reinforce", "rloo"), 0.0)
    for prompt in PROMPTS:
        probs, gradients = scores(policy, prompt)
        rewards = TokenReward.table.double() + prompt.index
        squares = gradients.square().sum(1)
        mean_square = ((probs * rewards) @ gradients).square().sum()
        for name, baseline in (("remax", rewards[probs.argmax()]), ("reinforce", 0.0)):
            totals[name] += float((probs * (rewards - baseline) ** 2) @ squares - mean_square) / 4
        # Two samples a, b: half of (r_a - r_b) (grad_a - grad_b).
        apart = squares[:, None] + squares[None] - 2 * gradients @ gradients.T
        pairs = probs[:, None] * probs[None] * (rewards[:, None] - rewards[None]) ** 2 * apart / 4
        totals["rloo"] += float(pairs.sum() - mean_square) / 4
    return totals


def test_measured_variances_are_the_enumerated_ones(tmp_path: Path) -> None:
    parts = components(max_completion_length=1)
    trainings = {name: LabConfig().training(name) for name in ("remax", "reinforce", "rloo")}
    measurement = measure(parts, trainings, PROMPTS, num_gradients=120, reward_offset=0.0, seed=0, folder=tmp_path)
    exact, (section,) = exact_variances(parts.policy), measurement.sections
    assert max(exact.values()) > 1.5 * min(exact.values()), "methods that cannot be told apart prove nothing"
    for name, figures in section.methods.items():
        low, high = figures.estimates["variance"].interval
        assert exact[name] / 2 < low <= exact[name] <= high < exact[name] * 2
        assert figures.agreement is None or figures.agreement.p_value > 0.01
        assert sum(own.value for own in figures.by_layer.values()) == pytest.approx(
            figures.estimates["variance"].value, rel=1e-9
        )
    assert section.methods["rloo"].agreement
    assert list(section.methods["rloo"].by_layer) == ["embed_tokens", "layers.0", "layers.1", "norm", "lm_head"]
    assert not list(tmp_path.iterdir()), "the gradients leave no file"


@pytest.mark.parametrize("entry", ["remax", "remax:leave_one_out", "reinforce", "rloo", "grpo", "dr_grpo", "ppo"])
def test_gradients_are_those_of_a_training_step(entry: str, tmp_path: Path) -> None:
    """The trainer's gradient norm at its first step, for the same seed and step number, with a KL in the return."""
    texts = ["a cat", "a longer dog", "x", "yes"]

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [0.5 * len(set(text)) + text.count("e") for text in completions]

    lab = LabConfig(methods=[entry], batch_size=4, max_completion_length=6, beta=0.3, top_k=50)
    training = lab.training(entry, output_dir=str(tmp_path / "x"), dataset_split="train")
    settings = {"num_ppo_epochs": 1} if entry == "ppo" else {}
    policy, rows = tiny_model("llama", vocab_size=VOCAB_SIZE), Dataset.from_list([{"prompt": text} for text in texts])
    trainer = ReMaxTrainer(
        policy,
        reward,
        ReMaxConfig(**{**vars(training), **settings}),
        train_dataset=rows,
        processing_class=toy_tokenizer(),
    )
    probe = Estimator(trainer.parts, training, trainer.policy)
    drawn = draw_all(trainer.parts, trainer.parts.prompts, num_samples=3, greedy=True, seed=42, steps=[5])
    out = np.zeros((1, sum(p.numel() for p in policy.parameters())), dtype=np.float32)
    costs = probe.gradients(probe.records(drawn, torch.zeros(4), []), out)
    assert all(p.grad is None for p in policy.parameters()), "the next gradient starts from nothing"
    record = trainer.step(trainer.parts.prompts, 5)
    assert record.grad_norm > 0.1
    assert float(np.linalg.norm(out[0])) == pytest.approx(record.grad_norm, rel=1e-4)
    assert costs.sampled_tokens[0] == sum(len(c.token_ids) for c in record.rollout.samples)
    assert costs.greedy_tokens[0] == sum(len(c.token_ids) for c in record.rollout.greedy)
    assert (costs.greedy_tokens[0] > 0) == (entry == "remax")
    assert costs.no_signal[0] == pytest.approx(record.no_signal.float().mean().item())


def test_an_offset_per_prompt_moves_reinforce_alone() -> None:
    parts = components(max_completion_length=3)
    draws, offsets = draws_of(parts, 12), torch.tensor([8.0, -5.0])
    moved = {}
    for entry in ("remax", "rloo", "reinforce"):
        probe, plain, shifted = estimator(parts, entry), room(parts, 12), room(parts, 12)
        probe.gradients(probe.records(draws, torch.zeros(2), []), plain)
        probe.gradients(probe.records(draws, offsets, []), shifted)
        moved[entry] = np.linalg.norm(shifted - plain) / np.linalg.norm(plain)
    assert moved["remax"] < 1e-5
    assert moved["rloo"] < 1e-5
    assert moved["reinforce"] > 1


def test_the_experiment_shows_what_an_offset_does(tmp_path: Path) -> None:
    parts = components(max_completion_length=3)
    trainings = {name: LabConfig().training(name) for name in ("remax", "reinforce", "rloo")}
    plain, shifted = measure(
        parts, trainings, PROMPTS, num_gradients=12, reward_offset=8.0, seed=0, folder=tmp_path
    ).sections
    assert (plain.reward_offset, shifted.reward_offset) == (0.0, 8.0)
    for name in ("remax", "rloo"):
        assert shifted.methods[name].same_gradients
        assert shifted.methods[name].estimates["offset_ratio"].value == 1.0
    assert not plain.methods["remax"].same_gradients
    assert not shifted.methods["reinforce"].same_gradients
    assert shifted.methods["reinforce"].estimates["offset_ratio"].interval[0] > 5
    ratio = shifted.methods["reinforce"].estimates["variance_ratio"].value
    own, first = (shifted.methods[name].estimates["variance"].value for name in ("reinforce", "remax"))
    assert ratio == pytest.approx(own / first)


def test_the_offset_is_in_units_of_the_rewards_own_deviation(tmp_path: Path) -> None:
    """REINFORCE's variance with the offset, against gradients taken by hand at these offsets."""
    parts = components(max_completion_length=3)
    measurement = measure(
        parts, {"reinforce": LabConfig().training("reinforce")}, PROMPTS, num_gradients=6, reward_offset=4.0, seed=7,
        folder=tmp_path,
    )  # fmt: skip
    drawn = draw_all(parts, PROMPTS, num_samples=1, greedy=False, seed=7, steps=range(1, NUM_WARMUP + 7))
    std = torch.cat([draw.rewards.sampled for draw in drawn[:NUM_WARMUP]]).std(correction=0)
    assert measurement.reward_std == pytest.approx(std.item())
    offsets = 4.0 * std * torch.randn(2, generator=torch.Generator().manual_seed(7))
    probe, out = estimator(parts, "reinforce"), room(parts, 6)
    probe.gradients(probe.records(drawn[NUM_WARMUP:], offsets, []), out)
    expected = out.astype(np.float64).var(axis=0, ddof=1).sum()
    assert measurement.sections[1].methods["reinforce"].estimates["variance"].value == pytest.approx(expected, rel=1e-5)


def test_fewer_samples_are_those_drawn_alone() -> None:
    parts = components(max_completion_length=4)
    (both,) = draws_of(parts, 1, start=3)
    (alone,) = draw_all(parts, PROMPTS, num_samples=1, greedy=False, seed=0, steps=[3])
    seen = both.of(LabConfig().training("remax"), torch.zeros(2))
    assert [c.token_ids for c in seen.rollout.samples] == [c.token_ids for c in alone.rollout.samples]
    assert seen.rewards.sampled.tolist() == alone.rewards.sampled.tolist()
    assert len(seen.rewards.greedy) == len(seen.rollout.greedy) == 2
    assert not both.of(LabConfig().training("reinforce"), torch.zeros(2)).rollout.greedy


def test_learned_baselines_are_warmed_up_and_then_fixed() -> None:
    parts = components(max_completion_length=2)
    warmup, draws = draws_of(parts, 3), draws_of(parts, 4, start=9)
    probe = estimator(parts, "reinforce:moving_average")
    means = [draw.rewards.sampled.view(2, 2)[:, 0].mean().item() for draw in warmup]
    average = (means[2] + 0.9 * means[1] + 0.81 * means[0]) / (1 + 0.9 + 0.81)
    for offset in (0.0, 3.0):
        for draw, record in zip(draws, probe.records(draws, torch.full((2,), offset), warmup), strict=True):
            expected = draw.rewards.sampled.view(2, 2)[:, 0] - average
            assert record.advantages.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_samples_without_signal_are_counted() -> None:
    parts = components(max_completion_length=1)
    parts.sampling = Sampling(1, (EOS,), temperature=1e-3)  # every sample is the greedy completion
    probe, out = estimator(parts, "remax"), room(parts, 2)
    assert probe.gradients(probe.records(draws_of(parts, 2), torch.zeros(2), []), out).no_signal.tolist() == [1.0, 1.0]
    assert not out.any()


def test_layers_are_blocks_and_what_is_outside_of_them() -> None:
    layers = layers_of(tiny_model("gpt2"))
    assert list(layers) == ["wte", "wpe", "h.0", "h.1", "ln_f"]
    runs = sorted((run.start, run.stop) for own in layers.values() for run in own)
    assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])]
    assert runs[-1][1] == sum(p.numel() for p in tiny_model("gpt2").parameters())

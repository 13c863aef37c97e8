"""The estimator laboratory: statistics against numpy, variances against enumeration, gradients against the trainer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from matplotlib.image import imread
from torch import Tensor

from remax import ReMaxConfig, ReMaxTrainer
from remax.assembly import choose_engine
from remax.cli import main
from remax.components import Components
from remax.config import LabConfig, LabInputs, OptimiserOptions
from remax.errors import UserError
from remax.interfaces import Completion, Prompt, Sampling
from remax.lab import statistics
from remax.lab.experiment import assemble_lab
from remax.lab.gradients import Draw, Estimator, draw_all, layers_of
from remax.lab.measurement import NUM_WARMUP, measure
from remax.lab.report import number
from remax.lab.statistics import Estimate, Floats, gram_by_layer, resample_counts
from remax.learner import Learner
from remax.logprobs import CompletionScorer
from remax.processes import make_accelerator
from tiny_models import tiny_model
from toy_tokenizers import EOS, VOCAB_SIZE, characters, toy_tokenizer

LAYERS = {"a": [slice(0, 20), slice(33, 50)], "b": [slice(20, 33)]}

# Statistics -----------------------------------------------------------------------------------------------------------


def noisy_gradients(seed: int, num: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """[K, 50] float32 gradients with an expectation [50] of squared length 2 and a variance of 50 x 0.3^2 = 4.5."""
    generator = np.random.default_rng(seed)
    expectation = np.full(50, 0.2)
    return (expectation + 0.3 * generator.normal(size=(num, 50))).astype(np.float32), expectation


def test_statistics_equal_those_of_the_gradients_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "COLUMNS_AT_ONCE", 7)
    gradients, _ = noisy_gradients(0)
    grams, exact = gram_by_layer(gradients, LAYERS), gradients.astype(np.float64)
    gram, counts = sum(grams.values()), resample_counts(12, 0)
    np.testing.assert_allclose(gram, exact @ exact.T, rtol=1e-12)
    trace = np.trace(np.cov(exact.T))
    assert statistics.variance(gram, counts).value == pytest.approx(trace, rel=1e-12)
    by_layer = {name: statistics.variance(own, counts).value for name, own in grams.items()}
    assert by_layer["b"] == pytest.approx(np.trace(np.cov(exact[:, 20:33].T)), rel=1e-12)
    assert sum(by_layer.values()) == pytest.approx(trace, rel=1e-12)
    mean = exact.mean(0)
    assert statistics.signal(gram, counts).value == pytest.approx(mean @ mean - trace / 12, rel=1e-12)
    for k, cosine in enumerate(statistics.cosines(gram)):
        others = np.delete(exact, k, axis=0).mean(0)
        expected = exact[k] @ others / np.linalg.norm(exact[k]) / np.linalg.norm(others)
        assert cosine == pytest.approx(expected, rel=1e-9)
    minus, _ = noisy_gradients(1)
    differences = gram_by_layer(gradients, LAYERS, minus=minus)
    np.testing.assert_allclose(sum(differences.values()), (exact - minus) @ (exact - minus).T, rtol=1e-9)


def test_resamples_are_statistics_of_resampled_gradients() -> None:
    gradients, _ = noisy_gradients(0)
    gram, counts = sum(gram_by_layer(gradients, LAYERS).values()), resample_counts(12, 3)
    assert (counts.sum(1) == 12).all()
    drawn = np.repeat(gradients.astype(np.float64), counts[5].astype(int), axis=0)
    trace, mean = np.trace(np.cov(drawn.T)) * 12 / 11, drawn.mean(0)
    assert statistics.variance(gram, counts).resampled[5] == pytest.approx(trace, rel=1e-9)
    assert statistics.signal(gram, counts).resampled[5] == pytest.approx(mean @ mean - 2 * trace / 12, rel=1e-9)


def test_intervals_cover_the_truth_and_estimates_are_unbiased() -> None:
    inside, values, truths = np.zeros(4), np.zeros(2), (4.5, 2.0, 2.0 / 4.5, 4.5 / 2.0)
    for seed in range(200):
        gradients, _ = noisy_gradients(seed, num=30)
        gram, counts = sum(gram_by_layer(gradients, LAYERS).values()), resample_counts(30, seed)[:500]
        variance, signal = statistics.variance(gram, counts), statistics.signal(gram, counts)
        values += np.array([variance.value, signal.value]) / 200
        for i, estimate in enumerate((variance, signal, signal / variance, variance / signal)):
            low, high = estimate.interval
            inside[i] += low <= truths[i] <= high
    assert values == pytest.approx([4.5, 2.0], rel=0.02)
    assert (inside / 200 > 0.88).all()
    assert (inside / 200 < 0.995).all()


def test_pure_noise_has_no_signal_and_no_direction() -> None:
    noise = np.random.default_rng(0).normal(size=(40, 500)).astype(np.float32)
    gram, counts = sum(gram_by_layer(noise, {"a": [slice(0, 500)]}).values()), resample_counts(40, 0)
    variance, signal = statistics.variance(gram, counts), statistics.signal(gram, counts)
    assert signal.value < 0.05 * variance.value / 40 * 40
    assert (variance / signal).interval[1] == float("inf")
    assert abs(statistics.cosines(gram).mean()) < 0.03, "a mean with the gradient in it would be at 0.16"
    assert statistics.cosines(np.zeros((3, 3))).tolist() == [0.0, 0.0, 0.0]


def test_agreement_tells_equal_expectations_from_others() -> None:
    p_values, distances = [], []
    for seed in range(100):
        noise = np.random.default_rng(seed).normal(size=(30, 20))
        result = statistics.agreement(noise @ noise.T, resample_counts(30, seed))
        p_values.append(result.p_value)
        distances.append(result.distance)
    assert np.mean(distances) == pytest.approx(1.0, abs=0.05)
    assert 0.35 < np.mean(p_values) < 0.65
    assert np.mean(np.array(p_values) < 0.05) < 0.15
    noise = np.random.default_rng(0).normal(size=(30, 20)) + 0.5
    shifted = statistics.agreement(noise @ noise.T, resample_counts(30, 0))
    assert shifted.p_value == 0.0
    assert shifted.distance > 2
    assert statistics.agreement(np.zeros((30, 30)), resample_counts(30, 0)) == (0.0, 1.0)


# Gradients ------------------------------------------------------------------------------------------------------------


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


# The command ----------------------------------------------------------------------------------------------------------

REWARDS = """
def letters(completions, **columns):
    return [0.1 * sum(ord(c) % 7 for c in text) for text in completions]

def constant(completions, **columns):
    return [1.0] * len(completions)

def unlikely(completions, **columns):
    # None for the last ones, which are the greedy completions.
    return [1.0] * (len(completions) - 3) + [None] * 3

def nothing(completions, **columns):
    return [None] * len(completions)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    for name, size in (("policy", VOCAB_SIZE), ("larger", VOCAB_SIZE + 3)):
        tiny_model("llama", vocab_size=size, eos_token_id=EOS).save_pretrained(folder / name)
        toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{c} cat"}) + "\n" for c in "abcdef"))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def flags(world: Path, out: Path, **changes: Any) -> list[str]:
    settings = {
        "model": world / "policy",
        "reward_funcs": f"{world / 'rewards.py'}:letters",
        "train_dataset": world / "prompts.jsonl",
        "output_dir": out,
        "batch_size": 3,
        "max_completion_length": 5,
        "num_gradients": 4,
        **changes,
    }
    chosen = {name: value for name, value in settings.items() if value is not None}
    return ["lab", *(part for name, value in chosen.items() for part in (f"--{name}", *str(value).split()))]


def test_command(world: Path, tmp_path: Path, capsys: Any) -> None:
    methods = ["remax", "remax:mixed", "reinforce", "reinforce:moving_average", "rloo", "grpo", "dr_grpo", "ppo"]
    out = tmp_path / "out"
    assert main(flags(world, out, methods=" ".join(methods), reward_offset=5, ref_model=world / "policy")) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    results = json.loads((out / "lab.json").read_text(), parse_constant=refuse)
    assert results["settings"]["reward_offset"] == 5
    assert {"remax-rlhf", "torch", "transformers"} <= set(results["versions"])
    assert [section["reward_offset"] for section in results["sections"]] == [0, 5]
    for section in results["sections"]:
        assert list(section["methods"]) == methods
        for figures in section["methods"].values():
            variance, (low, high) = figures["variance"]["value"], figures["variance"]["interval"]
            assert low <= variance * 1.5
            assert low < high
            layers = [layer["value"] for layer in figures["variance_by_layer"].values()]
            assert sum(layers) == pytest.approx(variance, rel=1e-6)
            tokens = figures["sampled_tokens"]["value"] + figures["greedy_tokens"]["value"]
            assert figures["variance_x_tokens"]["value"] == pytest.approx(variance * tokens, rel=1e-6)
            assert len(figures["cosines"]) == 4
    plain = results["sections"][0]["methods"]
    assert [figures["greedy_tokens"]["value"] > 0 for figures in plain.values()] == [True, True] + [False] * 6
    assert [figures["num_generations"] for figures in plain.values()] == [1, 2, 1, 1, 2, 2, 2, 1]
    assert [figures["agreement"] is not None for figures in plain.values()] == [False, *[True] * 4, *[False] * 3]
    half = plain["dr_grpo"]["variance"]["value"] / plain["rloo"]["variance"]["value"]
    assert half == pytest.approx(0.25, rel=1e-4), "with two samples Dr. GRPO's gradient is half of RLOO's"
    assert imread(out / "lab.png").shape[1] == 1500
    shown = capsys.readouterr().out
    assert "rewards as they are" in shown
    assert "rewards shifted by N(0, 5 sd) per prompt" in shown
    assert "unmoved" in shown
    assert {path.name for path in out.iterdir()} == {"lab.json", "lab.png", "config.yaml"}
    assert yaml.safe_load((out / "config.yaml").read_text())["methods"] == methods

    again = tmp_path / "again"
    assert main(["lab", "--config", str(out / "config.yaml"), "--output_dir", str(again)]) == 0
    assert json.loads((again / "lab.json").read_text())["sections"] == results["sections"]


def test_num_generations_is_for_all_methods(world: Path, tmp_path: Path) -> None:
    assert main(flags(world, tmp_path / "out", methods="rloo reinforce", num_generations=3, num_gradients=2)) == 0
    methods = json.loads((tmp_path / "out" / "lab.json").read_text())["sections"][0]["methods"]
    assert [figures["num_generations"] for figures in methods.values()] == [3, 3]
    assert methods["rloo"]["sampled_tokens"] == methods["reinforce"]["sampled_tokens"]


def test_reference_is_loaded_only_where_log_ratios_are_not_zero(world: Path) -> None:
    def reference(ref_model: str | None = None, **settings: Any) -> CompletionScorer | None:
        inputs = LabInputs(
            model=str(world / "policy"), train_dataset=str(world / "prompts.jsonl"), reward_funcs=["x"],
            ref_model=ref_model,
        )  # fmt: skip
        args = LabConfig(methods=["remax"], batch_size=2, max_completion_length=4, **settings)
        trainings = {"remax": args.training("remax")}
        return assemble_lab(inputs, [lambda completions, **columns: [1.0]], args, trainings).reference

    assert reference() is None
    assert reference(top_p=0.9, beta=0.0) is None
    assert reference(top_p=0.9) is not None
    assert reference(str(world / "policy")) is not None
    with pytest.raises(UserError, match=r"^--ref_model is .*larger: its vocabulary is not that of --model"):
        reference(str(world / "larger"))


MISTAKES = {
    "unknown method": ({"methods": "remax rolo"}, "--methods has rolo: there is no such method; set some of remax, re"),
    "unknown baseline": ({"methods": "remax:none"}, "--methods has remax:none: remax has no such baseline; set remax:"),
    "twice": ({"methods": "remax remax:greedy"}, "--methods is remax remax:greedy: one is named twice"),
    "one sample": (
        {"methods": "remax rloo", "num_generations": 1},
        "--num_generations is 1: rloo of --methods compare",
    ),
    "one gradient": ({"num_gradients": 1}, "--num_gradients is 1: one gradient has no variance"),
    "no prompts": ({"batch_size": 0}, "--batch_size is 0: "),
    "negative offset": ({"reward_offset": -1}, "--reward_offset is -1.0: no standard deviation is negative"),
    "kl of ppo": ({"kl_mode": "loss"}, "--kl_mode is loss: ppo takes the KL as reward per token"),
    "value model": ({"methods": "remax", "value_model": "x"}, "--value_model is x: only ppo has one"),
    "unused": ({"num_eval_prompts": 8}, "--num_eval_prompts is 8: the lab evaluates nothing"),
    "no reward": ({"reward_funcs": None}, "neither --reward_model nor --reward_funcs is set"),
    "no KL": ({"ref_model": "{world}/policy", "beta": 0, "methods": "remax"}, "--ref_model is {world}/policy: with"),
    "no reference": ({"ref_model": "{world}/none"}, "--ref_model is {world}/none: "),
    "few prompts": ({"batch_size": 7}, "--batch_size is 7: --train_dataset has only 6 usable prompts"),
    "no unit": (
        {"reward_funcs": "{world}/rewards.py:constant", "reward_offset": 5},
        "--reward_offset is 5.0: the rewards of all samples are equal",
    ),
    "no rewards": ({"reward_funcs": "{world}/rewards.py:nothing"}, "the rewards (nothing) gave no number"),
    "no greedy rewards": ({"reward_funcs": "{world}/rewards.py:unlikely"}, "the rewards (unlikely) gave no number"),
    "no room": ({"num_gradients": 10**9, "methods": "remax"}, "--num_gradients is 1000000000: two sets of gradients"),
}


@pytest.mark.parametrize(("changes", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_sentence_and_leave_nothing(
    changes: dict[str, Any], said: str, world: Path, tmp_path: Path, capsys: Any
) -> None:
    filled = {k: v.replace("{world}", str(world)) if isinstance(v, str) else v for k, v in changes.items()}
    assert main(flags(world, tmp_path / "out", **filled)) == 2
    error = capsys.readouterr().err
    errors = [line for line in error.splitlines() if line.startswith("remax: ")]
    assert len(errors) == 1
    assert errors[0].startswith("remax: " + said.replace("{world}", str(world)))
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_numbers_are_short() -> None:
    values = [0.0, 0.00012, 0.1234, 12.345, 1234.4, 12345.0, 999_999.0, 1234567.0, 2.5e9, -0.5, None]
    shown = ["0", "1.2e-04", "0.123", "12.3", "1234", "12.3k", "1000k", "1.23M", "2.5G", "-0.5", "\N{INFINITY}"]
    assert [number(value) for value in values] == shown


def test_quotients_by_zero_are_infinite() -> None:
    one, none = Estimate(1.0, np.ones(100)), Estimate(0.0, np.zeros(100))
    assert (one / none).value == float("inf")
    assert (one / none).interval == (float("inf"), float("inf"))

"""What `remax doctor` finds in reward models and in a trial rollout."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig

from doctor_checks import QUESTIONS, chat_tokens, only, set_up, statuses
from remax.doctor import reward, rollout
from remax.doctor.context import Context
from remax.interfaces import Completion, Prompt, Rollout
from remax.rewards import CallableReward, RewardModel
from remax.stages.reward import Pairs
from toy_tokenizers import BOS, CHATML, EOS, PAD, VOCAB_SIZE, toy_tokenizer
from toy_training import policy

# Reward model ---------------------------------------------------------------------------------------------------------


class FakeRewardModel(nn.Module):
    """Scores the sum of the values of all tokens up to the one where it reads its scalar."""

    def __init__(self, values: torch.Tensor, *, reads: str = "last token", pad_token_id: int | None = PAD) -> None:
        super().__init__()
        self.values, self.reads = nn.Parameter(values), reads
        self.config = SimpleNamespace(pad_token_id=pad_token_id, num_labels=1)
        self.config.get_text_config = lambda: self.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        rows, length = input_ids.shape
        real = input_ids != self.config.pad_token_id
        last = (real * torch.arange(length)).argmax(-1)
        if self.reads == "last column":
            last = torch.full((rows,), length - 1)
        scores = self.values[input_ids].cumsum(-1)[torch.arange(rows), last]
        if self.reads == "row number":
            scores = scores + torch.arange(rows)
        return SimpleNamespace(logits=scores.unsqueeze(-1))


VALUES = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LETTER = VOCAB_SIZE - 1


def fake(values: torch.Tensor = VALUES, **kwargs: Any) -> RewardModel:
    return RewardModel(FakeRewardModel(values, **kwargs), toy_tokenizer())


PROBES = [[BOS, *range(10, 10 + n), EOS] for n in range(1, 9)]


def test_a_sound_reward_model_passes() -> None:
    assert statuses(reward.padding_findings(fake(), PROBES)) == ["pass"] * 3
    assert statuses(reward.position_findings(fake(), PROBES)) == ["pass"]


@pytest.mark.parametrize(
    ("reads", "failing"), [("last column", ["fail", "fail", "pass"]), ("row number", ["fail", "pass", "fail"])]
)
def test_scores_that_depend_on_padding_or_order(reads: str, failing: list[str]) -> None:
    assert statuses(reward.padding_findings(fake(reads=reads), PROBES)) == failing


def test_scalar_that_is_read_before_the_end() -> None:
    (finding,) = reward.position_findings(fake(pad_token_id=EOS), PROBES)
    assert finding.status == "warn"
    assert f"in 0 of {len(PROBES)} texts" in finding.finding


def test_a_real_model_whose_pad_is_eos() -> None:
    """It reads its scalar at the last token that is not EOS, so EOS never counts."""
    for pad, status, number in ((PAD, "pass", len(PROBES)), (EOS, "warn", 0)):
        settings = {**policy().config.to_dict(), "num_labels": 1, "pad_token_id": pad, "architectures": None}
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(LlamaConfig(**settings)).eval()
        (finding,) = reward.position_findings(RewardModel(model, toy_tokenizer()), PROBES)
        assert finding.status == status
        assert f"in {number} of {len(PROBES)} texts" in finding.finding


def test_probes_are_different_texts(tmp_path: Path) -> None:
    context = set_up(tmp_path, [{"prompt": "one"}] * 4)
    context.reward_functions = [fake()]
    assert reward.check_reward_padding(context) == reward.check_reward_position(context) == []
    context = set_up(tmp_path, [{"prompt": "one"}, {"prompt": "three"}] * 4)
    context.reward_functions = [fake()]
    assert {"2 scores" in own.finding for own in reward.check_reward_padding(context)} == {True}


def test_scores_that_say_nothing() -> None:
    (finding,) = reward.padding_findings(fake(torch.zeros(VOCAB_SIZE)), PROBES)
    assert (finding.check, finding.status) == ("reward scores", "fail")
    nan = torch.full((VOCAB_SIZE,), torch.nan)
    assert "fail" in statuses(reward.padding_findings(fake(nan), PROBES))


def pairs_won(wins: int, losses: int) -> Pairs:
    """Pairs of equally long texts of which a model that values LETTER ranks so many right."""
    better, worse = [[BOS, 9, LETTER, 9, EOS]], [[BOS, 9, 9, 9, EOS]]
    return Pairs(better * wins + worse * losses, worse * wins + better * losses)


@pytest.mark.parametrize(
    ("wins", "losses", "status"), [(40, 0, "pass"), (25, 15, "warn"), (15, 25, "warn"), (5, 35, "fail")]
)
def test_pairs(wins: int, losses: int, status: str) -> None:
    values = torch.zeros(VOCAB_SIZE)
    values[LETTER] = 1.0
    finding, length = reward.pair_findings(fake(values), pairs_won(wins, losses))
    assert finding.status == status
    assert f"in {wins / 40:.1%} of 40 pairs" in finding.finding
    assert length.status == "pass", "all texts are equally long"
    if wins == 40:
        assert "(95% interval 91.2% to 100.0%)" in finding.finding  # Wilson: 40 / (40 + 1.96^2)


def test_inverted_reward_model() -> None:
    values = torch.zeros(VOCAB_SIZE)
    values[LETTER] = -1.0
    finding, _ = reward.pair_findings(fake(values), pairs_won(40, 0))
    assert finding.status == "fail"
    assert "in 0.0% of 40 pairs" in finding.finding


def test_reward_that_is_the_length() -> None:
    texts = [[BOS] + [9] * n + [EOS] for n in range(1, 41)]
    _, length = reward.pair_findings(fake(torch.ones(VOCAB_SIZE)), Pairs(texts[20:], texts[:20]))
    assert (length.check, length.status) == ("reward length", "fail")
    assert "correlation +1.00" in length.finding
    assert "over 40 texts" in length.finding
    _, length = reward.pair_findings(fake(), Pairs(texts[20:], [[BOS, 7 + n, EOS] for n in range(20)]))
    assert reward.length_finding("x", 0.5, 200, "texts").status == "warn"
    assert reward.length_finding("x", -0.5, 200, "texts").status == "warn"
    assert reward.length_finding("x", 0.5, 8, "texts").status == "pass", "too few to tell"
    assert reward.length_finding("x", 1.0, 99, "texts", may_fail=False).status == "warn"


@pytest.mark.parametrize(
    ("pad", "kwargs", "status", "words"),
    [
        (PAD, {}, "pass", "id 0 in config and tokenizer"),
        (None, {}, "warn", "names none"),
        (EOS, {}, "warn", "is also EOS"),
        (PAD, {"pad_token": "<|im_end|>"}, "warn", "0 in its config, 4 in its tokenizer"),
    ],
    ids=["sound", "none", "EOS", "another than the tokenizer's"],
)
def test_reward_pad(pad: int | None, kwargs: dict[str, Any], status: str, words: str, tmp_path: Path) -> None:
    context = set_up(tmp_path)
    context.reward_tokenizer = toy_tokenizer(**kwargs)
    text = SimpleNamespace(pad_token_id=pad, vocab_size=VOCAB_SIZE)
    context.reward_config = SimpleNamespace(get_text_config=lambda: text)
    assert statuses(reward.check_reward_tokenizer(context)) == ["pass", status]
    assert words in reward.check_reward_tokenizer(context)[1].finding
    text.vocab_size = 20
    assert reward.check_reward_tokenizer(context)[0].status == "fail"


def test_reward_template_that_rewrites_prompts(tmp_path: Path) -> None:
    context = set_up(tmp_path, QUESTIONS, tokens=chat_tokens())
    context.reward_tokenizer = chat_tokens()
    assert only(reward.check_reward_template, context).status == "pass"
    context.reward_tokenizer = toy_tokenizer(chat_template="{{ messages | length }}" + CHATML)
    finding = only(reward.check_reward_template, context)
    assert (finding.status, f"{len(QUESTIONS)} of {len(QUESTIONS)}" in finding.finding) == ("warn", True)


# Rollout --------------------------------------------------------------------------------------------------------------


def drawn(*truncated: bool) -> Rollout:
    """A rollout with two samples per prompt that were cut or not."""
    prompt = Prompt(0, "a", [BOS, 9])
    samples = [Completion(prompt, 0, [9] * (8 if cut else 3), [-1.0], cut) for cut in truncated]
    return Rollout(samples, [replace(c, sample_index=-1) for c in samples[::2]])


@pytest.mark.parametrize(
    ("num_cut", "number", "status"),
    [(0, 32, "pass"), (8, 32, "pass"), (9, 32, "warn"), (32, 32, "fail"), (8, 8, "warn")],
)
def test_stopping(num_cut: int, number: int, status: str, tmp_path: Path) -> None:
    context = set_up(tmp_path)
    context.rollout = drawn(*(row < num_cut for row in range(number)))
    finding = only(rollout.check_stopping, context)
    assert finding.status == status
    assert f"{number - num_cut} of {number} samples" in finding.finding


def rewarded(folder: Path, sampled: list[float], greedy: list[float], **settings: Any) -> Context:
    context = set_up(folder, **settings)
    context.rollout = drawn(*[False] * len(sampled))
    context.trial_rewards = SimpleNamespace(sampled=torch.tensor(sampled), greedy=torch.tensor(greedy))
    return context


def test_signal(tmp_path: Path) -> None:
    sound = rewarded(tmp_path, [1.0, 0.0] * 16, [0.0] * 16)
    finding = only(rollout.check_signal, sound)
    assert finding.status == "pass"
    assert "50% of 32 samples" in finding.finding
    own_baselines = [reward for prompt in range(16) for reward in (float(prompt), -1.0)]
    finding = only(rollout.check_signal, rewarded(tmp_path, own_baselines, [float(prompt) for prompt in range(16)]))
    assert "50% of 32 samples" in finding.finding, "each is compared with the greedy reward of its own prompt"
    assert only(rollout.check_signal, rewarded(tmp_path, [1.0, 0.0, 0.0, 0.0] * 8, [0.0] * 16)).status == "warn"
    assert only(rollout.check_signal, rewarded(tmp_path, [2.0] * 32, [2.0] * 16)).status == "fail"
    compared = {"method": "rloo", "num_generations": 2}
    assert (
        only(rollout.check_signal, rewarded(tmp_path, [1.0, 1.0, 0.0, 0.0] * 8, [9.0] * 16, **compared)).status
        == "fail"
    )
    assert only(rollout.check_signal, rewarded(tmp_path, [1.0, 0.0] * 16, [1.0] * 16, **compared)).status == "pass"
    alone = rewarded(tmp_path, [1.0, 0.0] * 16, [1.0] * 16, method="reinforce")
    assert only(rollout.check_signal, alone).status == "pass"


def test_missing_rewards_and_greedy_gap(tmp_path: Path) -> None:
    def judge(sampled: list[float], greedy: list[float]) -> dict[str, str]:
        return {f.check: f.status for f in rollout.check_rewards(rewarded(tmp_path, sampled, greedy))}

    nan = math.nan
    assert judge([1.0, 0.0] * 16, [1.0] * 16) == {"rewards": "pass", "greedy gap": "pass"}
    assert judge([1.0, 0.0, nan, 0.0] * 8, [1.0] * 16)["rewards"] == "warn"
    assert judge([1.0, nan, nan, nan] * 8, [nan] * 16)["rewards"] == "fail"
    assert judge([nan] * 32, [nan] * 16) == {"rewards": "fail"}
    assert judge([1.0, 0.0] * 16, [3.0] * 16)["greedy gap"] == "warn"
    assert only(rollout.check_signal, rewarded(tmp_path, [nan] * 32, [1.0] * 16)).status == "skip"


class ShiftedEngine:
    """Draws as another engine does and reports log-probabilities that are off."""

    def __init__(self, engine: Any, shift: float) -> None:
        self.engine, self.shift = engine, shift

    def generate(self, *args: Any, **kwargs: Any) -> Rollout:
        drawn = self.engine.generate(*args, **kwargs)
        for completion in drawn.samples:
            completion.logprobs = [logprob + self.shift for logprob in completion.logprobs]
        return drawn


@pytest.mark.parametrize(("shift", "status"), [(0.0, "pass"), (0.01, "warn"), (0.5, "fail"), (math.nan, "fail")])
def test_logprob_agreement(shift: float, status: str, tmp_path: Path) -> None:
    context = set_up(tmp_path, temperature=0.7)
    context.components = replace(context.components, engine=ShiftedEngine(context.components.engine, shift))
    assert only(rollout.check_log_probabilities, context).status == status


def test_a_trial_rollout_is_scored_by_the_rewards_of_the_run(tmp_path: Path) -> None:
    def hopeless(completions: list[str], **_: Any) -> list[float]:
        raise RuntimeError("no")

    assert rollout.check_rewards(set_up(tmp_path))[0].status == "pass"
    with pytest.warns(UserWarning, match="hopeless"):
        found = rollout.check_rewards(set_up(tmp_path, rewards=[CallableReward(hopeless)]))
    assert statuses(found) == ["fail"]

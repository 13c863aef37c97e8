"""The parts of the supervised stages that need no training: tokens, stop tokens and rankings."""

from typing import Any

import datasets
import numpy as np
import pytest
import torch

from remax.errors import UserError
from remax.stages.reward import Pairs, correlation, rank_pairs, wilson_interval
from remax.stages.sft import as_examples, chat_stop_id, tokenise
from toy_tokenizers import BOS, CHATML, END, EOS, characters, say, toy_tokenizer, turn


def dataset(*rows: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


# Tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("named", ["", "</s>"])
def test_texts_end_in_one_eos_whoever_puts_it_there(around: str, named: str) -> None:
    bos = [BOS] if "<s>" in around else []
    tokenizer = toy_tokenizer(around, bos_token="<s>")
    text = tokenise(as_examples(dataset({"text": f"ab{named}"}), flag="--x"), tokenizer, 96)
    assert text.to_list() == [
        {"input_ids": [*bos, *characters("ab"), EOS], "labels": [*bos, *characters("ab"), EOS]},
    ]
    answer = tokenise(as_examples(dataset({"prompt": "ab", "completion": f"c{named}"}), flag="--x"), tokenizer, 96)
    untrained = [-100] * len([*bos, *characters("ab")])
    assert answer.to_list() == [
        {"input_ids": [*bos, *characters("abc"), EOS], "labels": [*untrained, *characters("c"), EOS]},
    ]


def test_a_prefilled_answer_is_continued_and_not_begun_again() -> None:
    tokenizer = toy_tokenizer(bos_token="<s>", chat_template=CHATML)
    rows = dataset({"prompt": say("hi", "y"), "completion": say("o", roles=["assistant"])})
    (row,) = tokenise(as_examples(rows, flag="--x"), tokenizer, 96).to_list()
    assert row["input_ids"] == turn("user", "hi") + turn("assistant", "yo")
    assert [label for label in row["labels"] if label != -100] == [*characters("o"), END, *characters("\n")]


def test_chat_template_without_a_stop_token_is_refused() -> None:
    assert chat_stop_id(toy_tokenizer(chat_template=CHATML)) == END
    with pytest.raises(
        UserError, match=r"without a special token, so the model would never learn to stop; put \{\{ eos"
    ):
        chat_stop_id(toy_tokenizer(chat_template=CHATML.replace("<|im_end|>", "")))
    with pytest.raises(UserError, match="its tokenizer has no chat template, so messages cannot be written"):
        chat_stop_id(toy_tokenizer())


# Rankings -------------------------------------------------------------------------------------------------------------


class Table:
    """A reward model that knows the rewards of its inputs by heart."""

    def __init__(self, rewards: dict[tuple[int, ...], float]) -> None:
        self.rewards = rewards

    def score_ids(self, inputs: list[list[int]]) -> list[float]:
        return [self.rewards[tuple(ids)] for ids in inputs]


def test_quality_of_a_ranking_against_numpy() -> None:
    rng = np.random.default_rng(0)
    chosen = [[i, *[0] * int(n)] for i, n in enumerate(rng.integers(1, 5, 50))]
    rejected = [[100 + i, *[0] * int(n)] for i, n in enumerate(rng.integers(1, 5, 50))]
    rewards = {tuple(ids): float(rng.normal(0.3 * (ids[0] < 100))) for ids in chosen + rejected}
    rewards[tuple(rejected[0])] = rewards[tuple(chosen[0])]  # a tie ranks nothing
    quality = rank_pairs(Table(rewards), Pairs(chosen, rejected))  # type: ignore[arg-type]

    good, bad = (np.array([rewards[tuple(ids)] for ids in side]) for side in (chosen, rejected))
    long, short = (np.array([len(ids) for ids in side]) for side in (chosen, rejected))
    assert quality["num_pairs"] == 50
    assert quality["accuracy"] == pytest.approx(np.mean(good > bad))
    assert quality["margin"] == pytest.approx(np.mean(good - bad))
    expected = np.corrcoef(np.concatenate([long, short]), np.concatenate([good, bad]))[0, 1]
    assert quality["length_correlation"] == pytest.approx(expected)
    assert (long == short).any()
    assert quality["longer_wins"] == pytest.approx(np.mean(np.where(long == short, 0.5, long > short)))


def test_interval_and_correlation_at_known_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I: Wilson's score interval without continuity correction.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0 / 20, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1.0, 20) == pytest.approx((0.8389, 1.0), abs=5e-5)
    assert correlation(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0])) == 0.0

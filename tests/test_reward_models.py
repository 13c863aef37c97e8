"""Learned rewards: the texts that a reward model reads, and its score of each whatever else is scored."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from remax.errors import UserError
from remax.interfaces import Completion
from remax.rewards import RewardModel, require_chat_template, reward_input_ids
from scored_texts import completion
from toy_tokenizers import BOS, CHATML, EOS, PAD, VOCAB_SIZE, characters, say, toy_tokenizer, turn

# Texts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", ["<s> $A", "<s> $A </s>"])
def test_text_gets_the_tokenizers_bos_and_one_eos_if_finished(around: str) -> None:
    tokenizer = toy_tokenizer(around, bos_token="<s>")
    assert reward_input_ids(tokenizer, "ab", "c", True) == [BOS, *characters("abc"), EOS]
    assert reward_input_ids(tokenizer, "ab", "c</s>", True) == [BOS, *characters("abc"), EOS]
    assert reward_input_ids(tokenizer, "ab", "c", False) == [BOS, *characters("abc")]


def test_tokenizer_without_eos_appends_nothing() -> None:
    assert reward_input_ids(toy_tokenizer(eos_token=None), "ab", "c", True) == characters("abc")


def test_real_tokenizer_joins_prompt_and_completion(tinystories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    # The pieces of stories260K: ▁Once ▁upon ▁a ▁time; a completion that is tokenised alone would start with another ▁.
    joint = [1, 403, 407, 261, 378]
    assert tokenizer.convert_ids_to_tokens(joint[1:]) == ["▁Once", "▁upon", "▁a", "▁time"]
    assert reward_input_ids(tokenizer, "Once upon", " a time", True) == [*joint, 2]
    assert reward_input_ids(tokenizer, "Once up", "on a time", False) == joint


def test_conversation_is_rendered_by_the_reward_models_template() -> None:
    tokenizer = toy_tokenizer("<s> $A", eos_token="<|im_end|>", chat_template=CHATML)
    prompt, answer = say("hi"), say("yo", roles=["assistant"])
    assert reward_input_ids(tokenizer, prompt, answer, True) == turn("user", "hi") + turn("assistant", "yo")
    cut = turn("user", "hi") + turn("assistant", "yo", closed=False)
    assert reward_input_ids(tokenizer, prompt, answer, False) == cut
    assert reward_input_ids(tokenizer, "", prompt + answer, True) == turn("user", "hi") + turn("assistant", "yo")


def test_unfinished_answers_that_templates_trim_or_that_say_nothing_are_not_closed() -> None:
    trimming = CHATML.replace("message['content']", "message['content'].split('</think>')[-1].strip()")
    tokenizer = toy_tokenizer(chat_template=trimming)
    for text, shown in [("", ""), ("<think>so</think> yo", "yo"), ("yo", "yo")]:
        ids = reward_input_ids(tokenizer, say("hi"), say(text, roles=["assistant"]), False)
        assert ids == turn("user", "hi") + turn("assistant", shown, closed=False)


def test_prefilled_answer_and_its_continuation_are_one_message() -> None:
    tokenizer = toy_tokenizer(chat_template=CHATML)
    ids = reward_input_ids(tokenizer, say("hi", "Well,"), say(" yo", roles=["assistant"]), True)
    assert ids == turn("user", "hi") + turn("assistant", "Well, yo")


def test_conversation_without_a_template_is_refused() -> None:
    tokenizer = toy_tokenizer(name_or_path="some/model")
    with pytest.raises(
        UserError, match=r"^--reward_model is some/model: its tokenizer has no chat template, so .*; set"
    ):
        reward_input_ids(tokenizer, say("hi"), say("yo", roles=["assistant"]), True)
    with pytest.raises(UserError, match=r"^--model is some/model"):
        require_chat_template(tokenizer, flag="--model")


# Learned rewards ------------------------------------------------------------------------------------------------------


def reward_llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    defaults = {"max_position_embeddings": 64, "num_labels": 1, "pad_token_id": PAD, "initializer_range": 0.3}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=VOCAB_SIZE, **sizes, **{**defaults, **settings}))


@pytest.fixture
def scored() -> list[Completion]:
    texts = ["yes", "a longer answer", "no", "b", "a longer answer still, with more to say", "yes"]
    return [completion("ask: ", text, truncated=i == 5) for i, text in enumerate(texts)]


def by_hand(model: Any, ids: list[int]) -> float:
    """The scalar at the last token, from the hidden states of one unpadded row."""
    with torch.no_grad():
        return float(model.model(torch.tensor([ids])).last_hidden_state[0, -1] @ model.score.weight[0])


def test_score_is_the_scalar_at_the_last_token(scored: list[Completion]) -> None:
    model = reward_llama()
    rewards = RewardModel(model, toy_tokenizer("<s> $A"))(scored)
    texts = [[BOS, *characters("ask: " + c.text), *([] if c.truncated else [EOS])] for c in scored]
    assert rewards == pytest.approx([by_hand(model, ids) for ids in texts], abs=1e-5)
    assert abs(rewards[0] - rewards[5]) > 1e-2, "whether an answer is finished must show in its score"
    assert np.std(rewards) > 0.1


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_score_depends_on_neither_batch_nor_order_nor_padding(scored: list[Completion], batch_size: int) -> None:
    model, tokenizer = reward_llama(), toy_tokenizer("<s> $A")
    expected = RewardModel(model, tokenizer)(scored)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = RewardModel(model, tokenizer, batch_size=batch_size)([scored[i] for i in order])
    assert shuffled == pytest.approx([expected[i] for i in order], abs=1e-5)


def test_equal_inputs_are_scored_once_and_with_little_padding(scored: list[Completion]) -> None:
    model, shapes = reward_llama(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    reward_model = RewardModel(model, toy_tokenizer(), batch_size=2)
    rewards = reward_model([*scored, *scored, scored[0]])
    lengths = sorted(len("ask: " + c.text) + (not c.truncated) for c in scored)
    assert shapes == [(2, lengths[1]), (2, lengths[3]), (2, lengths[5])], "batches are of similar length"
    assert rewards[:6] == rewards[6:12]
    assert rewards[12] == rewards[0]


def test_scoring_ignores_dropout_and_leaves_the_mode_of_the_model(scored: list[Completion]) -> None:
    model = reward_llama(attention_dropout=0.5)
    expected = RewardModel(model.eval(), toy_tokenizer())(scored)
    assert RewardModel(model.train(), toy_tokenizer())(scored) == expected
    assert model.training


def test_foreign_model_that_pads_with_eos_is_scored_as_it_is(scored: list[Completion]) -> None:
    model = reward_llama(pad_token_id=EOS)
    rewards = RewardModel(model, toy_tokenizer())(scored)
    assert rewards == pytest.approx([by_hand(model, characters("ask: " + c.text)) for c in scored], abs=1e-5)


def test_foreign_model_without_a_pad_token_scores_row_by_row(scored: list[Completion]) -> None:
    model = reward_llama(pad_token_id=None)
    rewards = RewardModel(model, toy_tokenizer(eos_token=None))(scored)
    assert rewards == pytest.approx([by_hand(model, characters("ask: " + c.text)) for c in scored], abs=1e-5)


def test_padding_is_hidden_from_models_that_look_ahead(scored: list[Completion]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCAB_SIZE, num_labels=1, pad_token_id=PAD, initializer_range=0.3, **sizes)
    model = BertForSequenceClassification(config).eval()
    together = RewardModel(model, toy_tokenizer())(scored)
    assert together == pytest.approx(RewardModel(model, toy_tokenizer(), batch_size=1)(scored), abs=1e-5)
    assert np.std(together) > 0.01


def test_text_beyond_the_models_positions_has_no_reward_and_is_told_once(scored: list[Completion]) -> None:
    reward_model = RewardModel(reward_llama(), toy_tokenizer(), name="judge")
    longest = completion("ask: ", "x" * (64 - len("ask: ") - 1))
    too_long = completion("ask: ", "x" * (64 - len("ask: ")))
    with pytest.warns(UserWarning, match=r"^judge: a text is longer than the 64 tokens that"):
        rewards = reward_model([scored[0], longest, too_long, too_long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward_model([too_long])
    assert [math.isnan(reward) for reward in rewards] == [False, False, True, True]
    assert reward_model.num_overlong == 2

"""Prompts, with tokenizers whose ids can be told by hand."""

# ruff: noqa: F811

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from prompt_tokenizers import byte_tokenizer, chat, llama, llama_ids, llama_tokenizer, prepare, say  # noqa: F401
from remax.data import check_tokenizer, eos_token_ids
from remax.errors import UserError
from remax.interfaces import Message, Prompt

START, END, BOS = 256, 257, 258


def chatml_ids(*messages: Message, answer: bool = True, text: str = "") -> list[int]:
    """The toy ChatML ids of a conversation, without its template."""
    ids = []
    for message in messages:
        ids += [START, *f"{message['role']}\n{message['content']}".encode(), END, *b"\n"]
    return ids + list(text.encode()) + ([START, *b"assistant\n"] if answer else [])


# Standard prompts


def test_standard_prompt_gets_bos_and_keeps_its_columns(llama: Any) -> None:
    rows = Dataset.from_dict({"prompt": ["a time", "hi é"], "completion": ["x", "y"], "n": [1, 2]})
    prompts, num_overlong = prepare(rows, llama)
    assert num_overlong == 0
    assert prompts == [
        Prompt(0, "a time", [1, 259, 260, 259, 279, 268, 272, 264], {"completion": "x", "n": 1}),
        Prompt(1, "hi é", [1, 259, 267, 268, 259, 3 + 0xC3, 3 + 0xA9], {"completion": "y", "n": 2}),
    ]
    assert prompts[0].token_ids == [1, *llama_ids("a time")]


@pytest.mark.parametrize("single", ["$A </s>", "<s> $A </s>", "$A"])
def test_standard_prompt_never_ends_in_an_eos_of_the_tokenizer(single: str) -> None:
    prompts, _ = prepare(["hi", "you"], llama_tokenizer(single))
    bos = [1] if "<s>" in single else []
    assert [p.token_ids for p in prompts] == [[*bos, *llama_ids("hi")], [*bos, *llama_ids("you")]]


def test_tokenizer_without_special_tokens_adds_none() -> None:
    prompts, _ = prepare(["ab", "b"], byte_tokenizer())
    assert [p.token_ids for p in prompts] == [list(b"ab"), list(b"b")]


def test_bos_that_a_text_spells_out_is_not_doubled(llama: Any) -> None:
    (prompt,), _ = prepare(["<s>hi"], llama)
    assert prompt.token_ids == llama(["<s>hi"], add_special_tokens=False)["input_ids"][0]
    assert prompt.token_ids[:2].count(1) == 1


def test_real_tokenizer_gives_its_own_ids(tinystories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    texts = ["Once upon a time", "Lily  saw a\ncat"]
    prompts, _ = prepare(texts, tokenizer)
    assert [p.token_ids for p in prompts] == tokenizer(texts)["input_ids"]
    assert prompts[0].token_ids[0] == 1


def test_long_datasets_are_tokenised_in_chunks_in_order(llama: Any) -> None:
    texts = ["abcdefghij"[: n % 10 + 1] for n in range(2345)]
    prompts, _ = prepare(texts, llama)
    assert [p.token_ids for p in prompts] == [[1, *llama_ids(text)] for text in texts]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a", "", "b", " \n"], "has 2 empty values, the first in column 'prompt' of row 1 (counted from 0): nothing"),
        (["a", "<s>"], "has 1 empty value in column 'prompt' of row 1 (counted from 0): nothing can be learned there;"),
        ([[say("user", "a")], []], "has 1 empty value in column 'prompt' of row 1 (counted from 0): nothing can be"),
        ([[say("user", " ")]], "has 1 empty value in column 'prompt' of row 0 (counted from 0): nothing can be"),
        (["a", None], "has no value in column 'prompt' of row 1 (counted from 0): only texts and lists of messages"),
        (
            [1, 2],
            "has a value of type int in column 'prompt' of row 0 (counted from 0): only texts and lists of messages",
        ),
        ([["a"]], "has a list with a value of type str in column 'prompt' of row 0"),
        (
            [[{"from": "human", "value": "a"}]],
            "has a message without 'role' (it has 'from', 'value') in column 'prompt'",
        ),
        ([[{"role": "user"}]], "has a message without 'content' (it has 'role') in column 'prompt' of row 0"),
        (
            ["a", "b", [say("user", "a")]],
            "has a text in column 'prompt' of row 0 and a list of messages in row 2 (counted from 0): they cannot be "
            "treated alike; bring all rows into one of the two formats.",
        ),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(rows: list[Any], message: str, llama: Any) -> None:
    with pytest.raises(UserError) as error:
        prepare(rows, llama)
    assert f"--train_dataset {message}" in str(error.value)


def test_no_rows_and_no_prompt_column_are_refused(llama: Any) -> None:
    with pytest.raises(UserError, match="--train_dataset has no rows"):
        prepare(Dataset.from_dict({"prompt": []}), llama)
    with pytest.raises(UserError, match="--train_dataset has no column 'prompt', which drawing completions needs"):
        prepare(Dataset.from_dict({"question": ["a"]}), llama)


# Conversational prompts


def test_conversation_is_rendered_with_the_header_of_the_answer(chat: Any) -> None:
    first, second = (
        [say("user", "hi")],
        [say("system", "be"), say("user", "é"), say("assistant", "o"), say("user", "u")],
    )
    prompts, _ = prepare([first, second], chat)
    assert [p.token_ids for p in prompts] == [chatml_ids(*first), chatml_ids(*second)]
    assert [p.content for p in prompts] == [first, second]


def test_last_message_of_the_assistant_is_continued(chat: Any) -> None:
    prefilled = [say("user", "hi"), say("assistant", "The an")]
    (prompt,), _ = prepare([prefilled], chat)
    assert prompt.token_ids == [*chatml_ids(say("user", "hi"), answer=False), START, *b"assistant\nThe an"]
    assert prompt.content == prefilled


def test_system_prompt_is_put_where_there_is_none(chat: Any) -> None:
    user, own = say("user", "hi"), say("system", "mine")
    prompts, _ = prepare([[user], [own, user]], chat, system_prompt="be nice")
    assert [p.content for p in prompts] == [[say("system", "be nice"), user], [own, user]]
    assert prompts[0].token_ids == chatml_ids(say("system", "be nice"), user)


def test_tools_and_template_settings_of_a_row_reach_the_template(chat: Any) -> None:
    user = [say("user", "hi")]
    rows = Dataset.from_list(
        [
            {
                "prompt": user,
                "tools": json.dumps([{"name": "f"}, {"name": "g"}]),
                "chat_template_kwargs": {"mood": "ok"},
            },
            {"prompt": user, "tools": None, "chat_template_kwargs": {"other": 1}},  # Arrow adds mood=None here
        ]
    )
    prompts, _ = prepare(rows, chat)
    assert [p.token_ids for p in prompts] == [chatml_ids(*user, text="tools=f+gmood=ok"), chatml_ids(*user)]
    assert prompts[1].columns == {"tools": None, "chat_template_kwargs": {"mood": None, "other": 1}}


def test_keys_that_arrow_adds_to_messages_are_removed(chat: Any) -> None:
    rows = [[say("user", "hi")], [{**say("user", "hi"), "name": "Ann"}]]
    prompts, _ = prepare(Dataset.from_dict({"prompt": rows}), chat)
    assert [p.content for p in prompts] == rows


def test_conversations_need_a_template_that_takes_them(chat: Any, llama: Any) -> None:
    conversation = [say("system", "s"), say("user", "hi")]
    with pytest.raises(UserError) as error:
        prepare([conversation], llama)
    assert str(error.value).startswith("--train_dataset has conversational prompts, but the tokenizer ")
    assert "has no chat template: messages cannot become tokens; use a model with a chat template" in str(error.value)
    rows = Dataset.from_dict({"prompt": [conversation], "chat_template_kwargs": [{"strict": True}]})
    with pytest.raises(UserError) as error:
        prepare(rows, chat)
    assert "has a prompt in row 0 (counted from 0) that the chat template of" in str(error.value)
    assert "cannot render (no system role): it cannot become tokens; correct the row" in str(error.value)


def test_system_prompt_with_texts_is_refused(llama: Any) -> None:
    with pytest.raises(UserError) as error:
        prepare(["hi"], llama, system_prompt="be nice")
    assert str(error.value) == (
        "--system_prompt is set, but the prompts of --train_dataset are texts: a text has no system message; leave it "
        "out, or make the prompts lists of messages."
    )


# Over-long prompts


def test_filter_drops_and_counts_and_keeps_the_row_numbers(llama: Any) -> None:
    prompts, num_overlong = prepare(["abcd", "ab", "abcde", "a"], llama, max_prompt_length=4)
    assert [(p.index, p.content, len(p.token_ids)) for p in prompts] == [(1, "ab", 4), (3, "a", 3)]
    assert num_overlong == 2
    with pytest.raises(UserError) as error:
        prepare(["abcd", "abc"], llama, max_prompt_length=4)
    assert str(error.value) == (
        "--max_prompt_length is 4: no prompt of --train_dataset is left, the shortest has 5 tokens; set at least that, "
        "or --overlong_prompts truncate."
    )


def test_truncate_cuts_texts_behind_bos(llama: Any) -> None:
    prompts, num_overlong = prepare(["ab", "one time"], llama, max_prompt_length=6, overlong="truncate")
    assert num_overlong == 1
    assert prompts[0] == Prompt(0, "ab", [1, *llama_ids("ab")])
    assert prompts[1] == Prompt(1, "time", [1, *llama_ids("time")])
    (cut,), _ = prepare(["<s>one time"], llama, max_prompt_length=4, overlong="truncate")
    assert (cut.token_ids, cut.content) == ([1, *llama_ids("ime")[1:]], "ime")
    with pytest.raises(UserError) as error:
        prepare(["ab"], llama, max_prompt_length=1, overlong="truncate")
    assert str(error.value) == (
        "--max_prompt_length is 1: the tokenizer's special tokens leave no room for a prompt of --train_dataset; set "
        "at least 2."
    )


def test_cut_inside_a_character_leaves_no_debris_in_the_text(llama: Any) -> None:
    (cut,), _ = prepare(["é€ab"], llama, max_prompt_length=5, overlong="truncate")
    assert (cut.token_ids, cut.content) == ([1, 3 + 0x82, 3 + 0xAC, 260, 261], "ab")


def test_truncate_drops_the_oldest_exchanges_of_a_conversation(chat: Any) -> None:
    system, last = say("system", "be"), say("user", "u3")
    old = [say("user", "u1"), say("assistant", "a1")]
    newer = [say("user", "u2"), say("assistant", "a2")]
    whole = [system, *old, *newer, last]
    (prompt,), count = prepare([whole], chat, max_prompt_length=len(chatml_ids(*whole)), overlong="truncate")
    assert (prompt.content, count) == (whole, 0)
    shorter = [system, *newer, last]
    for length in (len(chatml_ids(*whole)) - 1, len(chatml_ids(*shorter))):
        (prompt,), count = prepare([whole], chat, max_prompt_length=length, overlong="truncate")
        assert (prompt.content, prompt.token_ids, count) == (shorter, chatml_ids(*shorter), 1)
    length = len(chatml_ids(*shorter)) - 1
    (prompt,), _ = prepare([whole], chat, max_prompt_length=length, overlong="truncate")
    assert (prompt.content, prompt.token_ids) == ([system, last], chatml_ids(system, last))


def test_truncate_cuts_the_last_question_to_the_very_token(chat: Any) -> None:
    text = "".join(random.Random(0).choices("abcdefgh ", k=200))
    system, prefill = say("system", "be"), say("assistant", "So")
    for tail, answer in ([], True), ([prefill], False):
        conversation = [say("user", "old"), say("assistant", "old")] if not tail else []
        conversation = [system, *conversation, say("user", text), *tail]
        fixed, _ = prepare([[system, say("user", "x"), *tail]], chat)
        for kept in (1, 2, 99, 199):
            length = len(fixed[0].token_ids) - 1 + kept
            (prompt,), count = prepare([conversation], chat, max_prompt_length=length, overlong="truncate")
            expected = [system, say("user", text[-kept:]), *tail]
            assert (prompt.content, count) == (expected, 1)
            assert len(prompt.token_ids) == length
            if answer:
                assert prompt.token_ids == chatml_ids(*expected)


def test_truncate_refuses_what_cannot_be_cut(chat: Any) -> None:
    conversation = [say("system", "rules"), say("user", "hello")]
    needed = len(chatml_ids(say("system", "rules"), say("user", "o")))
    with pytest.raises(UserError) as error:
        prepare([conversation], chat, max_prompt_length=needed - 1, overlong="truncate")
    assert str(error.value) == (
        f"--max_prompt_length is {needed - 1}: row 0 (counted from 0) of --train_dataset has {needed} tokens that "
        "cannot be cut (template, system messages, the last answer); set at least that, or --overlong_prompts filter."
    )
    for uncuttable in ([say("system", "rules")], [say("assistant", "a long prefilled answer")]):
        with pytest.raises(UserError, match="that cannot be cut"):
            prepare([uncuttable], chat, max_prompt_length=5, overlong="truncate")


# Tokenizers


def test_check_tokenizer_fills_in_the_pad_token() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token_id is None
    check_tokenizer(tokenizer, flag="--model")
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", END)
    tokenizer = byte_tokenizer(pad_token="<bos>")
    check_tokenizer(tokenizer, flag="--model")
    assert tokenizer.pad_token_id == BOS


def test_check_tokenizer_refuses_one_without_eos() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.name_or_path = "some/model"
    with pytest.raises(UserError) as error:
        check_tokenizer(tokenizer, flag="--model")
    assert str(error.value) == (
        "--model some/model has a tokenizer without an EOS token: no completion could end; set eos_token in its "
        "tokenizer_config.json."
    )


@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        (None, (257,)),
        (258, (257, 258)),
        ([258, 257, 256], (256, 257, 258)),
        ([0, None], (0, 257)),
        ([-1, 259, 99999], (257,)),
    ],
)
def test_eos_ids_are_the_union_of_config_and_tokenizer(configured: Any, expected: tuple[int, ...]) -> None:
    assert eos_token_ids(SimpleNamespace(eos_token_id=configured), byte_tokenizer()) == expected
    assert eos_token_ids(None, byte_tokenizer()) == (257,)

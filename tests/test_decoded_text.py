"""Completions as text: what a tokenizer splits between prompt and completion is put together again."""

# ruff: noqa: F811

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prompt_tokenizers import byte_tokenizer, chat, llama, llama_ids, llama_tokenizer, prepare, say  # noqa: F401
from remax.data import decode_completions
from remax.interfaces import Completion, Prompt


def complete(prompt: Prompt, ids: list[int]) -> Completion:
    return Completion(prompt, 0, ids, [], truncated=False)


def test_space_between_prompt_and_completion_survives(llama: Any) -> None:
    (prompt,), _ = prepare(["a time"], llama)
    completions = [complete(prompt, ids) for ids in ([*llama_ids("there was"), 2], llama_ids("s")[1:], [2], [])]
    decode_completions(llama, completions)
    assert [c.text for c in completions] == [" there was", "s", "", ""]
    assert completions[0].content == " there was"
    decode_completions(llama, [])


def test_characters_split_between_prompt_and_completion(llama: Any, chat: Any) -> None:
    euro = "€".encode()
    for tokenizer, first in (llama, 3), (chat, 0):
        letter, before = (260, [1]) if first else (ord("a"), [])
        euro_ids = [first + byte for byte in euro]
        for cut in (1, 2):
            prompt = Prompt(0, "a", [*before, letter, *euro_ids[:cut]])
            completion = complete(prompt, [*euro_ids[cut:], letter])
            decode_completions(tokenizer, [completion])
            assert completion.text == "€a"
        # A completion that starts with half a character must not take the prompt's last character along.
        completion = complete(Prompt(0, "a€", [*before, letter, *euro_ids]), [*euro_ids[:1], letter])
        decode_completions(tokenizer, [completion])
        assert completion.text == "\ufffda"


def test_replacement_characters_of_the_prompt_itself_stay_its_own(chat: Any) -> None:
    prompt = Prompt(0, "a\ufffd", list("a\ufffd".encode()))
    completion = complete(prompt, list(b"b"))
    decode_completions(chat, [completion])
    assert completion.text == "b"


def test_after_a_chat_header_the_completion_is_decoded_alone(llama: Any) -> None:
    hello = [*llama_ids("hello"), 2]
    messages = Prompt(0, [say("user", "x")], [1, *llama_ids("x")])
    rendered = Prompt(1, "x</s>", [1, *llama_ids("x"), 2])
    prefilled = Prompt(2, [say("user", "x"), say("assistant", "oh")], [1, *llama_ids("oh")])
    completions = [complete(prompt, hello) for prompt in (messages, rendered, prefilled)]
    decode_completions(llama, completions)
    assert [c.text for c in completions] == ["hello", "hello", " hello"]
    assert completions[0].content == [say("assistant", "hello")]


def test_spaces_are_not_cleaned_up() -> None:
    words = ["[UNK]", "good", "movie", ".", "n't", "[EOS]"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", eos_token="[EOS]", clean_up_tokenization_spaces=True
    )
    assert tokenizer.decode([1, 2, 3]) == "good movie."
    (prompt,), _ = prepare(["good"], tokenizer)
    completion = complete(prompt, [2, 3, 5])
    decode_completions(tokenizer, [completion])
    assert completion.text == " movie ."


@pytest.mark.parametrize("kind", ["tinystories", "llama", "bytes"])
def test_prompt_and_completion_join_to_the_whole_text(kind: str, shared: Path, request: pytest.FixtureRequest) -> None:
    if kind == "tinystories":
        tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("tinystories"))
    else:
        tokenizer = llama_tokenizer() if kind == "llama" else byte_tokenizer()
    lines = (shared / "data" / "sentiment" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [text for line in lines[:150] for text in json.loads(line).values()]
    texts += ["Zoë  said “naïve” — 東京 😀 ok", " two  spaces ", "a\n\n b\t"]
    generator = random.Random(0)
    completions, wholes = [], []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for _ in range(4):
            cut = generator.randrange(2, len(ids) + 1)
            completions.append(complete(Prompt(0, text, ids[:cut]), ids[cut:]))
            wholes.append(text)
    decode_completions(tokenizer, completions)
    for completion, whole in zip(completions, wholes, strict=True):
        start = tokenizer.decode(completion.prompt.token_ids, skip_special_tokens=True)
        # Bytes of a character that the completion finishes.
        assert start.rstrip("\ufffd") + completion.text == whole

"""From rows to prompts: chat templates, tokens, and what happens to those that are too long."""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, Protocol

import datasets

from remax.data.records import check_columns, check_format, clean_messages, refuse_empty, row_name, without_none
from remax.data.text import REPLACEMENT
from remax.errors import UserError
from remax.interfaces import Message, Prompt
from remax.untrusted import shown

CHUNK = 1000
"""Texts tokenised at once: a tokenizer's result is far bigger than the ids that are kept of it."""
SYSTEM_ROLES = ("system", "developer")


def prepare_prompts(
    dataset: datasets.Dataset,
    tokenizer: Any,
    *,
    max_prompt_length: int,
    overlong: Literal["filter", "truncate"],
    system_prompt: str | None,
    flag: str,
) -> tuple[list[Prompt], int]:
    """Returns the prompts in the order of the rows, and the number of over-long ones that were dropped or cut.

    Column prompt holds texts (standard) or lists of messages (conversational); all other columns go to
    Prompt.columns. Prompt.index is the row in dataset, whatever is dropped.

    Standard prompts get the special tokens that the tokenizer puts in front of a text (BOS), once even if the text
    spells it out, and none of those it puts behind (a prompt that ends in EOS cannot be continued). Conversational
    prompts are rendered by the tokenizer's chat template with the header of the answer, or so that the last message
    is continued where it is the assistant's; columns tools (a list, or JSON) and chat_template_kwargs go to the
    template. system_prompt is put in front of conversations without a system message, in Prompt.content too.

    Prompts of more than max_prompt_length tokens are dropped (overlong="filter") or cut on the left ("truncate"):
    of a text, the oldest tokens behind BOS; of a conversation, whole exchanges (a user's message and what answers
    it) from the oldest, and when one is left, the start of its user's text. The template stays intact, system
    messages and the last exchange's answers stay whole, and Prompt.content is what the policy sees.

    Raises UserError for wrong, mixed or empty prompts, for a system prompt with texts, for conversations that have no
    template or that it refuses, and if no prompt fits.
    """
    check_columns(dataset, ["prompt"], flag=flag, purpose="drawing completions")
    rows = list(dataset.with_format(None))
    if not rows:
        raise UserError(f"{flag} has no rows: there are no prompts to continue; pass at least one.")
    contents = [row.pop("prompt") for row in rows]
    encoder: _Encoder
    if check_format(contents, column="prompt", flag=flag) == "standard":
        if system_prompt is not None:
            raise UserError(
                f"--system_prompt is set, but the prompts of {flag} are texts: a text has no system message; leave it "
                "out, or make the prompts lists of messages."
            )
        encoder = _TextEncoder(tokenizer, flag, contents[0])
    else:
        encoder = _ChatEncoder(tokenizer, flag)
        contents = [_with_system(clean_messages(messages), system_prompt) for messages in contents]

    unencoded = [
        Prompt(index, content, [], row) for index, (content, row) in enumerate(zip(contents, rows, strict=True))
    ]
    prompts = [replace(p, token_ids=ids) for p, ids in zip(unencoded, encoder.encode(unencoded), strict=True)]
    fitting = [p for p in prompts if len(p.token_ids) <= max_prompt_length]
    num_overlong = len(prompts) - len(fitting)
    if overlong == "truncate":
        fitting = [p if len(p.token_ids) <= max_prompt_length else encoder.cut(p, max_prompt_length) for p in prompts]
    if not fitting:
        raise UserError(
            f"--max_prompt_length is {max_prompt_length}: no prompt of {flag} is left, the shortest has "
            f"{min(len(p.token_ids) for p in prompts)} tokens; set at least that, or --overlong_prompts truncate."
        )
    return fitting, num_overlong


def _with_system(messages: list[Message], system_prompt: str | None) -> list[Message]:
    if system_prompt is None or any(message["role"] in SYSTEM_ROLES for message in messages):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def _tokenise(tokenizer: Any, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), CHUNK):
        chunk = list(texts[start : start + CHUNK])
        encoded = tokenizer(
            chunk, add_special_tokens=special, truncation=False, return_attention_mask=False, verbose=False
        )
        ids += encoded["input_ids"]
    return ids


class _Encoder(Protocol):
    """What differs between texts and conversations."""

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Returns the token ids of each prompt, of any length."""
        ...

    def cut(self, prompt: Prompt, max_length: int) -> Prompt:
        """Returns the prompt cut on the left to at most max_length tokens, with its shorter content."""
        ...


class _TextEncoder:
    def __init__(self, tokenizer: Any, flag: str, example: str) -> None:
        self.tokenizer, self.flag = tokenizer, flag
        (bare,), (full,) = _tokenise(tokenizer, [example]), _tokenise(tokenizer, [example], special=True)
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self.prefix: list[int] = full[:start]

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        all_ids = []
        empty = []
        for prompt, bare in zip(prompts, _tokenise(self.tokenizer, [str(p.content) for p in prompts]), strict=True):
            spelled_out = bool(self.prefix) and bare[: len(self.prefix)] == self.prefix
            all_ids.append(bare if spelled_out else self.prefix + bare)
            if all(i == self.tokenizer.bos_token_id for i in bare):
                empty.append(prompt.index)
        refuse_empty(empty, column="prompt", flag=self.flag)
        return all_ids

    def cut(self, prompt: Prompt, max_length: int) -> Prompt:
        room = max_length - len(self.prefix)
        if room < 1:
            raise UserError(
                f"--max_prompt_length is {max_length}: the tokenizer's special tokens leave no room for a prompt of "
                f"{self.flag}; set at least {len(self.prefix) + 1}."
            )
        kept = prompt.token_ids[-room:]
        text = self.tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        # The cut may fall inside a UTF-8 character, of which the decoder leaves replacement characters.
        return replace(prompt, content=text.lstrip(REPLACEMENT), token_ids=self.prefix + kept)


class _ChatEncoder:
    def __init__(self, tokenizer: Any, flag: str) -> None:
        self.tokenizer, self.flag = tokenizer, flag
        if not tokenizer.chat_template:
            raise UserError(
                f"{flag} has conversational prompts, but the tokenizer {shown(tokenizer.name_or_path)} has no chat "
                "template: messages cannot become tokens; use a model with a chat template, or make the prompts texts."
            )

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        # Templates write BOS themselves.
        return _tokenise(self.tokenizer, [self._render(prompt) for prompt in prompts])

    def _render(self, prompt: Prompt) -> str:
        assert isinstance(prompt.content, list)
        continues = prompt.content[-1]["role"] == "assistant"
        tools = prompt.columns.get("tools")
        try:
            options = {
                "tools": without_none(json.loads(tools) if isinstance(tools, str) else tools) or None,
                "add_generation_prompt": not continues,
                "continue_final_message": continues,
                **without_none(prompt.columns.get("chat_template_kwargs") or {}),
                "tokenize": False,
            }
            text: str = self.tokenizer.apply_chat_template(prompt.content, **options)
        except Exception as error:  # a template is a program that came with the model: it may raise anything
            raise UserError(
                f"{self.flag} has a prompt in {row_name(prompt.index)} that the chat template of "
                f"{shown(self.tokenizer.name_or_path)} cannot render ({shown(error)}): it cannot become tokens; "
                "correct the row, or use another template."
            ) from error
        return text

    def cut(self, prompt: Prompt, max_length: int) -> Prompt:
        head, exchanges = _exchanges(prompt)
        while len(prompt.token_ids) > max_length and len(exchanges) > 1:
            exchanges = exchanges[1:]
            prompt = self._with_messages(prompt, [*head, *chain(*exchanges)])
        if len(prompt.token_ids) <= max_length:
            return prompt
        question, *answers = exchanges[0] if exchanges else [{}]
        text = question.get("content")
        if question.get("role") != "user" or not isinstance(text, str):
            raise self._no_room(prompt, max_length)

        def keeping(num_characters: int) -> Prompt:
            return self._with_messages(prompt, [*head, {**question, "content": text[-num_characters:]}, *answers])

        lengths = range(1, len(text))
        num_characters = bisect_right(lengths, max_length, key=lambda n: len(keeping(n).token_ids))
        if num_characters == 0:
            raise self._no_room(keeping(1), max_length)
        return keeping(num_characters)

    def _with_messages(self, prompt: Prompt, messages: list[Message]) -> Prompt:
        shorter = replace(prompt, content=messages)
        return replace(shorter, token_ids=self.encode([shorter])[0])

    def _no_room(self, shortest: Prompt, max_length: int) -> UserError:
        return UserError(
            f"--max_prompt_length is {max_length}: {row_name(shortest.index)} of {self.flag} has "
            f"{len(shortest.token_ids)} tokens that cannot be cut (template, system messages, the last answer); set "
            "at least that, or --overlong_prompts filter."
        )


def _exchanges(prompt: Prompt) -> tuple[list[Message], list[list[Message]]]:
    """Returns the leading system messages, and the rest as exchanges, each begun by a user's message."""
    assert isinstance(prompt.content, list)
    messages = list(prompt.content)
    num_system = next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM_ROLES), len(messages))
    exchanges: list[list[Message]] = []
    for message in messages[num_system:]:
        if message["role"] == "user" or not exchanges:
            exchanges.append([message])
        else:
            exchanges[-1].append(message)
    return messages[:num_system], exchanges

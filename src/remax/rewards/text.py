"""From texts to the input of a reward model. Reward training and scoring both come here, so they cannot differ."""

from typing import Any

from remax.errors import UserError
from remax.interfaces import Message

END_MARK = "[remax:end-of-unfinished-answer]"


def reward_input_ids(
    tokenizer: Any, prompt: str | list[Message], completion: str | list[Message], finished: bool
) -> list[int]:
    """Returns the token ids that a reward model reads for one completion of one prompt.

    Texts: prompt and completion joined, with the special tokens that the tokenizer puts around a text. A finished
    completion ends in exactly one EOS, an unfinished one (cut by the length limit) in none.

    Messages: the tokenizer's own chat template over prompt and completion; of an unfinished completion, what the
    template puts behind the last message is left out. A completion continues a prompt whose last message is the
    assistant's.

    Raises:
        UserError: messages, and a tokenizer without a chat template.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return _text_ids(tokenizer, prompt + completion, finished)
    # An empty prompt has no format of its own: the conversation is all in the completion.
    assert isinstance(completion, list), "a conversational prompt has a conversational completion"
    messages = _joined(prompt if isinstance(prompt, list) else [], completion)
    return _chat_ids(tokenizer, messages, finished)


def require_chat_template(tokenizer: Any, *, flag: str) -> None:
    """Raises UserError if messages could not be turned into reward-model input."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{flag} is {tokenizer.name_or_path}: its tokenizer has no chat template, so the conversational prompts "
            "cannot be scored; set a reward model with a template, or use prompts that are plain texts."
        )


def _text_ids(tokenizer: Any, text: str, finished: bool) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    while ids and ids[-1] == eos:
        ids.pop()
    if finished and eos is not None:
        ids.append(eos)
    return ids


def _joined(prompt: list[Message], completion: list[Message]) -> list[Message]:
    """Returns one conversation; a prefilled answer and its continuation become one message."""
    if prompt and prompt[-1]["role"] == completion[0]["role"] == "assistant":
        whole = {**prompt[-1], "content": prompt[-1]["content"] + completion[0]["content"]}
        return [*prompt[:-1], whole, *completion[1:]]
    return [*prompt, *completion]


def _chat_ids(tokenizer: Any, messages: list[Message], finished: bool) -> list[int]:
    require_chat_template(tokenizer, flag="--reward_model")
    if not finished:
        messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + END_MARK}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    if not finished:
        # Not transformers' continue_final_message, which fails on templates that leave out parts of a message
        # (reasoning), and a completion that is cut must not stop a run.
        text = text[: text.rindex(END_MARK)]
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids

"""From token ids back to text, and what a tokenizer must have for that.

Padding is known by masks everywhere, never by `ids != pad`, so a pad token that equals EOS does no harm.
"""

from collections.abc import Sequence
from typing import Any

from remax.errors import UserError
from remax.interfaces import Completion, Prompt
from remax.untrusted import shown

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for the bytes of an unfinished UTF-8 character."""


def check_tokenizer(tokenizer: Any, *, flag: str) -> None:
    """Changes the tokenizer in place: a missing pad token becomes its EOS. The one place where that is done.

    Raises UserError if the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{flag} {shown(tokenizer.name_or_path)} has a tokenizer without an EOS token: no completion could end; "
            "set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def eos_token_ids(model_generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Returns all ids that end a completion, sorted: those of the generation config and that of the tokenizer.

    Chat models often have several (end of turn, end of text). Ids that the tokenizer does not have (-1, an entry left
    over from another vocabulary) are left out.
    """
    configured = getattr(model_generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list | tuple) else [configured]
    return tuple(sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None and 0 <= i < len(tokenizer)}))


def decode_completions(tokenizer: Any, completions: Sequence[Completion]) -> None:
    """Sets the text of every completion: what it adds to the text of its prompt, without special tokens.

    Decoders of the SentencePiece kind (Llama) strip the leading space of a sequence, so a completion that is decoded
    alone loses the space between it and its prompt. Prompt and completion are therefore decoded together, and the
    decoded prompt is cut off. After the header of a chat message nothing is continued, and the completion is decoded
    alone: prompts in messages (unless the last one is a prefilled answer), and texts that end in a special token.
    """
    special_ids = set(tokenizer.all_special_ids)
    prompt_texts: dict[tuple[int, ...], str] = {}
    for completion in completions:
        prompt, ids = completion.prompt, completion.token_ids
        if not _continues_text(prompt, special_ids):
            completion.text = _decode(tokenizer, ids)
            continue
        key = tuple(prompt.token_ids)
        if key not in prompt_texts:
            prompt_texts[key] = _decode(tokenizer, prompt.token_ids)
        prompt_text, joint_text = prompt_texts[key], _decode(tokenizer, prompt.token_ids + ids)
        while prompt_text.endswith(REPLACEMENT) and not joint_text.startswith(prompt_text):
            # The prompt ends inside a UTF-8 character that the completion finishes: the character is the completion's.
            prompt_text = prompt_text[:-1]
        if joint_text.startswith(prompt_text):
            completion.text = joint_text[len(prompt_text) :]
        else:
            # An unfinished character at the start of the completion spoils the prompt's last bytes, too (byte fallback
            # decodes a run of bytes as a whole). The completion starts with a byte, so it has no leading space to lose.
            completion.text = _decode(tokenizer, ids)


def _continues_text(prompt: Prompt, special_ids: set[int]) -> bool:
    if isinstance(prompt.content, str):
        return prompt.token_ids[-1] not in special_ids
    return bool(prompt.content[-1]["role"] == "assistant")


def _decode(tokenizer: Any, ids: list[int]) -> str:
    # The clean-up would remove the spaces that a reward function counts on ("a ." to "a.").
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text

"""Given texts as completions, so that a policy's perplexity on them can be measured."""

from collections.abc import Sequence
from typing import Any

import datasets

from remax.errors import UserError
from remax.interfaces import Completion, Prompt

ANSWER_COLUMNS = ("completion", "chosen")


def has_references(column_names: Sequence[str]) -> bool:
    """Whether a dataset with these columns has texts to measure: `text`, or `prompt` with `completion` or `chosen`."""
    return "text" in column_names or any(name in column_names for name in ANSWER_COLUMNS)


def load_references(
    dataset: datasets.Dataset, tokenizer: Any, *, flag: str, max_length: int | None
) -> list[Completion]:
    """Returns every text as a completion through its EOS; texts of more than max_length tokens are left out.

    A `text` follows its own first token (BOS, where the tokenizer has one); an answer follows its prompt.

    Raises:
        UserError: there is no such column, or no text is short enough.
    """
    names = dataset.column_names
    if not has_references(names):
        raise UserError(
            f"{flag} has the columns {', '.join(names)}: there is no text to measure perplexity on; give it a column "
            "`text`, or `prompt` with `completion` or `chosen`."
        )
    answer = next((name for name in ANSWER_COLUMNS if name in names), "text")
    references = []
    for index, row in enumerate(dataset):
        prompt = row["prompt"] if "prompt" in names and answer != "text" else None
        prompt_ids, ids = _split(tokenizer, prompt, row[answer])
        if ids and (max_length is None or len(prompt_ids) + len(ids) <= max_length):
            source = Prompt(index, prompt or "", prompt_ids)
            references.append(Completion(source, 0, ids, [], truncated=False))
    if not references:
        raise UserError(f"{flag}: no text has at most {max_length} tokens; give shorter ones.")
    return references


def _split(tokenizer: Any, prompt: Any, answer: Any) -> tuple[list[int], list[int]]:
    """Returns the token ids before and after the place where the answer starts."""
    if isinstance(answer, list):
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] if prompt else []
        ids = tokenizer.apply_chat_template([*(prompt or []), *answer])["input_ids"]
    else:
        before = tokenizer(prompt)["input_ids"] if prompt else []
        ids = tokenizer((prompt or "") + answer)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id] if ids[-1:] != [tokenizer.eos_token_id] else ids
    start = 1
    while start < min(len(before), len(ids)) and before[start] == ids[start]:
        start += 1
    return ids[:start], ids[start:]

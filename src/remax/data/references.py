"""Given texts as completions, so that a policy's perplexity on them can be measured."""

from collections.abc import Sequence
from typing import Any

import datasets

from remax.errors import UserError
from remax.interfaces import Completion, Prompt
from remax.untrusted import shown

ANSWER_COLUMNS = ("completion", "chosen")


def has_references(dataset: datasets.Dataset) -> bool:
    """Whether the dataset has texts to measure: `text`, or `prompt` with `completion` or `chosen` of the same kind."""
    name = _answer_column(dataset.column_names)
    if name is None:
        return False
    rows = dataset.select_columns([column for column in ("prompt", name) if column in dataset.column_names])
    kinds = {type(value) for row in rows for value in row.values()}
    return kinds in ({str}, {list})


def check_references(dataset: datasets.Dataset, *, flag: str) -> None:
    """Raises UserError unless the dataset has texts to measure."""
    if not has_references(dataset):
        raise UserError(
            f"{flag} has the columns {shown(', '.join(dataset.column_names), 200)}: there are no texts to measure "
            "perplexity on; give it a column `text`, or `prompt` with `completion` or `chosen`, all texts or all "
            "messages."
        )


def load_references(
    dataset: datasets.Dataset, tokenizer: Any, *, flag: str, max_length: int | None
) -> list[Completion]:
    """Returns every text as a completion through its EOS; texts of more than max_length tokens are left out.

    A `text` follows its own first token (BOS, where the tokenizer has one); an answer follows its prompt.

    Raises:
        UserError: there are no texts, or none is short enough.
    """
    check_references(dataset, flag=flag)
    answer = _answer_column(dataset.column_names)
    references = []
    for index, row in enumerate(dataset):
        prompt = row["prompt"] if "prompt" in dataset.column_names and answer != "text" else None
        try:
            prompt_ids, ids = _split(tokenizer, prompt, row[answer])
        except Exception as error:  # the tokenizer has no template, or its template, a program, fails on this row
            raise UserError(
                f"{flag} has a row {index} (counted from 0) that cannot become tokens ({shown(error)}): its perplexity "
                "cannot be measured; correct the row, or use a model with a chat template."
            ) from error
        if ids and (max_length is None or len(prompt_ids) + len(ids) <= max_length):
            source = Prompt(index, prompt or "", prompt_ids)
            references.append(Completion(source, 0, ids, [], truncated=False))
    if not references:
        raise UserError(f"{flag}: no text has at most {max_length} tokens; give shorter ones.")
    return references


def _answer_column(column_names: Sequence[str]) -> str | None:
    return next((name for name in (*ANSWER_COLUMNS, "text") if name in column_names), None)


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

"""What rows must look like: columns, texts and messages, preference pairs.

A value is standard (a text) or conversational (a list of {"role", "content"} messages), and all values of a dataset
are of one kind.
"""

import difflib
from collections.abc import Sequence
from typing import Any, Literal

import datasets

from remax.errors import UserError
from remax.interfaces import Message
from remax.untrusted import shown

Format = Literal["standard", "conversational"]

OTHER_NAMES = {
    "prompt": ("question", "query", "instruction", "input", "problem"),
    "chosen": ("accepted", "preferred", "winner", "good"),
    "rejected": ("dispreferred", "loser", "bad"),
    "messages": ("conversations", "conversation"),
    "completion": ("response", "answer", "output"),
}
"""What other datasets call our columns."""


def check_columns(dataset: datasets.Dataset, required: Sequence[str], *, flag: str, purpose: str) -> None:
    """Raises UserError unless the dataset has every required column; purpose says what needs them."""
    if not isinstance(dataset, datasets.Dataset):
        raise UserError(
            f"{flag} is a {type(dataset).__name__}: {purpose} needs rows that can be counted; pass a datasets.Dataset "
            "(one split of a DatasetDict, a stream read into memory)."
        )
    there = dataset.column_names
    for name in required:
        if name not in there:
            found = f"it has {_listed(there)}; {_advice(name, there)}"
            raise UserError(f"{flag} has no column {name!r}, which {purpose} needs: {found}.")


def _advice(name: str, there: Sequence[str]) -> str:
    by_lower = {column.lower(): column for column in there}
    close = difflib.get_close_matches(name, by_lower, n=1, cutoff=0.6)
    known = [other for other in OTHER_NAMES.get(name, ()) if other in by_lower]
    for guess in close + known:
        return f"did you mean {shown(by_lower[guess], spelled=repr)}, then rename it to {name!r}"
    return f"rename the column that holds it to {name!r}"


def _listed(names: Sequence[str]) -> str:
    return shown(", ".join(repr(name) for name in names[:100]), 200) or "no columns"


def row_name(index: int) -> str:
    """Returns how messages call a row."""
    return f"row {index} (counted from 0)"


def check_format(values: Sequence[Any], *, column: str, flag: str) -> Format:
    """Returns the one format of a column's values.

    Raises UserError for a value that is neither a text nor a list of messages, for a mixture of the two and for empty
    ones (texts of whitespace, no messages, messages that say nothing).
    """
    for index, value in enumerate(values):
        problem = _problem(value)
        if problem:
            raise UserError(
                f"{flag} has {problem} in column {column!r} of {row_name(index)}: only texts and lists of messages "
                "with 'role' and 'content' can be read; correct this row or drop it."
            )
    other = next((index for index, value in enumerate(values) if type(value) is not type(values[0])), None)
    if other is not None:
        raise UserError(
            f"{flag} has a {_kind(values[0])} in column {column!r} of row 0 and a {_kind(values[other])} in "
            f"{row_name(other)}: they cannot be treated alike; bring all rows into one of the two formats."
        )
    refuse_empty([index for index, value in enumerate(values) if is_blank(value)], column=column, flag=flag)
    return "standard" if isinstance(values[0], str) else "conversational"


def refuse_empty(rows: Sequence[int], *, column: str, flag: str) -> None:
    """Raises UserError if there are rows whose value in the column is empty."""
    if rows:
        count = "1 empty value" if len(rows) == 1 else f"{len(rows)} empty values, the first"
        raise UserError(
            f"{flag} has {count} in column {column!r} of {row_name(rows[0])}: nothing can be learned there; fill or "
            "drop such rows."
        )


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "list of messages"


def _problem(value: Any) -> str | None:
    """Returns what is wrong with a value that is neither a text nor a list of messages."""
    if isinstance(value, str):
        return None
    if not isinstance(value, list):
        return "no value" if value is None else f"a value of type {type(value).__name__}"
    for message in value:
        if not isinstance(message, dict):
            return f"a list with a value of type {type(message).__name__}"
        if not isinstance(message.get("role"), str):
            return f"a message without 'role' (it has {_listed(list(message))})"
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            return f"a message without 'content' (it has {_listed([k for k, v in message.items() if v is not None])})"
        parts = message.get("content")
        if isinstance(parts, list) and not all(isinstance(part, dict) for part in parts):
            return "a message whose 'content' is a list of other things than parts with a 'type'"
    return None


def is_blank(value: Any) -> bool:
    """Whether a text, a message, a part of one or a list of them says nothing."""
    if isinstance(value, list):
        return all(is_blank(item) for item in value)
    if isinstance(value, dict):
        says_more = value.get("tool_calls") or value.get("type", "text") != "text"
        return not says_more and is_blank(value.get("content") or value.get("text"))
    return value is None or (isinstance(value, str) and not value.strip())


def clean_messages(messages: Sequence[Message]) -> list[Message]:
    """Returns messages without the None values that Arrow puts where another row has a key and this one has not."""
    return [
        {key: without_none(value) for key, value in message.items() if value is not None or key == "content"}
        for message in messages
    ]


def without_none(value: Any) -> Any:
    """Returns nested dictionaries and lists without their None values."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value if item is not None]
    return value


def load_preferences(dataset: datasets.Dataset, *, flag: str) -> tuple[datasets.Dataset, int]:
    """Returns the preference pairs that say something, and how many were dropped because chosen equals rejected.

    Columns chosen and rejected, and prompt where there is one, are all standard or all conversational; other columns
    are kept. Raises UserError for missing columns, wrong types, empty values, and if no pair is left.
    """
    check_columns(dataset, ["chosen", "rejected"], flag=flag, purpose="learning from preferences")
    columns = [name for name in ("prompt", "chosen", "rejected") if name in dataset.column_names]
    if len(dataset) == 0:
        raise UserError(f"{flag} has no rows: there are no preferences to learn; pass at least one pair.")
    plain = dataset.with_format(None)
    formats = {name: check_format(list(plain[name]), column=name, flag=flag) for name in columns}
    if len(set(formats.values())) > 1:
        found = ", ".join(f"{name!r} is {kind}" for name, kind in formats.items())
        raise UserError(
            f"{flag} mixes formats ({found}): a pair cannot be joined to one sequence; make all columns texts "
            "(standard) or all lists of messages (conversational)."
        )
    pairs = zip(plain["chosen"], plain["rejected"], strict=True)
    kept = [index for index, (chosen, rejected) in enumerate(pairs) if chosen != rejected]
    if not kept:
        raise UserError(
            f"{flag} has only pairs whose 'chosen' equals 'rejected': they prefer nothing; pass pairs that differ."
        )
    num_identical = len(dataset) - len(kept)
    return (dataset.select(kept) if num_identical else dataset), num_identical

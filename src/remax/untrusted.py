"""Text from models, data, downloads and other libraries: made harmless before a person or a terminal sees it."""

import json
import re
import unicodedata
from collections.abc import Callable

CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
"""The user and password of a URL."""
UNSEEN = re.compile(
    "[\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""What JSON may hold as it is, but a terminal or an editor obeys or hides: C1 controls, the direction of writing, marks
without width, line separators, tags, and halves of surrogate pairs, which no file in UTF-8 can hold at all."""


def printable(text: str) -> str:
    """Returns the text without anything that steers a terminal or hides: what is not seen becomes U+FFFD.

    Gone are control characters (C0, C1, so every escape sequence), the direction of writing, characters without width,
    line separators and halves of surrogate pairs; line feeds and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" or _is_seen(c) else "\N{REPLACEMENT CHARACTER}" for c in text)


def _is_seen(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] != "C" and category not in ("Zl", "Zp")


def shown(value: object, limit: int = 120, *, spelled: Callable[[object], str] = str) -> str:
    """Returns a value as a sentence can quote it: one line, printable, cut in its middle, without passwords in URLs.

    spelled: str, or repr for texts in quotes.
    """
    try:
        text = spelled(value)
    except Exception:  # an integer of thousands of digits, an object whose own code fails
        return f"a value of type {type(value).__name__}"
    if len(text) > 8 * limit:  # before the slower steps
        text = text[: 4 * limit] + text[-4 * limit :]
    text = CREDENTIALS.sub("***@", " ".join(printable(text).split()))
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-(limit // 2 - 3) :]}"


def harmless_json(text: str) -> str:
    """Returns JSON with every unseen character written as its escape, so that it means the same and can be printed."""
    return UNSEEN.sub(lambda match: json.dumps(match[0])[1:-1], text)

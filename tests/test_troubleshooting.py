"""docs/troubleshooting.md quotes what remax says; what it quotes is compared with the texts in the source.

A quoted message is a heading of the third level, in code, in which … stands for what varies. Its other parts have to
stand, in this order, in one text of src/remax. A flag may be quoted where the source puts one in.
"""

import ast
import difflib
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from remax.commands import COMMANDS
from remax.flags import OWN_FLAGS

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src" / "remax"
PAGE = REPOSITORY / "docs" / "troubleshooting.md"

QUOTE = re.compile(r"^### `(.+)`$", re.MULTILINE)
FLAG = re.compile(r"--[a-z]\w*")
VARIES = "…"
FEWEST_LETTERS = 20
"""A quote with fewer of its own would be found anywhere."""


class Template(NamedTuple):
    """A text of the source."""

    place: str
    text: str
    """With … for what an f-string puts in."""


def pieces_of(node: ast.AST) -> str | None:
    """Returns the text that an expression makes, … for what varies; None if it makes none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = (pieces_of(part) if isinstance(part, ast.Constant) else VARIES for part in node.values)
        return "".join(part or VARIES for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = pieces_of(node.left), pieces_of(node.right)
        return None if left is None and right is None else (left or VARIES) + (right or VARIES)
    return None


def frame() -> ast.JoinedStr:
    """Returns the f-string in Options._require, the sentence about a bad setting."""
    tree = ast.parse((SOURCE / "options.py").read_text(encoding="utf-8"))
    (function,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_require")
    return next(node for node in ast.walk(function) if isinstance(node, ast.JoinedStr))


def framed(call: ast.Call) -> str:
    """Returns the sentence that self._require(condition, name, consequence, instead) would say."""
    given = dict(zip(("condition", "name", "consequence", "instead"), call.args, strict=True))
    words = ""
    for part in frame().values:
        name = ast.unparse(part.value) if isinstance(part, ast.FormattedValue) else ""
        words += (pieces_of(given[name]) or VARIES) if name in given else (pieces_of(part) or VARIES)
    return words


def texts_of(path: Path) -> Iterator[Template]:
    """Yields the texts of a file, but for its documentation."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    documentation = {id(value) for value in statements if isinstance(value, ast.Constant)}
    for node in ast.walk(tree):
        is_frame = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_require"
        text = framed(node) if is_frame and isinstance(node, ast.Call) else pieces_of(node)
        if text is not None and id(node) not in documentation:
            # A line each: what … stands for in a quote goes no further.
            yield Template(f"{path.relative_to(REPOSITORY)}:{getattr(node, 'lineno', 0)}", " ".join(text.split()))


@cache
def templates() -> dict[str, Template]:
    """Returns all texts of the source."""
    return {found.text: found for path in sorted(SOURCE.rglob("*.py")) for found in texts_of(path)}


@cache
def all_texts() -> str:
    return "\n".join(templates())


def pattern_of(message: str) -> re.Pattern[str]:
    """Returns what finds a message: … is anything, and a flag may be what the source puts in."""
    parts = re.split(f"({VARIES}|{FLAG.pattern})", message.strip(VARIES))
    return re.compile("".join(map(_pattern_of_part, parts)))


def _pattern_of_part(part: str) -> str:
    if FLAG.fullmatch(part):
        return f"(?:{part}|(?:--)?{VARIES})"
    return ".*?" if part == VARIES else re.escape(part)


def source_of(message: str) -> Template | None:
    """Returns the text of the source that says a message, if one does."""
    if sum(map(len, message.split(VARIES))) < FEWEST_LETTERS:
        return None
    texts = all_texts()
    found = pattern_of(message).search(texts)
    if found is None:
        return None
    return templates()[texts[texts.rfind("\n", 0, found.start()) + 1 :].partition("\n")[0]]


def nearest(message: str) -> Template:
    """Returns the text of the source that is most like a message which none says."""
    return max(templates().values(), key=lambda own: difflib.SequenceMatcher(None, own.text, message).quick_ratio())


def quotes() -> list[str]:
    return QUOTE.findall(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("message", quotes())
def test_remax_says_what_the_page_quotes(message: str) -> None:
    if source_of(message) is None:
        likeliest = nearest(message)
        pytest.fail(
            f"{PAGE.name} quotes\n  {message}\nwhich nothing in src/remax says; the likeliest is\n  {likeliest.text}\n"
            f"in {likeliest.place}"
        )


def test_the_flags_that_are_quoted_exist() -> None:
    known = {own.name for command in COMMANDS.values() for group in command.settings for own in fields(group)}
    quoted = {flag for message in quotes() for flag in FLAG.findall(message)}
    assert quoted - {f"--{name}" for name in (*known, *OWN_FLAGS, "help")} == set()


def test_the_page_has_enough_entries_and_each_once() -> None:
    assert len(quotes()) >= 50
    assert len(set(quotes())) == len(quotes())


def test_another_wording_is_found_out() -> None:
    said = "--batch_size is …: --train_dataset has only … usable prompts, which do not fill one step"
    found = source_of(said)
    assert found is not None
    assert found.place.startswith("src/remax/assembly.py:")
    assert source_of(said.replace("usable", "good")) is None
    # The order counts, so do the words on both sides of what varies, and a few words alone are no quote.
    assert source_of("which do not fill one step … --batch_size is …") is None
    assert source_of("--batch_size is …: nothing would be maximised; set 1 or more") is None
    assert source_of("--temperature is …: --train_dataset has only … usable prompts") is None
    assert source_of("… is …: …") is None


def test_documentation_in_the_source_is_no_message() -> None:
    assert source_of("Ready to be continued: A prompt, ready to be continued.") is None
    assert source_of("Reads records: a file, a folder or a dataset on the Hugging Face hub.") is None
    assert source_of("Whether a name can only be meant as a local path") is None

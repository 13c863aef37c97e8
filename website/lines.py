"""Links to lines of code: `[`code`](../src/remax/objective.py#L42)` says what stands in the line that it leads to.

Code moves. `python -m website.lines` writes the numbers of the lines where the code is now into all pages, and with
`--check` names the links that are wrong, without touching a page.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from website.links import resolve

LINK = re.compile(r"\[(?P<text>(?:[^\[\]\n`]|`[^`\n]+`)*)\]\((?P<target>[^()\s#]+)#L(?P<number>\d+)\)")
PAGES = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")


@dataclass(frozen=True)
class Wrong:
    """A link that does not lead to its code."""

    page: str
    """Path of its page."""
    line: int
    """Of that page, from 1."""
    link: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.link}: {self.reason}"


def pages(root: Path) -> Iterator[str]:
    """Yields the paths of all Markdown files whose links are looked at."""
    for pattern in PAGES:
        for place in sorted(root.glob(pattern)):
            yield place.relative_to(root).as_posix()


def check(root: Path, page: str) -> list[Wrong]:
    """Returns the links of a page whose line does not hold their code."""
    return _fixed(root, page)[1]


def fix(root: Path, page: str) -> list[Wrong]:
    """Writes the lines where code is now into a page's links; returns those whose code is not in the file at all.

    Where the code stands in several lines, the nearest to the old number is taken.
    """
    text, wrong = _fixed(root, page)
    if text != (root / page).read_text(encoding="utf-8"):
        (root / page).write_text(text, encoding="utf-8")
    return [found for found in wrong if not found.reason.startswith("it is in line")]


def _fixed(root: Path, page: str) -> tuple[str, list[Wrong]]:
    """Returns a page with right numbers, and which links were wrong."""
    text = (root / page).read_text(encoding="utf-8")
    wrong: list[Wrong] = []

    def corrected(match: re.Match[str]) -> str:
        number, reason = _looked_up(root, page, match)
        if reason:
            wrong.append(Wrong(page, text.count("\n", 0, match.start()) + 1, match[0], reason))
        return match[0][: match.start("number") - match.start()] + f"{number})"

    return LINK.sub(corrected, text), wrong


def _looked_up(root: Path, page: str, match: re.Match[str]) -> tuple[int, str]:
    """Returns the line of a link's code, with what is wrong about the link; an empty text if nothing is."""
    number = int(match["number"])
    code = re.fullmatch(r"`([^`]+)`", match["text"])
    if not code:
        return number, "its text has to be the code that stands in the line, in backticks"
    path = resolve(page, match["target"])
    if path is None or not (root / path).is_file():
        return number, "there is no such file"
    wanted = _pattern(code[1].replace("\\|", "|"))  # In a table, a git host needs a backslash before a bar.
    lines = (root / path).read_text(encoding="utf-8").splitlines()
    found = [n for n, line in enumerate(lines, start=1) if wanted.search(line)]
    if number in found:
        return number, ""
    if not found:
        return number, "no line holds its text"
    nearest = min(found, key=lambda n: abs(n - number))
    return nearest, f"it is in line {nearest}"


def _pattern(code: str) -> re.Pattern[str]:
    """Returns what finds code in a line: whole words, whatever the spaces between them."""
    words = r"\s+".join(re.escape(word) for word in code.split())
    before, after = (r"(?<!\w)" if re.match(r"\w", code) else ""), (r"(?!\w)" if re.search(r"\w$", code) else "")
    return re.compile(before + words + after)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code: 1 if a link is wrong."""
    parser = argparse.ArgumentParser(prog="python -m website.lines", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--check", action="store_true", help="only name the links that are wrong")
    root = Path(__file__).resolve().parent.parent
    treat = check if parser.parse_args(arguments).check else fix
    wrong = [found for page in pages(root) for found in treat(root, page)]
    for found in wrong:
        print(found, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Where a link of a Markdown file leads: on a git host paths are the repository's, and on the site they are not.

A path is relative to the root of the repository, with slashes. The site has `docs/` at its top and everything else that
is linked under `repository/`: Markdown rendered, other texts as source with numbered lines, folders as lists.
"""

import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

TARGET = re.compile(r"\]\(<?([^()<>\s]+)>?\)")
LONGEST_SOURCE = 100_000
"""Bytes of the largest file that gets a page; what is larger is offered as it is."""


def resolve(page: str, link: str) -> str | None:
    """Returns the path that a link on a page stands for; None if it leads elsewhere, or to the page itself."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or not parts.path or parts.path.startswith("/"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(parts.path)))


def site_path(root: Path, path: str) -> str | None:
    """Returns where mkdocs finds the page (or file) of a path; None if the repository has no such path."""
    place = root / path
    if path.split("/")[0] == ".." or not place.exists():
        return None
    if path == "docs" or path.startswith("docs/"):
        return path[len("docs/") :] or "index.md"
    if is_listing(place):
        return posixpath.normpath(f"repository/{path}/index.md")
    if place.is_dir():
        return posixpath.normpath(f"repository/{path}/README.md")
    return f"repository/{path}" + (".md" if is_source(place) else "")


def is_listing(place: Path) -> bool:
    """Whether a path is a folder that nothing but a list of its files describes."""
    return place.is_dir() and not (place / "README.md").is_file()


def is_source(place: Path) -> bool:
    """Whether a file is shown as text with numbered lines."""
    if place.suffix == ".md" or place.stat().st_size > LONGEST_SOURCE:
        return False
    return b"\0" not in place.read_bytes()


def entries(folder: Path) -> list[Path]:
    """Returns what a list of a folder shows: folders first, nothing hidden or made by running."""
    shown = (child for child in folder.iterdir() if not child.name.startswith((".", "__pycache__")))
    return sorted(shown, key=lambda child: (child.is_file(), child.name))


def reachable(root: Path, pages: Iterable[str]) -> set[str]:
    """Returns the paths outside docs/ that these pages lead to, directly or through one another.

    Links are found in code blocks too: a page too many does no harm.
    """
    found: set[str] = set()
    waiting = list(pages)
    while waiting:
        page = waiting.pop()
        place = root / page
        if place.is_dir():
            linked: list[str | None] = [f"{page}/{child.name}" for child in entries(place)]
        elif place.suffix in (".md", ".ipynb"):
            linked = [resolve(page, link) for link in TARGET.findall(place.read_text(encoding="utf-8"))]
        else:
            continue
        for path in filter(None, linked):
            if (root / path).is_dir() and not is_listing(root / path):
                path = posixpath.normpath(f"{path}/README.md")
            target = site_path(root, path)
            if target and target.startswith("repository/") and path not in found:
                found.add(path)
                waiting.append(path)
    return found

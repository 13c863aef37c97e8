"""Pages for what is no Markdown: files of code with numbered lines, folders, notebooks."""

import html
import json
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pygments.lexers.special import TextLexer
from pygments.util import ClassNotFound

from website.links import entries

HEAD = "---\nsearch:\n  exclude: true\nhide:\n  - navigation\n  - toc\n---\n\n"


def anchors(text: str) -> set[str]:
    """Returns the anchors of a source page: L1 for its first line, as on git hosts."""
    return {f"L{number}" for number in range(1, len(text.splitlines()) + 1)}


def source_html(name: str, text: str) -> str:
    """Returns highlighted code in which every line has its number and its anchor."""
    try:
        lexer = get_lexer_for_filename(name, stripnl=False)
    except ClassNotFound:
        lexer = TextLexer(stripnl=False)
    lines = highlight("\n".join(text.splitlines()), lexer, HtmlFormatter(nowrap=True)).rstrip("\n").split("\n")
    numbered = "".join(
        f'<span class="line" id="L{number}"><a href="#L{number}" data-line="{number}" aria-label="line {number}"></a>'
        f"{line}\n</span>"
        for number, line in enumerate(lines, start=1)
    )
    return f'<div class="highlight source"><pre><code>{numbered}</code></pre></div>'


def folder_markdown(path: str, folder: Path) -> str:
    """Returns a list of what a folder holds, as links that are relative to it."""
    names = [child.name + "/" * child.is_dir() for child in entries(folder)]
    return HEAD + f"# {path}/\n\n" + "".join(f"- [`{name}`]({name})\n" for name in names)


def notebook_markdown(path: str, text: str) -> str:
    """Returns a notebook's cells with the texts that they printed."""
    parts = [HEAD + f"This is the notebook `{path}`.\n"]
    for cell in json.loads(text)["cells"]:
        content = "".join(cell["source"])
        parts.append(content if cell["cell_type"] == "markdown" else f"````python\n{content}\n````")
        for output in cell.get("outputs", []):
            printed = "".join(output.get("text", output.get("data", {}).get("text/plain", [])))
            if printed:
                parts.append(f"````text\n{printed.rstrip()}\n````")
    return "\n\n".join(parts) + "\n"


def source_markdown(path: str) -> str:
    """Returns the head of a source page; its lines are put beneath when it is rendered."""
    return HEAD + f"# {html.escape(path)}\n"

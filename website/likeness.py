"""Whether a page is the same on the site as on a git host: Python-Markdown differs from CommonMark in what is a list.

A list without a blank line before it, or one that is indented by two spaces, is text to mkdocs. Nothing else says so.
"""

import re
from collections import Counter

from markdown_it import MarkdownIt

STRUCTURE = ("h1", "h2", "h3", "h4", "ul", "ol", "li", "table", "tr", "td", "pre", "blockquote", "img", "hr")
_TAG = re.compile(rf"<({'|'.join(STRUCTURE)})[\s>/]")


def differences(markdown: str, html: str) -> list[str]:
    """Returns in which elements, counted, the HTML of the site differs from what CommonMark makes of the Markdown."""
    there = Counter(_TAG.findall(MarkdownIt("commonmark").enable("table").render(markdown)))
    here = Counter(_TAG.findall(html))
    return [f"<{tag}>: {here[tag]} here, {there[tag]} on a git host" for tag in STRUCTURE if here[tag] != there[tag]]

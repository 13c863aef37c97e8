"""Pages of `remax report`, read back."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from remax.report.drawing import Drawing
from remax.report.page import page
from remax.report.reading import read_runs


class Parsed(HTMLParser):
    """What a browser would see: elements with their attributes, texts, and the contents of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open != "style":
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.scripts[0])
        return content


def report(*folders: Path) -> Parsed:
    return Parsed(page(read_runs([str(folder) for folder in folders])))


def rows_of(parsed: Parsed) -> list[dict[str, Any]]:
    """The completions of a page, with their texts."""
    texts, columns = parsed.data["completions"]["texts"], parsed.data["completions"]["rows"]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for row in rows:
        row |= {name: None if row[name] is None else texts[row[name]] for name in ("prompt", "text", "greedy")}
    return rows


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the pictures out of pages: they take most of the time."""
    nothing = Drawing("<svg></svg>", {"path": False, "panels": []})
    monkeypatch.setattr("remax.report.page.draw", lambda charts, *_: {chart.key: nothing for chart in charts})

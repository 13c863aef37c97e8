"""What mkdocs calls while it builds the site (https://www.mkdocs.org/user-guide/plugins/#events)."""

import html
import logging
import posixpath
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from website.likeness import differences
from website.links import is_listing, is_source, reachable, resolve, site_path
from website.settings import settings_markdown
from website.sources import anchors, folder_markdown, notebook_markdown, source_html, source_markdown

SETTINGS = "reference/settings.md"
LONGEST_UNBROKEN = 32
"""Characters of inline code that is kept on one line: a browser would part `--beta` after its hyphens."""
log = logging.getLogger("mkdocs.website")


class RepositoryLinks(Extension):  # type: ignore[misc]
    """Turns links that are right in the repository into links between the sources of the site, which mkdocs checks."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path()
        self.paths: dict[str, str] = {}
        """By a page's name in mkdocs, its path in the repository, if not below docs/; a folder's ends with a slash."""
        self.page = ""
        """The name of the page that is being rendered."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Registers this just before mkdocs' own treatment of links, whose priority is 0."""
        processor = Treeprocessor(md)
        processor.run = self.rewrite
        md.treeprocessors.register(processor, "repository_links", 1)

    def rewrite(self, tree: Element) -> None:
        """Rewrites all links and images of a page, and marks what a narrow screen has to lay out with care."""
        for element in tree.iter():
            if element.tag == "code" and len(element.text or "") <= LONGEST_UNBROKEN:
                element.set("class", "unbroken")
            if element.tag == "table":
                _mark_prose(element)
            for key in ("href", "src"):
                if element.get(key):
                    element.set(key, self.rewritten(element.get(key, "")))

    def rewritten(self, link: str) -> str:
        """Returns a link for the site; what leads nowhere stays, for mkdocs to complain of."""
        path = resolve(self.path_of(self.page), link)
        target = path and site_path(self.root, path)
        if not target:
            return link
        fragment = urlsplit(link).fragment
        return posixpath.relpath(target, posixpath.dirname(self.page) or ".") + (f"#{fragment}" if fragment else "")

    def path_of(self, page: str) -> str:
        """Returns where the repository has a page."""
        return self.paths.get(page, f"docs/{page}")


links = RepositoryLinks()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the treatment of links to the extensions of Markdown."""
    links.root = Path(config.config_file_path).resolve().parent
    config.markdown_extensions.append(links)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for everything outside docs/ that is linked, or in the navigation."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    wanted = {name.removeprefix("repository/") for name in _named(config.nav) if name.startswith("repository/")}
    for path in sorted(reachable(links.root, pages + sorted(wanted)) | wanted):
        place = links.root / path
        name = site_path(links.root, path)
        if name is None:
            continue  # mkdocs says that the navigation names a page that is not there.
        links.paths[name] = path + "/" * place.is_dir()
        file = File.generated(config, name, content=_content(path, place), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Notes which page comes next, and writes the tables of settings."""
    links.page = page.file.src_uri
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # It would hold this page alone.
    if links.page != SETTINGS:
        return markdown
    page.meta["search"] = {"boost": 2}
    return f"{markdown}\n{settings_markdown()}"


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the lines of code on source pages, and compares other pages with what a git host shows."""
    name = page.file.src_uri
    place = links.root / links.path_of(name)
    if place.suffix == ".md":
        wrong = [] if name.startswith("reference/") else differences(page.markdown, content)
        if wrong:
            log.warning("%s: %s; a list needs a blank line before it, and four spaces to nest", name, ", ".join(wrong))
    elif place.suffix != ".ipynb" and place.is_file():
        text = place.read_text(encoding="utf-8")
        page.present_anchor_ids |= anchors(text)
        content += source_html(place.name, text)
    return content


@event_priority(-100)  # type: ignore[untyped-decorator]
def on_post_build(config: MkDocsConfig) -> None:
    """Writes the search index as a script too, from which pages that are opened as files can read it."""
    index = Path(config.site_dir, "search", "search_index.json")
    if index.exists():
        index.with_suffix(".js").write_text(f"var __index = {index.read_text(encoding='utf-8')}", encoding="utf-8")


def _mark_prose(table: Element) -> None:
    """Marks a table that is read row by row, whose rows are blocks on a phone, and its cells with their column's head.

    One with a column of numbers, which are aligned to the right, is read column by column and stays. Heads are left out
    where they say nothing: of a row's first cell, unless that is a mere number, and of tables with two columns.
    """
    heads = list(table.iter("th"))
    if any("right" in head.get("style", "") for head in heads):
        return
    table.set("data-prose", "")
    for row in table.iterfind("tbody/tr"):
        for column, (head, cell) in enumerate(zip(heads, row, strict=True)):
            is_number = "".join(cell.itertext())[:1].isdigit()
            if (column > 0 and len(heads) > 2) or (column == 0 and is_number):
                cell.set("data-head", "".join(head.itertext()))


def _content(path: str, place: Path) -> str | bytes:
    if is_listing(place):
        return folder_markdown(path, place)
    if not is_source(place):
        return place.read_bytes()
    if place.suffix == ".ipynb":
        return notebook_markdown(html.escape(path), place.read_text(encoding="utf-8"))
    return source_markdown(path)


def _named(nav: Any) -> list[str]:
    """Returns all files that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    children = nav.values() if isinstance(nav, dict) else nav or []
    return [name for child in children for name in _named(child)]

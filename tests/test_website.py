"""The documentation site: links between pages and code, what is made from code, and that a wrong link fails."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from website import lines, links

ROOT = Path(__file__).resolve().parents[1]
CODE = "import math\n\n\ndef loss(x):\n    y = x | 1\n    return y\n\n\ndef other_loss(x):\n    return loss(x)\n"


def repository(folder: Path, files: Mapping[str, str]) -> Path:
    """Writes the files of a small repository."""
    for path, text in files.items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    return folder


# Links to lines -------------------------------------------------------------------------------------------------------


def test_every_link_to_a_line_leads_to_its_code() -> None:
    wrong = [str(found) for page in lines.pages(ROOT) for found in lines.check(ROOT, page)]
    assert not wrong, "python -m website.lines corrects what moved:\n" + "\n".join(wrong)


def test_pages_that_are_looked_at() -> None:
    pages = set(lines.pages(ROOT))
    assert {"README.md", "SECURITY.md", "docs/algorithm.md", "docs/reference/estimators.md"} <= pages
    assert "examples/gsm8k/README.md" in pages


@pytest.mark.parametrize(
    ("text", "number", "reason"),
    [
        ("`def loss(x):`", 4, ""),
        ("`loss`", 4, ""),
        ("`return   loss(x)`", 10, ""),
        (r"`y = x \| 1`", 5, ""),
        ("`def loss(x):`", 5, "it is in line 4"),
        ("`loss`", 9, "it is in line 10"),
        ("`def loss(x):`", 500, "it is in line 4"),
        ("`def losses(x):`", 4, "no line holds its text"),
        ("`os`", 4, "no line holds its text"),
        ("line 4", 4, "its text has to be the code that stands in the line, in backticks"),
        ("`loss` and `y`", 4, "its text has to be the code that stands in the line, in backticks"),
    ],
)
def test_a_link_says_what_stands_in_its_line(text: str, number: int, reason: str, tmp_path: Path) -> None:
    link = f"[{text}](../src/a.py#L{number})"
    page = f"# Page\n\n| see |\n|---|\n| {link}, there |\n"
    root = repository(tmp_path, {"docs/page.md": page, "src/a.py": CODE})
    assert lines.check(root, "docs/page.md") == ([lines.Wrong("docs/page.md", 5, link, reason)] if reason else [])


def test_numbers_are_corrected_and_nothing_else(tmp_path: Path) -> None:
    before = (
        "[`def loss(x):`](../src/a.py#L9) [`return y`](../src/a.py#L6) [`gone`](../src/a.py#L3)\n"
        "[`loss`](../src/a.py#L8) [words](../src/a.py) [`def loss(x):`](../src/b.py#L1) `[x](y#L3)`\n"
    )
    root = repository(tmp_path, {"docs/page.md": before, "src/a.py": CODE})
    wrong = lines.fix(root, "docs/page.md")
    assert [(found.line, found.reason) for found in wrong] == [
        (1, "no line holds its text"),
        (2, "there is no such file"),
        (2, "its text has to be the code that stands in the line, in backticks"),
    ]
    # Both lines 4 and 10 hold `loss`: the second is nearer to 8.
    after = before.replace("[`def loss(x):`](../src/a.py#L9)", "[`def loss(x):`](../src/a.py#L4)")
    assert (root / "docs/page.md").read_text() == after.replace("a.py#L8", "a.py#L10")


def test_code_that_moved_is_followed(tmp_path: Path) -> None:
    root = repository(tmp_path, {"README.md": "[`def other_loss(x):`](src/a.py#L9)\n", "src/a.py": CODE})
    assert lines.check(root, "README.md") == []
    (root / "src/a.py").write_text("# One line more.\n" + CODE)
    assert [found.reason for found in lines.check(root, "README.md")] == ["it is in line 10"]
    assert lines.fix(root, "README.md") == []
    assert (root / "README.md").read_text() == "[`def other_loss(x):`](src/a.py#L10)\n"


def test_the_command_tells_by_its_exit_code(monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    root = repository(tmp_path, {"README.md": "[`def loss(x):`](src/a.py#L9)\n", "src/a.py": CODE})
    monkeypatch.setattr(lines, "__file__", str(root / "website/lines.py"))
    assert lines.main(["--check"]) == 1
    assert capsys.readouterr().err == "README.md:1: [`def loss(x):`](src/a.py#L9): it is in line 4\n"
    assert lines.main([]) == 0
    assert lines.main(["--check"]) == 0
    (root / "src/a.py").write_text("")
    assert lines.main([]) == 1


# Links between pages and files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "link", "path"),
    [
        ("docs/a.md", "b.md", "docs/b.md"),
        ("docs/a.md", "../src/a.py#L4", "src/a.py"),
        ("docs/reference/a.md", "../../README.md#start", "README.md"),
        ("README.md", "docs/a.md", "docs/a.md"),
        ("examples/x/README.md", "../../docs/a.md", "docs/a.md"),
        ("src/", "a.py", "src/a.py"),
        ("docs/a.md", "../../outside.md", "../outside.md"),
        ("docs/a.md", "#anchor", None),
        ("docs/a.md", "https://example.org/a.md", None),
        ("docs/a.md", "mailto:a@example.org", None),
        ("docs/a.md", "/a.md", None),
    ],
)
def test_links_are_paths_of_the_repository(page: str, link: str, path: str | None) -> None:
    assert links.resolve(page, link) == path


def test_where_the_site_has_a_path(tmp_path: Path) -> None:
    files = {"docs/a.md": "", "README.md": "", "src/a.py": CODE, "examples/x/README.md": "", "big.json": "1" * 100_001}
    root = repository(tmp_path / "root", files)
    (root / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "outside.md").write_text("")
    expected = {
        "docs/a.md": "a.md",
        "README.md": "repository/README.md",
        "src/a.py": "repository/src/a.py.md",
        "src": "repository/src/index.md",
        "examples/x": "repository/examples/x/README.md",
        "big.json": "repository/big.json",
        "image.png": "repository/image.png",
        "docs/missing.md": None,
        "missing.py": None,
        "../outside.md": None,
    }
    assert {path: links.site_path(root, path) for path in expected} == expected


def test_everything_that_pages_lead_to_is_found(tmp_path: Path) -> None:
    files = {
        "docs/a.md": "[readme](../README.md) [folder](../tests) [gone](../gone.py) [other](b.md)",
        "docs/b.md": "",
        "README.md": "[example](examples/x) [itself](README.md)",
        "examples/x/README.md": "[code](run.py#L1) [back](../../docs/a.md)",
        "examples/x/run.py": "",
        "tests/test_a.py": "",
        "tests/deep/b.py": "",
        "tests/__pycache__/c.pyc": "",
        "tests/.hidden": "",
        "src/never_linked.py": "",
    }
    root = repository(tmp_path, files)
    found = links.reachable(root, ["docs/a.md", "docs/b.md"])
    assert found == {
        "README.md",
        "examples/x/README.md",
        "examples/x/run.py",
        "tests",
        "tests/test_a.py",
        "tests/deep",
        "tests/deep/b.py",
    }


# The site -------------------------------------------------------------------------------------------------------------

MKDOCS = """
site_name: small
theme: {name: mkdocs}
use_directory_urls: false
validation: {links: {anchors: warn, unrecognized_links: warn}, nav: {omitted_files: warn}}
markdown_extensions: [tables, attr_list, toc]
plugins: []
hooks: [HOOKS]
"""


def build(root: Path, settings: str = "") -> Path:
    """Builds the site of a small repository strictly, and returns its folder."""
    commands = pytest.importorskip("mkdocs.commands.build", reason="mkdocs is not installed (the extra `docs` has it)")
    from mkdocs.config import load_config

    (root / "mkdocs.yml").write_text(MKDOCS.replace("HOOKS", str(ROOT / "website" / "hooks.py")) + settings)
    commands.build(load_config(str(root / "mkdocs.yml"), strict=True))
    return root / "site"


def small(folder: Path, page: str, files: Mapping[str, str] | None = None) -> Path:
    usual = {"docs/index.md": f"# Home\n\n{page}\n", "README.md": "# Read me\n", "src/a.py": CODE}
    return repository(folder, usual | dict(files or {}))


def test_links_into_the_repository_become_pages(tmp_path: Path) -> None:
    page = "[code](../src/a.py#L4) [me](../README.md#read-me) [all](../src) `[x](../gone.py)` [big](../big.json)\n"
    site = build(small(tmp_path, page, {"big.json": "1" * 100_001}))
    home = (site / "index.html").read_text()
    for target in ("src/a.py.html#L4", "index.html#read-me", "src/index.html", "big.json"):
        assert f'href="repository/{target}"' in home
    assert "[x](../gone.py)</code>" in home
    assert (site / "repository/big.json").read_text() == "1" * 100_001
    assert 'href="a.py.html"' in (site / "repository/src/index.html").read_text()


def test_source_pages_have_every_line_under_its_number(tmp_path: Path) -> None:
    code = "\n\n" + CODE + 'text = """<b>\nin two lines\n"""\n'
    root = small(tmp_path, "[code](../src/b.py)", {"src/b.py": code})
    html = (build(root) / "repository/src/b.py.html").read_text()
    found = re.findall(r'<span class="line" id="L(\d+)"><a href="#L\1"[^>]*></a>(.*?)\n</span>', html, re.DOTALL)
    shown = [re.sub(r"<[^>]*>", "", line).replace("&lt;", "<").replace("&gt;", ">") for _, line in found]
    shown = [line.replace("&quot;", '"') for line in shown]
    assert [int(number) for number, _ in found] == list(range(1, len(code.splitlines()) + 1))
    assert shown == code.splitlines()


def test_a_notebook_is_shown_as_its_cells(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# A notebook\n", "about [code](a.py#L4)"]},
        {"cell_type": "code", "source": ["1 + 1"], "outputs": [{"data": {"text/plain": ["2"]}}, {"text": ["<three>"]}]},
    ]
    root = small(tmp_path, "[notebook](../src/n.ipynb)")
    (root / "src/n.ipynb").write_text(json.dumps({"cells": cells}))
    html = (build(root) / "repository/src/n.ipynb.html").read_text()
    assert '<h1 id="a-notebook">A notebook</h1>' in html
    assert 'href="a.py.html#L4"' in html
    assert "1 + 1" in html
    assert "&lt;three&gt;" in html


def test_tables_of_prose_are_marked_for_phones_and_tables_of_numbers_are_not(tmp_path: Path) -> None:
    prose = "| exit code | `what` | |\n|---|---|---|\n| 2 | wrong | later |\n| none | right |  |\n"
    two = "| a | b |\n|---|---|\n| c | d |\n"
    numbers = "| run | reward |\n|---|---:|\n| first | 1.5 |\n"
    html = (build(small(tmp_path, f"{prose}\n{two}\n{numbers}")) / "index.html").read_text()
    tables = re.findall(r"<table([^>]*)>(.*?)</table>", html, re.DOTALL)[:3]  # The theme has one of its own.
    assert ["data-prose" in attributes for attributes, _ in tables] == [True, True, False]
    cells = [re.findall(r"<td([^>]*)>(.*?)</td>", body) for _, body in tables]
    assert cells[0] == [
        (' data-head="exit code"', "2"),
        (' data-head="what"', "wrong"),
        (' data-head=""', "later"),
        ("", "none"),
        (' data-head="what"', "right"),
        (' data-head=""', ""),
    ]
    assert cells[1] == [("", "c"), ("", "d")]
    assert "data-head" not in tables[2][1]


def test_the_navigation_has_every_readme_that_people_start_from() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\ntheme:\n")[0]
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("examples/**/README.md")]
    assert len(pages) > 10
    missing = [page for page in pages if f": repository/{page.relative_to(ROOT).as_posix()}\n" not in navigation]
    assert not missing


def test_the_search_knows_the_theme_s_message() -> None:
    """website/theme/assets/search.js changes what is typed on its way to the theme's worker."""
    material = pytest.importorskip("material", reason="mkdocs-material is not installed (the extra `docs` has it)")
    (worker,) = Path(material.__path__[0]).glob("templates/assets/javascripts/workers/search.*.min.js")
    script = (ROOT / "website/theme/assets/search.js").read_text(encoding="utf-8")
    number = re.findall(r"^const QUERY = (\d+)", script, re.MULTILINE)
    assert re.findall(r"case (\d+):let \w+=\w+\.data;", worker.read_text(encoding="utf-8")) == number


WRONG = {
    "a.md": "[gone](../src/gone.py)",
    "b.md": "[gone](gone.md)",
    "c.md": "[no folder](../folder)",
    "d.md": "[line](../src/a.py#L11)",
    "e.md": "[anchor](../README.md#nowhere)",
    "f.md": "[here](#nowhere)",
    "g.md": "[outside](../../outside.md)",
    "h.md": "![picture](images/gone.png)",
    "i.md": "A list without a line before:\n- is\n- text",
    "j.md": "- nested\n  - by two spaces",
}


def test_what_is_wrong_on_a_page_fails_the_build(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "outside.md").write_text("# Outside\n")
    pages = {f"docs/{name}": f"# A page\n\n{text}\n" for name, text in WRONG.items()}
    root = small(tmp_path / "root", "[code](../src/a.py#L10) [me](../README.md#read-me)\n\n- a\n    - b", pages)
    exceptions = pytest.importorskip("mkdocs.exceptions", reason="mkdocs is not installed (the extra `docs` has it)")
    with pytest.raises(exceptions.Abort, match="10 warnings in strict mode"):
        build(root)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for name in WRONG:
        assert sum(warning.startswith((f"{name}: ", f"Doc file '{name}' ")) for warning in warnings) == 1, name


def test_a_page_that_is_not_in_the_navigation_fails_the_build(tmp_path: Path) -> None:
    exceptions = pytest.importorskip("mkdocs.exceptions", reason="mkdocs is not installed (the extra `docs` has it)")
    root = small(tmp_path, "", {"docs/lost.md": "# Lost\n"})
    build(root)
    with pytest.raises(exceptions.Abort, match="strict mode"):
        build(root, "nav: [index.md]\n")


def test_make_docs_fails_on_a_warning(tmp_path: Path) -> None:
    """mkdocs build --strict --quiet would not: what is quiet is not counted."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (the extra `docs` has it)")
    recipe = re.search(r"^docs: .*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    command = recipe[1].replace("$(BIN)/python", sys.executable)
    for name, page, code in (("right", "[code](../src/a.py#L4)", 0), ("wrong", "[code](../src/a.py#L400)", 1)):
        root = small(tmp_path / name, page)
        (root / "mkdocs.yml").write_text(MKDOCS.replace("HOOKS", str(ROOT / "website" / "hooks.py")))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, shell=True, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr


# What is made from code -----------------------------------------------------------------------------------------------


def test_every_setting_of_every_command_is_listed() -> None:
    from dataclasses import fields

    from website.settings import settings_markdown

    from remax.commands import COMMANDS

    sections = dict(re.findall(r"^## remax (\S+)\n(.*?)(?=^## |\Z)", settings_markdown(), re.DOTALL | re.MULTILINE))
    assert list(sections) == sorted(COMMANDS, key=lambda name: name != "train")
    titles = {anchor: body for section in sections.values() for anchor, body in _groups(section)}
    for name, command in COMMANDS.items():
        shown = sections[name] + "".join(titles[anchor] for anchor in re.findall(r"as in .*\(#(.*)\)", sections[name]))
        listed = sorted(re.findall(r"^\| `--(\w+)`", shown, re.MULTILINE))
        assert listed == sorted(field.name for cls in command.settings for field in fields(cls)), name


def _groups(section: str) -> list[tuple[str, str]]:
    return re.findall(r"^### .*? \{ #(\S+) \}\n(.*?)(?=^### |^\*\*|\Z)", section, re.DOTALL | re.MULTILINE)


def test_defaults_are_those_of_the_command() -> None:
    from website.settings import settings_markdown

    text = settings_markdown()
    train, sft = (text.split(f"## remax {name}\n")[1].split("\n## ")[0] for name in ("train", "sft"))
    assert "| `--learning_rate` | `float` | `1e-06` | Peak learning rate. |" in train
    assert "| `--learning_rate` | `float` | `1e-05` | Peak learning rate. |" in sft
    assert "| `--model` | `str` | required |" in train
    assert "| `--kl_mode` | `to_go`, `one_step`, `loss`, `none` | `to_go` |" in train
    assert "| `--reward_funcs` | `list[str]` | `[]` |" in train
    assert re.search(r"\| `--seed` \| `int` \| `42` \|", text)


def test_the_page_of_metrics_has_the_metrics_of_a_run(tmp_path: Path) -> None:
    from datasets import Dataset

    from remax.methods import agreement
    from toy_training import make_trainer, read, vowels

    page = (ROOT / "docs/reference/metrics.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    listed = {name for cell in cells for name in re.findall(r"`(.*?)`", cell)}
    held_out = {"eval_dataset": Dataset.from_list([{"prompt": "a dog"}]), "gold_reward_funcs": vowels}
    for name, settings in {
        "remax": {**held_out, "num_generations": 2, "baseline": "mixed"},
        "ppo": {"method": "ppo"},
    }.items():
        make_trainer(tmp_path / name, max_steps=1, **settings).train()
    files = [*tmp_path.glob("*/metrics.jsonl"), *tmp_path.glob("*/eval.jsonl")]
    written = {name.replace("/vowels/", "/NAME/") for file in files for line in read(file) for name in line}
    source = Path(agreement.__file__).read_text(encoding="utf-8")
    only_with_vllm = {name for name in listed if name.rpartition("/")[0] in source and name.count("/") == 2}
    only_when_rewards_fail = {"rewards/NAME/missing_fraction"}
    assert len(only_with_vllm) == 5
    assert written <= listed
    assert listed - written - only_when_rewards_fail == only_with_vllm

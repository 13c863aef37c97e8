"""Every code block of the documentation does what it says; see tests/documentation.py for what that means."""

import contextlib
import os
import re
import socket
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from documentation import COMMAND, RUNNERS, Broken, Reader, blocks, pages
from documented_commands import Commands
from documented_programs import REPOSITORY, found
from documented_world import contents, enter_world, make_world
from fake_vllm import fake_vllm  # noqa: F401

PAGES = [page.relative_to(REPOSITORY) for page in pages()]
LONG = {Path("docs/choosing.md"), Path("docs/results.md")}
"""Pages with comparisons, which take long even when they are made small."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented") / "world"
    make_world(folder)
    return folder


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Nothing but this machine can be reached, and nobody tries."""
    tried: list[Any] = []
    own_connect = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            tried.append(address)
            raise OSError(f"a block of the documentation may not reach {address}")
        own_connect(self, address)

    own_getaddrinfo = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **named: Any) -> Any:
        if host not in (None, "127.0.0.1", "::1", "localhost"):
            tried.append(host)
            raise OSError(f"a block of the documentation may not look up {host}")
        return own_getaddrinfo(host, *args, **named)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield tried
    assert tried == []


@pytest.fixture
def reader(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alone: list[Any],
    fake_vllm: Any,  # noqa: F811
) -> Iterator[Callable[[Path], Reader]]:
    """Makes somebody who reads a page, in a folder of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    commands = Commands(monkeypatch)
    environment, before = dict(os.environ), contents(world)

    def make(page: Path) -> Reader:
        example = page.parent if page.parent.parent.name == "examples" else None
        commands.home = here = enter_world(world, tmp_path / "page", example)
        monkeypatch.chdir(here)
        modules.enter_context(found(here))
        return Reader(commands)

    with contextlib.ExitStack() as modules:
        yield make
    commands.close()
    assert contents(world) == before
    assert dict(os.environ) == environment | {"PYTEST_CURRENT_TEST": os.environ["PYTEST_CURRENT_TEST"]}


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in LONG else []) for page in PAGES], ids=str
)
def test_the_blocks_of_a_page(page: Path, reader: Callable[[Path], Reader]) -> None:
    """In order, in one folder. As many commands of remax run as the page has in its blocks."""
    parts = blocks(REPOSITORY / page)
    if not parts:
        return
    someone = reader(REPOSITORY / page)
    for block in parts:
        someone.follow(block)
    written = [line for block in parts if block.label == "sh" for line in block.lines()]
    assert someone.commands.count == sum(len(COMMAND.findall(line)) for line in written)


def test_the_documentation_is_found() -> None:
    """Counted by other means: no page is left out, and no fence."""
    assert {Path("README.md"), Path("docs/methods.md"), Path("examples/gsm8k/README.md")} <= set(PAGES)
    texts = [(REPOSITORY / page).read_text(encoding="utf-8") for page in PAGES]
    fences = sum(len(re.findall(r"^ *```", text, re.MULTILINE)) for text in texts)
    found = [block for page in PAGES for block in blocks(REPOSITORY / page)]
    assert 2 * len(found) == fences
    assert {block.label for block in found} == set(RUNNERS)
    started = [line for text in texts for line in text.splitlines() if re.match(r"remax [a-z-]+ [^`]*$", line)]
    assert sum(len(COMMAND.findall(line)) for b in found if b.label == "sh" for line in b.lines()) >= len(started) > 50


# What is wrong is found, and told with its place ----------------------------------------------------------------------

WRONG = {
    "python": ("x = 1\nfrom remax import ReMaxTrainr\n", r":5: ImportError: cannot import name 'ReMaxTrainr'"),
    "python syntax": ("x = 1\ny = (\n", r":5: SyntaxError"),
    "python error": ("def f():\n    return missing\nf()\n", r":5: NameError: name 'missing'"),
    "pycon": (">>> 1 + 1\n2\n>>> 1 + 2\n4\n", r":6: 1 \+ 2\nshows 3"),
    "diff": ("-from a import b\n+from remax import no_such\n", r"ImportError: cannot import name 'no_such'"),
    "sh": (
        "ls\nremax train --modle M\n",
        r":5: remax train --modle M\nended with 2: .*has no flag --modle.*did you mean",
    ),
    "sh value": ("remax train --config run.yaml --method remx\n", r":4: .*ended with 2: .*did you mean remax"),
    "sh file": ("remax evaluate --model sft/model --eval_dataset none.jsonl --reward_model rm/model\n", r"none\.jsonl"),
    "sh elsewhere": ("remax train --config run.yaml --output_dir /none/such\n", r":4: .*\n.*not in the page's folder"),
    "sh shared": ("remax train --config run.yaml --output_dir sft/model\n", r":4: .*\n.*not in the page's folder"),
    "sh exit": ("remax --version  # exit code 3\n", r":4: remax --version\nended with 0"),
    "sh program": ("ls\nremix train\n", r":5: remix: command not found"),
    "sh variable": ("ls $NOWHERE\n", r":4: NOWHERE: unbound variable"),
    "sh quoting": ('ls\necho "\n', r"unexpected EOF"),
    "sh launcher": ("torchrun --processes 2 -m remax train --config run.yaml\n", r":4: torchrun .*\nSystemExit"),
    "sh module": ("python -m benchmarks.gathering --outptu FILE\n", r":4: .*\n.*no flags --outptu"),
    "sh script": ("bash none.sh\n", r"there is no none\.sh"),
    "sh make": ("make tets\n", r"no target \{'tets'\}"),
    "sh extra": ('pip install "remax-rlhf[vlm]"\n', r"no extra \{'vlm'\}"),
    "sh data": ("curl http://127.0.0.1 -d '{\"a\": }'\n", r"JSONDecodeError"),
    "yaml": ("batch_size: 4\nlearning_rte: 1\n", r":4: .*has no setting learning_rte.*did you mean"),
    "yaml file": ("# reward.yaml\nbeta: 1.0\n", r":4: as settings of `remax reward`.*has no setting beta"),
    "json": ('{"version": 1, "rewards": [1.25, "no"]}\n', r":4: _NoAnswer: sent \"no\" as a reward"),
    "json request": ('{"version": 1, "prompts": [], "completions": [], "extra": 1}\n', r":4: HTTPError: .*400"),
    "json unknown": ('{"a": 1}\n', r":4: nothing here knows what this JSON is for: a"),
    "text": ("src/remax/\n  trainr.py  the loop\n", r":5: there is no trainr\.py"),
    "": ("x\n", r":3: a fence has to be labelled python, .*, not ''"),
    "bash": ("remax\n", r":3: a fence has to be labelled python, .*, not 'bash'"),
}


def test_what_is_wrong_is_found(reader: Callable[[Path], Reader], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    someone = reader(page)
    for kind, (text, expected) in WRONG.items():
        page.write_text(f"# Title\n\n```{kind.split(' ')[0]}\n{text}```\n")
        with pytest.raises(Broken, match=re.compile(rf"^{re.escape(str(page))}.*{expected}", re.DOTALL)):
            someone.follow(*blocks(page))


@pytest.mark.parametrize("text", ["```sh\nremax\n", "Run\n\n    remax train --config run.yaml\n"])
def test_code_without_a_fence_is_found(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(Broken, match=r"page\.md:(1: this fence has no end|3: this code has no fence)"):
        blocks(page)


def test_the_shell_is_bash(reader: Callable[[Path], Reader], tmp_path: Path) -> None:
    """Continued lines, comments, quotes, variables, conditions and redirections; commands run where they stand."""
    page = tmp_path / "page.md"
    text = """
        WHERE="a b"; mkdir "$WHERE" && cd "$WHERE"   # remax train --nothing
        remax init \\
            gsm8k --output 'my run.yaml' > said.txt || remax train
        cat > rewards.py <<'END'
        def brevity(completions, **columns): return [0.0] * len(completions)
        END
        REMAX_REWARD_TOKEN=$(python -c "import secrets; print(secrets.token_urlsafe(9))") python -c "
        import os; open('token', 'w').write(os.environ['REMAX_REWARD_TOKEN'])"
    """
    page.write_text(f"```sh{textwrap.dedent(text)}```\n")
    someone = reader(page)
    (block,) = blocks(page)
    someone.follow(block)
    folder = Path("a b")
    assert someone.commands.count == 1
    assert "my run.yaml has the settings of gsm8k" in (folder / "said.txt").read_text()
    assert (folder / "my run.yaml").is_file()
    assert (folder / "rewards.py").read_text().startswith("def brevity")
    assert len((folder / "token").read_text()) == 12
    assert "REMAX_REWARD_TOKEN" not in os.environ


@pytest.mark.parametrize("host", ["example.com", "192.0.2.1"])
def test_nothing_else_is_reached(host: str, alone: list[Any], reader: Callable[[Path], Reader], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python\nimport urllib.request\nurllib.request.urlopen('http://{host}', timeout=1)\n```\n")
    with pytest.raises(Broken, match=r"page\.md:3: URLError: .*may not"):
        reader(page).follow(*blocks(page))
    assert alone == [host]
    alone.clear()

"""The documentation's pages as tests see them: every fenced block, and what is done with it.

    python, diff   executed; the blocks of a page share a namespace, of a diff it is the side with the +
    pycon          likewise, and what it shows is compared
    sh             read and run by bash, whose programs are all replaced: tests/documented_programs.py
    yaml, json     settings of a command, which is run with them; what a reward server is sent and answers
    text           outputs, formulas, trees: not executed, but files that it names exist

A block of another kind fails, and so does a program that is not there: nothing is skipped in silence.
"""

import contextlib
import io
import json
import math
import re
import shlex
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from documented_commands import Commands
from documented_programs import EXECUTED, PROGRAMS, REPOSITORY, VARIABLES
from documented_shell import run_in_bash
from remax import launch
from remax.commands import COMMANDS
from remax.rewards.remote import _rewards as rewards_of_reply

FENCE = re.compile(r"^(?P<indent>\s*)(?P<marks>`{3,}|~{3,})(?P<label>.*)$")
COMMAND = re.compile(r"(?:^|&&|\|\||[|;(]|\s-m)\s*(?:\w+=\S*\s+)*remax\s+[a-z-]")
"""The start of a command of remax, in a line of a shell."""
EXIT_CODE = re.compile(r"#.*\bexit code (\d+)")


class Broken(Exception):
    """A block does not do what it should; the message begins with its place."""


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    """Of its first line of text."""
    label: str
    text: str

    def place(self, line: int = 1) -> str:
        """Where a line of it is, by its number in the block."""
        path = self.page.relative_to(REPOSITORY) if self.page.is_relative_to(REPOSITORY) else self.page
        return f"{path}:{self.line + line - 1}"

    def lines(self) -> list[str]:
        """Its lines of a shell: continued ones are one, without comments."""
        joined = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        return [re.sub(r"(^|\s)#.*", "", line) for line in joined]


def pages() -> list[Path]:
    """Returns every page of the documentation."""
    beneath = [path for folder in ("docs", "examples") for path in (REPOSITORY / folder).rglob("*.md")]
    return sorted([*REPOSITORY.glob("*.md"), *beneath])


def blocks(page: Path) -> list[Block]:
    """Returns the blocks of a page.

    Raises:
        Broken: one has no label, or no end.
    """
    found: list[Block] = []
    opened: tuple[int, re.Match[str]] | None = None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        fence = FENCE.match(line)
        if opened is None:
            if fence:
                opened = number, fence
            elif re.match(r"( {4}|\t)(\$ |remax |pip |python |import |from \w+ import )", line):
                raise Broken(f"{page}:{number}: this code has no fence, so nothing tests it: {line.strip()}")
            continue
        start, first = opened
        if fence is None or not fence["marks"].startswith(first["marks"]) or fence["label"].strip():
            continue
        body = [own.removeprefix(first["indent"]) for own in lines[start : number - 1]]
        block = Block(page, start + 1, first["label"].strip(), "\n".join(body) + "\n")
        if block.label not in RUNNERS:
            raise Broken(f"{block.place(0)}: a fence has to be labelled {', '.join(RUNNERS)}, not {block.label!r}")
        found.append(block)
        opened = None
    if opened is not None:
        raise Broken(f"{page}:{opened[0]}: this fence has no end")
    return found


@dataclass
class Reader:
    """Somebody who does in one folder what a page says, from top to bottom."""

    commands: Commands
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    """Of the page's Python."""

    def follow(self, block: Block) -> None:
        """Executes a block.

        Raises:
            Broken: something is wrong with it.
        """
        try:
            RUNNERS[block.label](self, block)
        except Broken:
            raise
        except Exception as error:
            raise Broken(f"{block.place()}: {type(error).__name__}: {error}") from error


# Python ---------------------------------------------------------------------------------------------------------------


def run_python(reader: Reader, block: Block, source: str | None = None) -> None:
    """Executes a block; tracebacks, and whoever asks for a function's source, get the page's own lines."""
    padding = "\n" * (block.line - 1)
    try:
        code = compile(padding + (source or block.text), str(block.page), "exec")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, reader.names)
    except (Exception, SystemExit) as error:
        line, trace = block.line, error.__traceback__
        while trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(block.page) else line
            trace = trace.tb_next
        if isinstance(error, SyntaxError):
            line = error.lineno or line
        raise Broken(f"{block.place(line - block.line + 1)}: {type(error).__name__}: {error}") from error


def run_console(reader: Reader, block: Block) -> None:
    """Executes what stands after >>> and compares what it shows, whatever its line breaks."""
    for example in re.finditer(r">>> (?P<source>.*\n(?:\.\.\. .*\n)*)(?P<shown>(?:(?!>>> ).*\n)*)", block.text):
        source = example["source"].replace("\n... ", "\n")
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(source, str(block.page), "single"), reader.names)
        except Exception as error:
            printed.write(f"{type(error).__name__}: {error}")
        if printed.getvalue().split() != example["shown"].split():
            line = block.text[: example.start()].count("\n") + 1
            raise Broken(f"{block.place(line)}: {source.strip()}\nshows {printed.getvalue()}")


def run_diff(reader: Reader, block: Block) -> None:
    """Executes what a diff leads to; what it comes from has to be Python."""
    lines = block.text.splitlines()
    compile("\n".join(line[1:] for line in lines if not line.startswith("+")), str(block.page), "exec")
    # An empty line for each that goes: the others keep their numbers.
    run_python(reader, block, "\n".join("" if line.startswith("-") else line[1:] for line in lines))


# Shell ----------------------------------------------------------------------------------------------------------------


def run_shell(reader: Reader, block: Block) -> None:
    """Lets bash read and run a block, whose programs are those of PROGRAMS."""

    def do(line: int, words: list[str]) -> tuple[int, str]:
        try:
            code, output = PROGRAMS[words[0]].run(reader.commands, words)
        except (Exception, SystemExit) as error:
            raise Broken(f"{block.place(line)}: {shlex.join(words)}\n{type(error).__name__}: {error}") from error
        expected = EXIT_CODE.search(block.text.splitlines()[line - 1])
        if code != (int(expected[1]) if expected else 0):
            raise Broken(f"{block.place(line)}: {shlex.join(words)}\nended with {code}: {output}")
        return code, output

    wrong = run_in_bash(block.text, do, replaced=PROGRAMS, executed=EXECUTED, variables=VARIABLES)
    if wrong is not None:
        raise Broken(f"{block.place(wrong.line)}: {wrong.message}")


# Data -----------------------------------------------------------------------------------------------------------------

INPUTS = {"model": "sft/model", "train_dataset": "prompts.jsonl", "reward_model": "rm/model"}
"""What a page's settings leave out, where a command needs it."""


def run_yaml(reader: Reader, block: Block) -> None:
    """Runs the command whose settings these are: the one that a comment names as its file, or the first that fits."""
    settings = yaml.safe_load(block.text)
    named = re.match(r"#\s*(?P<file>(?P<command>[\w-]+)\.ya?ml)\b", block.text)
    path = Path(named["file"] if named else "block.yaml")
    path.write_text(block.text, encoding="utf-8")
    if "distributed_type" in settings:
        launch._read(path)
        return
    command = named["command"] if named and named["command"] in COMMANDS else _command_with(settings)
    known = {own.name for group in COMMANDS[command].settings for own in fields(group)}
    flags = [part for name, value in INPUTS.items() if name in known - set(settings) for part in (f"--{name}", value)]
    has_reward = any(name.startswith("reward_") and name in settings for name in ("reward_funcs", "reward_url"))
    flags = flags[:-2] if has_reward and "--reward_model" in flags else flags
    code, printed = reader.commands.run([command, "--config", str(path), *flags], counts=False)
    if code != 0:
        raise Broken(f"{block.place()}: as settings of `remax {command}` this ends with {code}: {printed}")


def _command_with(settings: Mapping[str, Any]) -> str:
    for name in ("train", *COMMANDS):
        if set(settings) <= {own.name for group in COMMANDS[name].settings for own in fields(group)}:
            return name
    return "train"  # which says what it does not know


def run_json(reader: Reader, block: Block) -> None:
    """Sends what is shown to a reward server, or takes it for what one answers."""
    content = json.loads(block.text)
    url = reader.commands.reward_address("http://127.0.0.1:8000")
    if set(content) == {"status", "version"}:
        said = _asked(f"{url}/health")
        right = said == content
    elif {"version", "prompts", "completions"} <= set(content):
        said = _asked(f"{url}/score", block.text.encode())
        right = set(said) == {"version", "rewards"} and len(said["rewards"]) == len(content["completions"])
    elif set(content) == {"version", "rewards"}:
        said = rewards_of_reply(content, len(content["rewards"]))
        right = [None if math.isnan(reward) else reward for reward in said] == content["rewards"]
    else:
        raise Broken(f"{block.place()}: nothing here knows what this JSON is for: {', '.join(content)}")
    if not right:
        raise Broken(f"{block.place()}: it is {said} instead")


def _asked(url: str, body: bytes | None = None) -> Any:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as reply:
        return json.load(reply)


def run_text(reader: Reader, block: Block) -> None:
    """Looks for the files of a tree of this repository."""
    if not block.text.startswith("src/remax/\n"):
        return
    there = {path.name for path in (REPOSITORY / "src/remax").rglob("*")}
    for number, line in enumerate(block.text.splitlines(), start=1):
        top = REPOSITORY / line.split()[0]
        if not line.startswith(" ") and not top.exists():
            raise Broken(f"{block.place(number)}: there is no {top.name}")
        missing = [name for name in re.findall(r"\b\w+\.py\b", line) if name not in there]
        missing += [name for name in re.findall(r"^  (\w+)/", line) if not (REPOSITORY / "src/remax" / name).is_dir()]
        if missing:
            raise Broken(f"{block.place(number)}: there is no {', '.join(missing)} in src/remax")


RUNNERS: dict[str, Callable[[Reader, Block], None]] = {
    "python": run_python,
    "pycon": run_console,
    "diff": run_diff,
    "sh": run_shell,
    "yaml": run_yaml,
    "json": run_json,
    "text": run_text,
}
"""By the label of the fence."""

"""Programs that the documentation calls: what is done instead of calling them, and why."""

import contextlib
import io
import itertools
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from documented_commands import Commands

REPOSITORY = Path(__file__).resolve().parents[1]
Answer = tuple[int, str]
WELL: Answer = (0, "")


def _remax(commands: Commands, words: list[str]) -> Answer:
    return commands.run(words[1:])


def _python(commands: Commands, words: list[str]) -> Answer:
    """Runs `-m remax`, `-c` and scripts beside the page; of the repository's benchmarks it reads the flags alone."""
    if words[1:3] == ["-m", "remax"]:
        return commands.run(words[3:])
    if words[1] == "-m":
        return _flags_of_module(words[2], words[3:])
    if words[1] == "-c":
        compiled = compile(words[2], "python -c", "exec")
        printed = io.StringIO()
        if not any(f"import {name}" in words[2] or f"from {name}" in words[2] for name in NOT_INSTALLED):
            with contextlib.redirect_stdout(printed):
                exec(compiled, {"__name__": "__main__"})
        return 0, printed.getvalue()
    if words[1].startswith(FOREIGN):
        return WELL
    if words[1].startswith("benchmarks/"):
        return _flags_of_module(words[1].removesuffix(".py").replace("/", "."), words[2:])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _run_script(Path(words[1]), words[2:])
    return 0, printed.getvalue()


NOT_INSTALLED = ("llama_cpp",)
"""What code of `python -c` imports without being one of our packages: it is compiled alone."""
FOREIGN = ("llama.cpp/",)
"""Folders that come from elsewhere: scripts in them are not looked at."""


def _run_script(path: Path, words: Sequence[str], *others: Path) -> None:
    """Runs a script with the modules beside it, and those of other folders."""
    with contextlib.ExitStack() as stack:
        for folder in (*others, path.resolve().parent):
            stack.enter_context(found(folder))
        kept, sys.argv = sys.argv, [str(path), *words]
        stack.callback(lambda: setattr(sys, "argv", kept))
        runpy.run_path(str(path), run_name="__main__")


@contextlib.contextmanager
def found(folder: Path) -> Iterator[None]:
    """Modules of a folder are found, and forgotten afterwards: another page has others of the same name."""
    kept, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = kept
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
                del sys.modules[name]


def _flags_of_module(name: str, words: Sequence[str]) -> Answer:
    """A module of the repository exists, and its --help has every flag; those of packages are not looked at."""
    if name in ("venv", "pip", "pytest"):
        return WELL
    path = REPOSITORY / f"{name.replace('.', '/')}.py"
    path = path if path.is_file() else path.with_suffix("") / "__main__.py"
    assert path.is_file(), f"there is no module {name}"
    printed = io.StringIO()
    # What stands before --help chooses the command whose flags it shows.
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        _run_script(path, [*words, "--help"], REPOSITORY)
    shown = printed.getvalue()
    assert "usage:" in shown, f"{name} has no --help: {shown}"
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in shown]
    assert not unknown, f"{name} has no flags {', '.join(unknown)}"
    return WELL


def _torchrun(commands: Commands, words: list[str]) -> Answer:
    from torch.distributed.run import get_args_parser

    return _launched(commands, get_args_parser().parse_args(words[1:]))


def _accelerate(commands: Commands, words: list[str]) -> Answer:
    from accelerate.commands.launch import launch_command_parser

    if words[1] != "launch":
        return WELL
    parsed = launch_command_parser().parse_args(words[2:])
    assert parsed.config_file is None or Path(parsed.config_file).is_file()
    return _launched(commands, parsed)


def _launched(commands: Commands, parsed: Any) -> Answer:
    """What a launcher would start several times is run once."""
    assert parsed.module, "remax is started as a module: -m"
    name, *rest = parsed.training_script, *parsed.training_script_args
    return commands.run(rest) if name == "remax" else _flags_of_module(name, rest)


def _make(commands: Commands, words: list[str]) -> Answer:
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    asked = [word for word in words[1:] if "=" not in word]
    assert set(asked) <= set(targets), f"the Makefile has no target {set(asked) - set(targets)}"
    return WELL


def _pip(commands: Commands, words: list[str]) -> Answer:
    project = (REPOSITORY / "pyproject.toml").read_text()
    (extras,) = re.findall(r"^\[project\.optional-dependencies\]\n(.*?)^\[", project, re.MULTILINE | re.DOTALL)
    assert words[1] == "install"
    for word in (word for word in words[2:] if not word.startswith("-")):
        requirement = Requirement(re.sub(r"^\.", OUR_NAME, word))
        unknown = requirement.extras - set(re.findall(r"^(\w+) = ", extras, re.MULTILINE))
        assert requirement.name != OUR_NAME or not unknown, f"there is no extra {unknown}"
    return WELL


OUR_NAME = "remax-rlhf"


def _pytest(commands: Commands, words: list[str]) -> Answer:
    paths = [word.partition("::")[0] for word in words[1:] if word.startswith("tests/")]
    missing = [path for path in paths if not (REPOSITORY / path).exists()]
    assert not missing, f"there is no {missing}"
    return WELL


def _script(commands: Commands, words: list[str]) -> Answer:
    named = [word for word in words[1:] if word.endswith((".sh", ".slurm"))]
    assert named, "no script is named"
    assert Path(named[0]).is_file(), f"there is no {named[0]}"
    subprocess.run([str(shutil.which("bash")), "-n", named[0]], check=True)
    return WELL


def _git(commands: Commands, words: list[str]) -> Answer:
    if words[1] == "clone":
        Path(words[3] if len(words) > 3 else Path(words[2]).stem).mkdir()
    return WELL


def _read_alone(commands: Commands, words: list[str]) -> Answer:
    for flag, word in itertools.pairwise(words):
        if flag in ("-d", "--data"):
            json.loads(word)
    return WELL


@dataclass(frozen=True)
class Program:
    """What is done where a page calls a program."""

    run: Callable[[Commands, list[str]], Answer]
    why: str


EXECUTED = ("cat", "cp", "ls", "mkdir")
"""Run as they are: they touch only the page's folder."""
NETWORK = "needs a network or an account: bash has read it, its data are JSON"
ELSEWHERE = "belongs to another project, and is not installed: bash has read it"
VARIABLES = {"RANK_OF_MACHINE": "0"}
"""What pages tell to set."""
PROGRAMS = {
    "remax": Program(_remax, "the command itself, in this process"),
    "python": Program(_python, "scripts and -c are run; benchmarks take long, so their flags are looked up in --help"),
    "torchrun": Program(_torchrun, "its own parser reads the flags; remax is run once, in this process"),
    "accelerate": Program(_accelerate, "likewise"),
    "make": Program(_make, "targets take minutes, and are what CI runs: each is in the Makefile"),
    "pip": Program(_pip, "installs: requirements are read, and our extras are in pyproject.toml"),
    "pytest": Program(_pytest, "would run the tests in the tests: its files exist"),
    "bash": Program(_script, "scripts of hours or of several machines: they exist, and bash reads them"),
    "sbatch": Program(_script, "likewise, and needs a cluster"),
    "git": Program(_git, "needs a network: a clone is an empty folder"),
    "hf": Program(_read_alone, NETWORK),
    "curl": Program(_read_alone, NETWORK),
    "vllm": Program(_read_alone, ELSEWHERE),
    "docker": Program(_read_alone, ELSEWHERE),
    "ollama": Program(_read_alone, ELSEWHERE),
    "llama-cli": Program(_read_alone, ELSEWHERE),
    "llama-quantize": Program(_read_alone, ELSEWHERE),
}

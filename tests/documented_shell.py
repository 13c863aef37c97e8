"""Lets bash read and run a block of the documentation with other programs than those that it names.

So quoting, variables, comments, continued lines, `&&` and redirections are those of bash itself. Every program is a
function that asks this process what to do, waits, and ends with what it is told; what else is called does not exist.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Do = Callable[[int, list[str]], tuple[int, str]]
"""Gets the number of the line and the words of a command; returns the exit code and what is printed."""
OF_BASH = ("_", "SHLVL", "PWD", "OLDPWD")
"""Variables that bash changes by itself."""
PRELUDE = r"""
set -euo pipefail
_documented() {
    { printf '%s\0' "$#" "${BASH_LINENO[1]}" "$PWD" "$@"; "$_ENV" -0; printf '\0'; } >&"$_ASK"
    local code output
    IFS= read -r -d '' -u "$_TOLD" code
    IFS= read -r -d '' -u "$_TOLD" output
    printf '%s' "$output"
    return "$code"
}
"""


class Failure(NamedTuple):
    """What bash itself complains about."""

    line: int
    message: str


def run_in_bash(
    text: str, do: Do, *, replaced: Iterable[str], executed: Iterable[str], variables: Mapping[str, str]
) -> Failure | None:
    """Runs a script in this folder; do is called in the folder, and with the variables, where a command stands.

    replaced: programs that `do` gets. executed: programs that bash runs. Whatever do raises ends bash, and is raised.
    """
    functions = "".join(f'{name}() {{ _documented {name} "$@"; }}\n' for name in replaced)
    functions += "".join(f'{name}() {{ {shutil.which(name)} "$@"; }}\n' for name in executed)
    ask_read, ask = os.pipe()
    told, told_write = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        script, prelude = Path(folder) / "block", Path(folder) / "prelude"
        script.write_text(text, encoding="utf-8")
        prelude.write_text(PRELUDE + functions, encoding="utf-8")
        own = {"PATH": folder, "BASH_ENV": str(prelude), "_ENV": str(shutil.which("env"))}
        environment = {**os.environ, **variables, **own, "_ASK": str(ask), "_TOLD": str(told)}
        bash = subprocess.Popen(
            [str(shutil.which("bash")), str(script)],
            env=environment,
            pass_fds=(ask, told),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(ask)
        os.close(told)
        try:
            with os.fdopen(ask_read, "rb") as questions, os.fdopen(told_write, "wb") as answers:
                _answer(do, environment, questions, answers)
        except BaseException:
            bash.kill()
            raise
        finally:
            complaint = bash.communicate()[1].strip()
    if bash.returncode == 0 and not complaint:
        return None
    where, _, message = complaint.removeprefix(f"{script}: line ").partition(": ")
    if where.isdigit():
        return Failure(int(where), message)
    return Failure(1, f"bash ended with {bash.returncode}: {complaint}")


def _answer(do: Do, environment: Mapping[str, str], questions: Any, answers: Any) -> None:
    """Does what is asked until nobody asks any more."""
    parts = _parts(questions)
    for number in parts:
        line, folder = int(next(parts)), next(parts)
        words = [next(parts) for _ in range(int(number))]
        now = dict(entry.partition("=")[::2] for entry in iter(lambda: next(parts), ""))
        changed = {name: text for name, text in now.items() if environment.get(name) != text and name not in OF_BASH}
        with _at(folder, changed):
            code, output = do(line, words)
        with contextlib.suppress(BrokenPipeError):
            answers.write(f"{code}\0{output}\0".encode())
            answers.flush()


def _parts(questions: Any) -> Iterator[str]:
    rest = b""
    while piece := questions.read1(65536):
        *whole, rest = (rest + piece).split(b"\0")
        yield from (part.decode() for part in whole)


@contextlib.contextmanager
def _at(folder: str, variables: Mapping[str, str]) -> Iterator[None]:
    before, kept = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(kept)

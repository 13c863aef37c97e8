"""The files of examples/, for their tests."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def module_of(name: str) -> ModuleType:
    """Imports a script of the examples, such as gsm8k/rewards.py."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_").removesuffix(".py"), EXAMPLES / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

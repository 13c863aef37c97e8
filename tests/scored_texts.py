"""Completions to be scored, for the tests of rewards."""

from typing import Any

from remax.interfaces import Completion, Prompt
from toy_tokenizers import EOS


def completion(prompt: Any, text: str, /, *, truncated: bool = False, **columns: Any) -> Completion:
    return Completion(Prompt(0, prompt, [7, 8], columns), 0, [9, EOS], [-1.0, -1.0], truncated, text)

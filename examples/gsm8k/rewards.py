r"""Rewards that check an answer: 1.0 if it is right, 0.0 if not.

`correct` reads mathematics with math-verify: \boxed{\frac{1}{2}} is 0.5, \boxed{\$1,200} is 1200. `same_number` needs
no package, and knows plain numbers alone.
"""

import re
from typing import Any

try:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
except ImportError:
    parse = None

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def correct(completions: list[Any], answer: list[str], **columns: object) -> list[float]:
    """Returns 1.0 where the answer that a completion gives equals the dataset's.

    A box goes before anything else in the text; without one, the last number or formula counts.
    """
    if parse is None:
        raise ImportError(
            "math-verify is not installed: pip install math-verify, or set --reward_funcs rewards.py:same_number"
        )
    found_in = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    rewards = []
    for completion, solution in zip(completions, answer, strict=True):
        given = parse(_text(completion), extraction_config=found_in)
        rewards.append(float(verify(parse(solution), given)))
    return rewards


def same_number(completions: list[Any], answer: list[str], **columns: object) -> list[float]:
    """Returns 1.0 where the last number of the last box, or of the text without one, is the dataset's."""
    rewards = []
    for completion, solution in zip(completions, answer, strict=True):
        text = _text(completion)
        numbers = NUMBER.findall(text.rsplit(r"\boxed{", 1)[-1].split("}", 1)[0] if r"\boxed{" in text else text)
        rewards.append(float(bool(numbers) and float(numbers[-1].replace(",", "")) == float(solution)))
    return rewards


def _text(completion: Any) -> str:
    """Returns the text of a completion, which is one message of the assistant where the prompt is messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]

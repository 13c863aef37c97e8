r"""A reward that checks an answer without any package: it knows plain numbers alone, as \boxed{72} and `72 clips`."""

import re
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def same_number(completions: list[Any], answer: list[str], **columns: object) -> list[float]:
    """Returns 1.0 where the last number of the last box, or of the text without one, is the dataset's."""
    rewards = []
    for completion, solution in zip(completions, answer, strict=True):
        # A completion is one message of the assistant where the prompt is messages.
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        numbers = NUMBER.findall(text.rsplit(r"\boxed{", 1)[-1].split("}", 1)[0] if r"\boxed{" in text else text)
        rewards.append(float(bool(numbers) and float(numbers[-1].replace(",", "")) == float(solution)))
    return rewards

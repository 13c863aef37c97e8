r"""A reward that checks an answer: 1.0 if it is right, 0.0 if not.

`correct` reads mathematics with math-verify: \boxed{\frac{1}{2}} is 0.5, \boxed{\$1,200} is 1200. Without that package
there is plain_rewards.py.
"""

from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify


def correct(completions: list[Any], answer: list[str], **columns: object) -> list[float]:
    """Returns 1.0 where the answer that a completion gives equals the dataset's.

    A box goes before anything else in the text; without one, the last number or formula counts.
    """
    found_in = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    rewards = []
    for completion, solution in zip(completions, answer, strict=True):
        # A completion is one message of the assistant where the prompt is messages.
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        rewards.append(float(verify(parse(solution), parse(text, extraction_config=found_in))))
    return rewards

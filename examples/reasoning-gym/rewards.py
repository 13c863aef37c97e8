"""The reward that reasoning-gym's own checkers give."""

import json
from functools import cache
from typing import Any

import reasoning_gym
from reasoning_gym.utils import extract_answer


def solved(completions: list[Any], entry: list[str], **columns: object) -> list[float]:
    """Returns the score of what stands between <answer> and </answer>, from 0.0 to 1.0; 0.0 where nothing does."""
    rewards = []
    for completion, text in zip(completions, entry, strict=True):
        puzzle = json.loads(text)
        answer = extract_answer(completion[-1]["content"])
        rewards.append(_checker(puzzle["metadata"]["source_dataset"])(answer, puzzle) if answer else 0.0)
    return rewards


@cache
def _checker(task: str) -> Any:
    return reasoning_gym.get_score_answer_fn(task)

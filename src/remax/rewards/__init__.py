"""Rewards: learned (model), programmed (functions, isolation), remote, and how several become one number."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from remax.errors import UserError
from remax.interfaces import Completion, RewardFunction
from remax.rewards.functions import CallableReward, load_reward_function
from remax.rewards.programmed import ProgrammedReward
from remax.rewards.text import require_chat_template, reward_input_ids

if TYPE_CHECKING:
    from remax.rewards.model import RewardModel

__all__ = [
    "CallableReward",
    "ProgrammedReward",
    "RewardModel",
    "Scores",
    "load_reward_function",
    "require_chat_template",
    "resolve_weights",
    "reward_input_ids",
    "score",
    "unique_names",
]


def __getattr__(name: str) -> Any:
    """Imports torch when a reward model is asked for: the processes of reward functions start without it."""
    if name != "RewardModel":
        raise AttributeError(f"module 'remax.rewards' has no attribute {name!r}")
    from remax.rewards.model import RewardModel

    return RewardModel


class Scores(NamedTuple):
    """Rewards of a number of completions, in their order; NaN where there is none."""

    total: list[float]
    """The weighted sum over the functions that apply."""
    by_function: dict[str, list[float]]
    """Each function's own rewards, unweighted."""
    num_failed: dict[str, int]
    """For how many completions each function failed (NaN or infinite); that it does not apply (None) is no failure."""


def score(functions: Sequence[RewardFunction], weights: Sequence[float], completions: Sequence[Completion]) -> Scores:
    """Returns r = sum_i w_i r_i of every completion.

    A function that returns None does not apply and is left out of the sum. A completion has no reward if no function
    applies, or if one failed (NaN or infinite): never a reward of 0, which would be learned from.

    Raises:
        UserError: a function cannot be used.
    """
    # A learned reward is asked about nothing, too: where it is sharded, all processes have to go through it.
    asked = [function for function in functions if completions or not isinstance(function, ProgrammedReward)]
    columns = [function(completions) if function in asked else [] for function in functions]
    total = [_total(values, weights) for values in zip(*columns, strict=True)] or [math.nan] * len(completions)
    names = unique_names(functions)
    by_function = {name: [_finite(value) for value in values] for name, values in zip(names, columns, strict=True)}
    num_failed = {
        name: sum(value is not None and not math.isfinite(value) for value in values)
        for name, values in zip(names, columns, strict=True)
    }
    return Scores(total, by_function, num_failed)


def _total(values: Sequence[float | None], weights: Sequence[float]) -> float:
    applying = [(weight, value) for weight, value in zip(weights, values, strict=True) if value is not None]
    return _finite(sum(weight * value for weight, value in applying) if applying else None)


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    """Returns the functions' names; a name that was there before gets _2, _3, ..."""
    names: list[str] = []
    for function in functions:
        name, number = function.name, 2
        while name in names:
            name, number = f"{function.name}_{number}", number + 1
        names.append(name)
    return names


def resolve_weights(weights: Sequence[float], num_functions: int) -> list[float]:
    """Returns one weight per function, 1 by default.

    Raises:
        UserError: there is another number of weights than of rewards.
    """
    if not weights:
        return [1.0] * num_functions
    if len(weights) != num_functions:
        raise UserError(
            f"--reward_weights has {len(weights)} numbers: there are {num_functions} rewards; set one for each, "
            "--reward_model first, then --reward_funcs in order, then --reward_url."
        )
    return list(weights)

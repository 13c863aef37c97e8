"""From the names on a command line to rewards."""

from collections.abc import Iterable
from typing import Any, Protocol

from remax.rewards.functions import CallableReward, load_reward_function
from remax.rewards.isolation import IsolatedReward
from remax.rewards.programmed import ProgrammedReward


class NamesRewards(Protocol):
    """Inputs of a command that scores completions."""

    @property
    def reward_model(self) -> str | None: ...
    @property
    def reward_funcs(self) -> list[str]: ...
    @property
    def reward_url(self) -> str | None: ...


def named_rewards(inputs: NamesRewards, timeout_seconds: float) -> list[Any]:
    """Returns what a command's flags name, in the order of --reward_weights: model (its name), functions, server.

    Functions begin to be imported, each in a process of its own; wait_until_ready tells whether that succeeds.

    Raises:
        UserError: a function or an address cannot be used.
    """
    rewards: list[Any] = [inputs.reward_model] if inputs.reward_model else []
    rewards += [named_function(spec, timeout_seconds) for spec in inputs.reward_funcs]
    if inputs.reward_url:
        from remax.rewards.remote import RemoteReward

        rewards.append(RemoteReward(inputs.reward_url, timeout_seconds=timeout_seconds))
    return rewards


class NamesGoldRewards(Protocol):
    """Inputs of a command whose evaluations are judged by rewards of their own."""

    @property
    def gold_reward_model(self) -> str | None: ...
    @property
    def gold_reward_funcs(self) -> list[str]: ...


def named_gold_rewards(inputs: NamesGoldRewards, timeout_seconds: float) -> list[Any]:
    """Returns what the flags of the gold rewards name, likewise."""
    rewards: list[Any] = [inputs.gold_reward_model] if inputs.gold_reward_model else []
    return rewards + [named_function(spec, timeout_seconds) for spec in inputs.gold_reward_funcs]


def wait_until_ready(rewards: Iterable[Any]) -> None:
    """Returns when the functions and servers among these rewards can be asked.

    Raises:
        UserError: one cannot.
    """
    for reward in rewards:
        if isinstance(reward, ProgrammedReward):
            reward.wait_until_ready()


def named_function(spec: str, timeout_seconds: float) -> CallableReward | IsolatedReward:
    """Returns a function that runs in a process of its own or, without a limit of time, in this one.

    Raises:
        UserError: the text names no function, or it cannot be imported.
    """
    return IsolatedReward(spec, timeout_seconds=timeout_seconds) if timeout_seconds else load_reward_function(spec)

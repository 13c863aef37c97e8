"""What critic-free methods subtract from the reward of a sample.

Legend: P prompts with k samples each. Rewards may be missing (NaN); where a baseline is NaN, the sample is left out.
Every one of these but group_mean leaves the gradient unbiased: given the prompt and the weights, the baseline of a
sample does not depend on that sample. State comes from past batches only, for the same reason.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from remax import estimators

DECAY = 0.9
"""Weight of the past against the newest batch in running estimates."""


class Baseline(Protocol):
    """Gives every sample its baseline; may learn from batches that are over."""

    def __call__(self, rewards: Tensor, greedy: Tensor) -> Tensor:
        """Returns the baselines [P, k] of rewards [P, k], greedy [P] being the rewards of the greedy completions."""
        ...

    def observe(self, rewards: Tensor, greedy: Tensor) -> None:
        """Takes a batch into account, for the batches after it."""
        ...

    def state_dict(self) -> dict[str, float]:
        """Returns what determines the baselines of the next batch."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from a state."""
        ...


class Stateless:
    """A baseline that is a function of the batch alone."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, rewards: Tensor, greedy: Tensor) -> Tensor:
        """Returns the baselines, [P, k]."""
        return self.function(rewards, greedy)

    def observe(self, rewards: Tensor, greedy: Tensor) -> None:
        """Learns nothing."""

    def state_dict(self) -> dict[str, float]:
        """Returns an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes an empty state."""


class MovingAverage:
    """The mean reward of past batches, newer ones weighing more; 0 before the first."""

    def __init__(self) -> None:
        self.total = self.weight = 0.0

    def __call__(self, rewards: Tensor, greedy: Tensor) -> Tensor:
        """Returns the baselines, [P, k], all equal."""
        return torch.full_like(rewards, self.total / self.weight if self.weight else 0.0)

    def observe(self, rewards: Tensor, greedy: Tensor) -> None:
        """Takes a batch into the average."""
        present = rewards[rewards.isfinite()]
        if len(present):
            self.total = DECAY * self.total + present.mean().item()
            self.weight = DECAY * self.weight + 1

    def state_dict(self) -> dict[str, float]:
        """Returns the running sums."""
        return {"total": self.total, "weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from a state."""
        self.total, self.weight = state["total"], state["weight"]


class Mixed:
    """(1 - alpha) leave-one-out + alpha greedy, alpha being what would have served past batches best.

    The residual r - b is d - alpha g with d = r - leave-one-out and g = greedy - leave-one-out, so the alpha of least
    mean square is E[d g] / E[g^2], here from running sums over past batches and kept in [0, 1]; 1/2 before the first.
    """

    def __init__(self) -> None:
        self.products = self.squares = 0.0

    @property
    def alpha(self) -> float:
        """The weight of the greedy reward."""
        return min(1.0, max(0.0, self.products / self.squares)) if self.squares else 0.5

    def __call__(self, rewards: Tensor, greedy: Tensor) -> Tensor:
        """Returns the baselines, [P, k]."""
        return (1 - self.alpha) * estimators.leave_one_out(rewards) + self.alpha * greedy.unsqueeze(-1)

    def observe(self, rewards: Tensor, greedy: Tensor) -> None:
        """Takes a batch into the sums."""
        others = estimators.leave_one_out(rewards)
        d, g = rewards - others, greedy.unsqueeze(-1) - others
        known = d.isfinite() & g.isfinite()
        self.products = DECAY * self.products + (d * g)[known].sum().item()
        self.squares = DECAY * self.squares + (g * g)[known].sum().item()

    def state_dict(self) -> dict[str, float]:
        """Returns the running sums."""
        return {"products": self.products, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from a state."""
        self.products, self.squares = state["products"], state["squares"]


MAKE_BASELINE: dict[str, Callable[[], Baseline]] = {
    "greedy": lambda: Stateless(lambda rewards, greedy: greedy.unsqueeze(-1).expand_as(rewards)),
    "leave_one_out": lambda: Stateless(lambda rewards, greedy: estimators.leave_one_out(rewards)),
    "mixed": Mixed,
    "none": lambda: Stateless(lambda rewards, greedy: torch.zeros_like(rewards)),
    "moving_average": MovingAverage,
    "group_mean": lambda: Stateless(lambda rewards, greedy: estimators.group_mean(rewards)),
}
"""By the value of --baseline."""


class GreedyRewards:
    """The rewards of greedy completions, renewed at every k-th visit of a prompt (--greedy_every).

    In between a prompt keeps its last one: a baseline of an older policy, which still does not depend on the sample.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.visits: dict[int, int] = {}
        self.rewards: dict[int, float] = {}

    def due(self, prompt_index: int) -> bool:
        """Whether this visit of the prompt needs a greedy completion."""
        return prompt_index not in self.rewards or self.visits[prompt_index] % self.every == 0

    def visit(self, prompt_index: int, reward: float | None) -> float:
        """Counts a visit, for which a greedy completion may have been drawn; returns the reward that holds for it."""
        if self.every == 1:
            assert reward is not None, "every visit draws a greedy completion"
            return reward
        self.visits[prompt_index] = self.visits.get(prompt_index, 0) + 1
        if reward is not None and math.isfinite(reward):
            self.rewards[prompt_index] = reward
        return self.rewards.get(prompt_index, math.nan)

    def state_dict(self) -> dict[str, dict[int, float]]:
        """Returns the visits and rewards of all prompts that were seen."""
        return {"visits": dict(self.visits), "rewards": dict(self.rewards)}

    def load_state_dict(self, state: dict[str, dict[int, float]]) -> None:
        """Goes on from a state."""
        self.visits = {index: int(number) for index, number in state["visits"].items()}
        self.rewards = dict(state["rewards"])

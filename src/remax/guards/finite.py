"""A loss or gradient that is not finite: a step with it would destroy the weights, so it is not taken.

The weights, the optimiser and its moments stay as they are; the schedule and the count of steps go on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class NotFinite(ArithmeticError):
    """An update was not taken; the weights are as they were. what: "loss" or "gradient"."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the {what} is not finite")
        self.what = what


@dataclass(frozen=True)
class Skipped:
    """An update that was not taken, and what it takes to do it again."""

    network: str
    """Whose: "policy" or "value"."""
    what: str
    """What is not finite: "loss" or "gradient"."""
    rows: Sequence[int]
    """The samples of the update, as rows of the step's record."""
    first: bool = True
    """Whether no other update of the step came before it."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """What the method worked out for these rows beside their advantages, [B, T] each."""

    @property
    def cause(self) -> str:
        """In words."""
        return f"the {'policy' if self.network == 'policy' else 'value model'}'s {self.what}"


class SkipCount:
    """How many steps were skipped, in all and in a row."""

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.num_skipped = 0
        self.in_a_row = 0

    def count(self, *, skipped: bool) -> None:
        """Takes a step into account."""
        self.num_skipped += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    @property
    def too_many(self) -> bool:
        """Whether the run has to stop."""
        return self.in_a_row > self.max_in_a_row

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next steps depend on."""
        return {"num_skipped": self.num_skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.num_skipped, self.in_a_row = state["num_skipped"], state["in_a_row"]

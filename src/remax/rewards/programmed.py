"""What rewards have in common that are computed by a user's code or by a server: they may fail, and may log."""

import abc
import warnings
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from remax.interfaces import Completion
from remax.untrusted import shown

FAILED = float("nan")
"""What a sample gets if its reward failed: None would mean "does not apply" and leave the other rewards to stand."""


class ProgrammedReward(abc.ABC):
    """Base of the rewards that are not models: a failed call gives no rewards, is counted, and is told once."""

    def __init__(self, name: str, timeout_seconds: float) -> None:
        """timeout_seconds: of one call; 0 for no limit."""
        self.name = name
        self.timeout_seconds = timeout_seconds
        self.trainer_state: Any = None
        """What functions get as trainer_state; the trainer sets it."""
        self.num_failures = 0
        """Completions without a reward because their call failed."""
        self.last_failure = ""
        """Why, of the latest one; whoever asks for rewards may clear it."""
        self.source_digest = ""
        """Of the file that its function comes from; empty where there is none."""
        self._told: set[Hashable] = set()
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._extra: dict[str, list[Any]] = defaultdict(list)

    @abc.abstractmethod
    def __call__(self, completions: Sequence[Completion]) -> list[float | None]:
        """Returns one reward per completion, in order; None where the reward does not apply, NaN where it failed.

        Raises:
            UserError: it cannot be used.
        """

    def wait_until_ready(self) -> None:  # noqa: B027
        """Returns when the reward can be asked.

        Raises:
            UserError: it cannot.
        """

    def pop_metrics(self) -> dict[str, float]:
        """Returns the mean of every metric that was logged since the last call."""
        metrics = {name: sum(values) / len(values) for name, values in self._metrics.items() if values}
        self._metrics.clear()
        return metrics

    def pop_extra(self) -> dict[str, list[Any]]:
        """Returns the columns that were logged since the last call, in the order of the completions."""
        extra = dict(self._extra)
        self._extra.clear()
        return extra

    def _log(self, metrics: Mapping[str, Sequence[float]], extra: Mapping[str, Sequence[Any]]) -> None:
        """Keeps what one call logged."""
        for name, values in metrics.items():
            self._metrics[name].extend(values)
        for column, values in extra.items():
            self._extra[column].extend(values)

    def _missing(self, number: int, reason: str, kind: Hashable) -> list[float | None]:
        """Returns what a failed call gives; the first of its kind is told."""
        self.num_failures += number
        self.last_failure = f"{self.name} {shown(reason, 300)}"
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(f"{self.last_failure}; its completions have no reward and are left out.", stacklevel=3)
        return [FAILED] * number

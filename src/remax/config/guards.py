"""Settings of what watches over a training: updates that would do harm, figures that tell of a run gone wrong."""

from dataclasses import dataclass
from typing import Literal

from remax.options import Options

AlarmAction = Literal["off", "warn", "stop"]


@dataclass(frozen=True)
class GuardOptions(Options):
    """Guards"""

    max_skipped_steps: int = 3
    """Steps in a row that may be skipped because their loss or gradient is not finite; one more stops the run, and with
    0 the first one does. What was skipped is kept in OUT/dumps for `remax replay`."""
    alarms: AlarmAction = "warn"
    """What happens when a bound below is crossed: nothing (off), a warning that names the last checkpoint (warn), or
    the run is saved and stopped (stop)."""
    alarm_window: int = 10
    """Steps that a figure is averaged over before it is compared with a bound; the first so many are the start."""
    max_kl: float = 50.0
    """Alarm when the KL to the reference is above this, in nats per sequence."""
    max_truncated: float = 0.9
    """Alarm when this fraction of the completions is cut by the length limit, and more than twice that of the start."""
    max_length_ratio: float = 3.0
    """Alarm when completions are this many times as long as at the start."""
    min_entropy_ratio: float = 0.1
    """Alarm when the entropy per token is below this fraction of that at the start."""
    gold_evaluations: int = 3
    """Alarm when over this many evaluations the reward rose and the gold reward fell, each by more than two standard
    errors."""

    def _check(self) -> None:
        self._require(self.max_skipped_steps >= 0, "max_skipped_steps", "no count is negative", "a number, or 0")
        self._require(self.alarm_window > 0, "alarm_window", "there is nothing to average", "1 or more")
        self._require(self.max_kl > 0, "max_kl", "every step would raise the alarm", "a positive number of nats")
        self._require(0 < self.max_truncated <= 1, "max_truncated", "there is no such fraction", "a number in (0, 1]")
        self._require(self.max_length_ratio > 1, "max_length_ratio", "the start is as long as that", "more than 1")
        self._require(0 <= self.min_entropy_ratio < 1, "min_entropy_ratio", "the start is no higher", "less than 1")
        self._require(self.gold_evaluations > 1, "gold_evaluations", "one evaluation shows no change", "2 or more")


@dataclass(frozen=True)
class ReplayConfig(Options):
    """Replay"""

    dump: str
    """A folder in the dumps of a run. It may stand without the flag: `remax replay OUT/dumps/step-000007`."""
    model: str | None = None
    """The policy that the run began with; by default the one that its settings name."""

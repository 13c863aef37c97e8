"""Settings of `remax doctor` beside those of `remax train`."""

from dataclasses import dataclass

from remax.options import Options


@dataclass(frozen=True)
class DoctorOptions(Options):
    """Checks"""

    pairs: str | None = None
    """Pairs that the reward model should rank: a file or a hub name with `chosen` and `rejected` (and `prompt`)."""
    num_pairs: int = 200
    """Pairs of --pairs that are scored, from its start."""
    num_prompts: int = 16
    """Prompts of --train_dataset that are completed, from its start: two samples and a greedy completion each."""
    json: str | None = None
    """File for the findings as JSON; by default they are only printed."""

    def _check(self) -> None:
        for name in ("num_pairs", "num_prompts"):
            self._require(getattr(self, name) > 0, name, "there is nothing to look at", "1 or more")

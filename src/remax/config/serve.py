"""Settings of `remax serve-reward`."""

from dataclasses import dataclass, field

from remax.config.groups import LONGEST_TIMEOUT_SECONDS
from remax.errors import UserError
from remax.options import Options


@dataclass(frozen=True)
class ServeInputs(Options):
    """Rewards"""

    model: str | None = None
    """A reward model with one label: a folder or a hub name, usually the output of `remax reward`. It may stand without
    the flag: `remax serve-reward MODEL`."""
    reward_funcs: list[str] = field(default_factory=list)
    """Reward functions as file.py:function; several may follow, or the flag may be repeated."""

    def _check(self) -> None:
        if not self.model and not self.reward_funcs:
            raise UserError(
                "neither --model nor --reward_funcs is set: there is nothing to serve; set a reward model, or "
                "file.py:function."
            )


@dataclass(frozen=True)
class ServeConfig(Options):
    """Server"""

    host: str = "127.0.0.1"
    """Address to listen on. One that other machines reach needs a token in the environment variable REMAX_REWARD_TOKEN,
    here and where the training runs."""
    port: int = 8000
    """Port to listen on; 0 for a free one, which is printed."""
    reward_weights: list[float] = field(default_factory=list)
    """Weights of the rewards in the sum that is served, --model first, then --reward_funcs in order; by default all
    1."""
    reward_batch_size: int = 64
    """Completions scored at once by the reward model."""
    reward_timeout_seconds: float = 300.0
    """Longest call of a reward function, as in `remax train`; it should end before the client gives up."""

    def _check(self) -> None:
        self._require(0 <= self.port < 65536, "port", "there is no such port", "a number below 65536, or 0")
        self._require(self.reward_batch_size > 0, "reward_batch_size", "nothing would be processed", "1 or more")
        self._require(
            0 <= self.reward_timeout_seconds <= LONGEST_TIMEOUT_SECONDS,
            "reward_timeout_seconds",
            "no call can be timed so",
            f"seconds up to {LONGEST_TIMEOUT_SECONDS}, or 0 for no limit",
        )

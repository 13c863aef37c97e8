"""What the updates of all methods have in common when something goes wrong in them."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from remax.components import Components
from remax.config import ReMaxConfig
from remax.guards.finite import Skipped
from remax.metrics import StepRecord

T = TypeVar("T")
OnSkip = Callable[[StepRecord, Skipped], None]
"""Called when an update is not taken, while the weights are what they were at its start."""


def ignore(record: StepRecord, skipped: Skipped) -> None:
    """Does nothing: an OnSkip for whoever takes no updates."""


def max_tokens(parts: Components, args: ReMaxConfig) -> int:
    """Returns the most tokens in a micro-batch: those of --micro_batch_tokens, or fewer if memory did not suffice."""
    return parts.memory.size("micro_batch_tokens", args.micro_batch_tokens)


def within_memory(
    parts: Components, args: ReMaxConfig, record: StepRecord, rows: Sequence[int], work: Callable[[], T]
) -> T:
    """Returns work(), which goes through these rows in micro-batches of `max_tokens`.

    Where memory does not suffice, it is done again in smaller ones, on the record as it was before.

    Raises:
        GuardStop: memory does not suffice for the longest row.
    """
    samples = record.rollout.samples
    longest = max(len(samples[row].prompt.token_ids) + len(samples[row].token_ids) for row in rows)
    shown = record.shown()

    def attempt(size: int) -> T:
        record.forget(shown)
        return work()

    return parts.memory.run(
        "micro_batch_tokens", args.micro_batch_tokens, attempt, whole=len(rows) * longest, smallest=longest
    )

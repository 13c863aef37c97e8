"""Which of transformers' callbacks a training can call."""

from collections.abc import Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from remax.errors import UserError
from remax.untrusted import shown


def checked_callbacks(callbacks: Sequence[Any] | None) -> list[TrainerCallback]:
    """Returns the callbacks; as in transformers, a class stands for an object of it.

    Raises:
        UserError: one is no callback, or is EarlyStoppingCallback.
    """
    made = [own() if isinstance(own, type) else own for own in callbacks or []]
    for own in made:
        if isinstance(own, EarlyStoppingCallback):
            raise UserError(
                "callbacks has an EarlyStoppingCallback: it looks for settings and metrics of transformers' Trainer "
                "(eval_loss, where evaluations here have eval/reward), so it would never stop a run; pass a "
                "TrainerCallback whose on_evaluate sets control.should_training_stop (docs/from-trl.md has one)."
            )
        if not isinstance(own, TrainerCallback):
            raise UserError(
                f"callbacks has {shown(own, spelled=repr)}: that is no transformers.TrainerCallback, so it cannot be "
                "called; derive it from that class."
            )
    return made

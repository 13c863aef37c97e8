"""Models, rewards and data of every command: what has no default."""

from dataclasses import dataclass, field

from remax.errors import UserError
from remax.options import Options


@dataclass(frozen=True)
class TrainInputs(Options):
    """Models, rewards and data"""

    model: str
    """The policy to train: a folder or a hub name, usually the output of `remax sft`."""
    train_dataset: str
    """Prompts: a json, jsonl, parquet or csv file or a hub name, with a column `prompt` of texts or messages."""
    reward_model: str | None = None
    """A reward model with one label, usually the output of `remax reward`."""
    reward_funcs: list[str] = field(default_factory=list)
    """Reward functions as file.py:function; several may follow, or the flag may be repeated."""
    eval_dataset: str | None = None
    """Held-out prompts, for evaluations and the best model."""

    def _check(self) -> None:
        if not self.reward_model and not self.reward_funcs:
            raise UserError(
                "neither --reward_model nor --reward_funcs is set: there is nothing to maximise; set a model, or "
                "file.py:function."
            )


@dataclass(frozen=True)
class StageInputs(Options):
    """Model and data"""

    model: str
    """The model to start from: a folder or a hub name."""
    train_dataset: str
    """For `sft`: texts (`text`), `prompt` and `completion`, or `messages`; for `reward` and `dpo`: `chosen`
    and `rejected`."""
    eval_dataset: str | None = None
    """Held-out data of the same form."""


@dataclass(frozen=True)
class EvaluateInputs(Options):
    """Models, rewards and data"""

    model: str
    """The policy to evaluate: a folder or a hub name."""
    eval_dataset: str
    """Held-out prompts: a file or a hub name, with a column `prompt`."""
    reward_model: str | None = None
    """A reward model with one label."""
    reward_funcs: list[str] = field(default_factory=list)
    """Reward functions as file.py:function; several may follow, or the flag may be repeated."""
    ref_model: str | None = None
    """The model that KL is measured against, usually the policy before training; without it no KL is reported."""
    perplexity_dataset: str | None = None
    """Texts whose perplexity is reported: `text`, or `prompt` with `completion` or `chosen`; by default --eval_dataset
    if it has such columns."""
    eval_split: str = "test"
    """Split of the datasets, when they have several."""


@dataclass(frozen=True)
class ChatInputs(Options):
    """Model"""

    model: str
    """The model to talk to: a folder or a hub name."""

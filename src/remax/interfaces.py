"""The few types that rollout engines, rewards and the trainer exchange.

Ragged data stay Python lists; whoever needs a batch pads it for its own device and its own row order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # The processes of reward functions start without it.
    from torch import Tensor

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready to be continued."""

    index: int
    """Row in the dataset; with the seed it keys the sampling noise, so it must not depend on the batch."""
    content: str | list[Message]
    """As reward functions see it: a text (standard format) or messages (conversational format)."""
    token_ids: list[int]
    """As the policy sees it, with BOS or chat template."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The dataset's other columns, passed to reward functions by name."""


@dataclass(frozen=True)
class Sampling:
    """The distribution that completions are drawn from. Greedy rows ignore temperature, top_p and top_k."""

    max_completion_length: int
    eos_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""

    @property
    def truncates(self) -> bool:
        """Whether some tokens get probability zero."""
        return self.top_p < 1.0 or self.top_k > 0


@dataclass
class Completion:
    """One completion of one prompt."""

    prompt: Prompt
    sample_index: int
    """Which sample of its prompt, from 0; -1 for the greedy completion."""
    token_ids: list[int]
    """Through the first EOS inclusive; never padded."""
    logprobs: list[float]
    """Log-probability of each token under the distribution it was drawn from (greedy rows: temperature 1)."""
    truncated: bool
    """Cut by the length limit: the last token is not an EOS."""
    text: str = ""
    """Decoded without special tokens; set by whoever holds the tokenizer, engines leave it empty."""

    @property
    def content(self) -> str | list[Message]:
        """In the format of its prompt: a text, or one assistant message."""
        if isinstance(self.prompt.content, str):
            return self.text
        return [{"role": "assistant", "content": self.text}]


@dataclass(frozen=True)
class Rollout:
    """What one call of an engine returns."""

    samples: list[Completion]
    """num_samples consecutive rows per prompt, in the order of the prompts."""
    greedy: list[Completion]
    """One row per prompt for which one was asked, in the order of the prompts."""


class RolloutEngine(Protocol):
    """Draws completions. Knows token ids only, no text."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        num_samples: int,
        greedy: bool | Sequence[bool],
        seed: int,
        step: int,
    ) -> Rollout:
        """Returns num_samples sampled and, if asked, one greedy completion of every prompt.

        greedy: for all prompts alike, or one value per prompt. A sampled token is a function of (seed, step,
        prompt.index, sample index, position) and of the weights alone, whatever else is in the batch.
        """
        ...


@runtime_checkable
class EngineWithWeights(Protocol):
    """What a RolloutEngine has beside if its weights are not the policy's own tensors."""

    def take(self, weights: "Iterable[tuple[str, Tensor]]", version: int) -> None:
        """Takes the policy's weights for the rollouts that come; called before each of them, in every process.

        weights: by the names that they are saved under, adapters merged; each is made when it is asked for, and all of
        them have to be, by every process. version: of the weights, which are the same while it is the same.
        """
        ...

    def release(self) -> None:
        """Gives back what only rollouts need; called after each of them."""
        ...


@runtime_checkable
class ForeignEngine(EngineWithWeights, Protocol):
    """An EngineWithWeights that is another program: the log-probabilities it gives are not exactly those of training.

    What they differ by is measured, corrected for and limited.
    """

    @property
    def program(self) -> str:
        """Its name, for messages."""
        ...


class RewardFunction(Protocol):
    """Scores completions."""

    name: str

    def __call__(self, completions: Sequence[Completion]) -> list[float | None]:
        """Returns one reward per completion, in order; None or NaN where there is none."""
        ...

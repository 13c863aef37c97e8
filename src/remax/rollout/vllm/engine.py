"""The rollout engine whose tokens vLLM draws: which rows, with which seeds, under which weights."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from remax.errors import UserError
from remax.interfaces import Completion, Prompt, Rollout, Sampling

Weights = Iterator[tuple[str, Tensor]]
COMPARED = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings"),
)
"""Of a model's config: what has to be the same for its weights to fit and its tokens to mean the same."""


@dataclass(frozen=True)
class Request:
    """What vLLM shall draw, in one list."""

    prompts: list[list[int]]
    rows: list[tuple[int, int | None]]
    """Which prompt, and the seed of its noise; None for the greedy completion."""
    sampling: Sampling
    """Of the rows that are not greedy."""
    stamp: str
    """Which weights it has to be drawn with."""


class Drawn(NamedTuple):
    """The tokens of one row, through the first EOS, and their log-probabilities."""

    token_ids: list[int]
    logprobs: list[float]


class Backend(Protocol):
    """vLLM, wherever it runs."""

    name: str
    """For messages."""

    def holds(self) -> str:
        """Returns the stamp of the weights it holds, "" for others than were ever loaded."""
        ...

    def load(self, weights: Weights, stamp: str) -> None:
        """Takes all the weights, and forgets what it computed with others."""
        ...

    def draw(self, request: Request) -> list[Drawn]:
        """Returns one result per row, in order.

        Raises:
            GuardStop: it holds other weights than the request wants, or does not answer.
        """
        ...

    def rest(self) -> None:
        """Gives back memory until the next load, if that is wanted."""
        ...

    def close(self) -> None:
        """Ends a vLLM that belongs to this process alone."""
        ...


class VLLMEngine:
    """Draws completions with vLLM. Its weights are copies, under a stamp: the run and the version of the policy.

    Every row is a request of its own with its own sampling parameters, so that greedy and sampled rows share batches.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        vocab_size: int,
        run_id: str,
        sends: bool,
        together: Callable[[Callable[[], None]], None] = lambda work: work(),
    ) -> None:
        """vocab_size: of the model; vLLM itself draws for tokens that do not exist.

        run_id: the same in all processes, and in no other run. sends: whether this process pushes the weights.
        together: does work that all processes do, and returns when all have done it; if it fails in one, then in all.
        """
        self._backend, self._run_id, self._sends, self._together = backend, run_id, sends, together
        self._vocab_size, self._stamp = vocab_size, ""

    @property
    def program(self) -> str:
        """Which program draws, for messages: its log-probabilities are not exactly those of training."""
        return self._backend.name

    def take(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Pushes the weights, unless vLLM holds this version already: after a restart it holds others.

        Raises:
            GuardStop: the server does not answer.
            UserError: vLLM cannot take such weights.
        """
        self._stamp = f"{self._run_id}-{version}"
        remaining = iter(weights)

        def push() -> None:
            try:
                if self._sends and self._backend.holds() != self._stamp:
                    self._backend.load(remaining, self._stamp)
            finally:
                for _ in remaining:  # Every process has to ask for all of them, whatever became of the others.
                    pass

        self._together(push)

    def release(self) -> None:
        """Lets vLLM give back its memory until the next rollout."""
        self._backend.rest()

    def close(self) -> None:
        """Ends a vLLM that belongs to this process, which cannot draw any more; a server goes on."""
        self._backend.close()

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
        """Returns completions, see RolloutEngine.

        Raises:
            GuardStop: the server does not answer, or lost the weights.
            UserError: a prompt has a token that the model has not.
        """
        for prompt in prompts:
            if max(prompt.token_ids) >= self._vocab_size:
                raise UserError(
                    f"--train_dataset or --eval_dataset has a prompt with token {max(prompt.token_ids)} (row "
                    f"{prompt.index}): the model knows {self._vocab_size} tokens, so its tokenizer is another one's; "
                    "set a --model with its own."
                )
        wanted = [greedy] * len(prompts) if isinstance(greedy, bool) else list(greedy)
        keys = [(i, sample) for i in range(len(prompts)) for sample in range(num_samples)]
        keys += [(i, -1) for i, also in enumerate(wanted) if also]
        rows = [(i, None if k < 0 else request_seed(seed, step, prompts[i].index, k)) for i, k in keys]
        request = Request([prompt.token_ids for prompt in prompts], rows, sampling, self._stamp)
        drawn = self._backend.draw(request) if rows else []
        completions = [
            Completion(prompts[i], k, ids, logprobs, truncated=ids[-1] not in sampling.eos_token_ids)
            for (i, k), (ids, logprobs) in zip(keys, drawn, strict=True)
        ]
        num_sampled = len(prompts) * num_samples
        return Rollout(completions[:num_sampled], completions[num_sampled:])


def request_seed(seed: int, step: int, prompt_index: int, sample_index: int) -> int:
    """Returns the seed of one row's noise, of 63 bits: a function of what is drawn, not of the batch."""
    key = f"{seed} {step} {prompt_index} {sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def describe_model(config: Any) -> dict[str, Any]:
    """Returns of a model's config what client and server have to have in common; what it lacks is left out."""
    text = config.get_text_config()
    known = {name: getattr(text, name, None) for name in COMPARED}
    return {name: value for name, value in known.items() if isinstance(value, bool | int | str)}

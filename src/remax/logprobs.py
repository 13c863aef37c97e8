"""Log-probabilities of completions under a causal language model, in float32 and without B x T x V logits.

Legend: B rows, L tokens of prompt and completion, N completion tokens of a micro-batch, H hidden size, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from remax import head
from remax.batching import Batch
from remax.interfaces import Sampling
from remax.zero import is_divided, most_of_all


def warp_logits(logits: Tensor, sampling: Sampling, keep: Tensor | None = None) -> Tensor:
    """Returns logits [N, V] of the distribution that is sampled from: temperature, then top-k, then top-p.

    Tokens outside the truncated support get -inf. keep [N] names one token per row that stays in the support
    whatever happens: scoring passes the token that was sampled, since a near-tie at the border of the nucleus may
    fall the other way in another batch.
    """
    logits = _upcast(logits)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if not sampling.truncates:
        return logits
    removed = torch.zeros_like(logits, dtype=torch.bool)
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        removed = logits < threshold
    if sampling.top_p < 1.0:
        kept = logits.masked_fill(removed, -torch.inf)
        values, order = kept.sort(dim=-1, descending=True)
        probs = values.softmax(dim=-1)
        # A token stays while the mass before it is below top_p, so the likeliest always stays.
        outside = (probs.cumsum(dim=-1) - probs) >= sampling.top_p
        removed = removed | outside.gather(-1, order.argsort(dim=-1))
    if keep is not None:
        removed = removed.scatter(-1, keep.unsqueeze(-1), False)
    return logits.masked_fill(removed, -torch.inf)


class TokenStatistics(NamedTuple):
    """What one forward pass tells of the completion tokens of a batch: [B, T] each, 0 outside the completions."""

    logprobs: Tensor
    """log pi(y_t | x, y_<t) under the distribution that is sampled, float32 or better, differentiable."""
    entropies: Tensor
    """Entropy of that distribution at each position, in nats, detached."""
    kl: Tensor
    """KL(pi || reference) at each position, exact over the vocabulary, differentiable; 0 without a reference."""


class CompletionScorer(nn.Module):
    """A causal language model as a function from completions to the log-probabilities of their tokens.

    Hidden states are gathered at the completions before the language-model head, and the head runs over chunks that, if
    they are several, the backward pass computes again: no tensor has the size of all completion tokens times the
    vocabulary.
    """

    def __init__(self, model: Any, *, adapters: bool = True, chunk_elements: int | None = None) -> None:
        """adapters: False switches a PEFT model's adapters off.

        chunk_elements: most logits alive at once; by default those of the function of that name.
        """
        super().__init__()
        self.model = model
        self.adapters = adapters
        self.chunk_elements = chunk_elements
        self.through: Callable[..., Any] | None = None
        """Where weights are sharded, the forward that gathers them: its own, or that of the scorer that is trained."""
        self.knows_head = _knows_head(_unwrapped(model))
        self.has_plain_head = self.knows_head and _is_plain(_unwrapped(model))

    @property
    def _no_split_modules(self) -> Any:
        """The layers that are sharded each by itself, as Accelerate asks for them."""
        return _unwrapped(self.model)._no_split_modules

    def forward(
        self,
        batch: Batch,
        sampling: Sampling,
        reference: "CompletionScorer | None" = None,
        logprobs_of: "CompletionScorer | None" = None,
    ) -> Any:
        """Returns the statistics of the batch's completions; given a reference, the exact KL to it too.

        logprobs_of: whose `logprobs` are returned instead, with the weights that are gathered here.
        """
        if logprobs_of is not None:
            return logprobs_of._logprobs(batch, sampling)
        states = self.states(batch)
        targets = batch.targets
        if reference is None and self._takes_fast_head(sampling):
            logprobs, entropies = head.head_logprobs(
                _unwrapped(self.model).get_output_embeddings(),
                *(states, targets),
                temperature=sampling.temperature,
                chunk_size=self._chunk_size(),
            )
            return TokenStatistics(*map(batch.scatter, (logprobs, entropies, torch.zeros_like(entropies))))
        ref_states = targets if reference is None else reference.states(batch).detach()

        def statistics(states: Tensor, targets: Tensor, ref_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = warp_logits(self.logits(states), sampling, keep=targets)
            logprobs = logits.log_softmax(dim=-1)
            token_logprobs = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            entropies = torch.special.entr(logprobs.detach().exp()).sum(-1)
            if reference is None:
                return token_logprobs, entropies, torch.zeros_like(entropies)
            with torch.no_grad():
                ref_logprobs = warp_logits(reference.logits(ref_states), untruncated(sampling)).log_softmax(dim=-1)
            # Outside the policy's support the log-ratio is -inf and its probability 0: such tokens add nothing.
            log_ratios = (logprobs - ref_logprobs).masked_fill(logprobs == -torch.inf, 0.0)
            return token_logprobs, entropies, (logprobs.exp() * log_ratios).sum(-1)

        columns = self._in_chunks(statistics, states, targets, ref_states)
        return TokenStatistics(*map(batch.scatter, columns))

    def _takes_fast_head(self, sampling: Sampling) -> bool:
        # DeepSpeed gathers weights for the backward passes of modules alone.
        return self.has_plain_head and not sampling.truncates and not self._has_divided_head()

    def _has_divided_head(self) -> bool:
        head = _unwrapped(self.model).get_output_embeddings()
        return head is not None and is_divided(head.weight)

    @torch.no_grad()
    def logprobs(self, batch: Batch, sampling: Sampling) -> Tensor:
        """Returns the first of those statistics alone, [B, T] detached: what a reference is asked for."""
        if self.through is None:
            return self._logprobs(batch, sampling)
        gathered: Tensor = self.through(batch, sampling, logprobs_of=self)
        return gathered

    def _logprobs(self, batch: Batch, sampling: Sampling) -> Tensor:

        def token_logprobs(states: Tensor, targets: Tensor) -> tuple[Tensor]:
            logprobs = warp_logits(self.logits(states), sampling, keep=targets).log_softmax(dim=-1)
            return (logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1),)

        (column,) = self._in_chunks(token_logprobs, self.states(batch), batch.targets)
        return batch.scatter(column)

    def states(self, batch: Batch) -> Tensor:
        """Returns what the head needs to predict the N completion tokens: hidden states [N, H].

        If the model's head is not a plain one, its logits [N, V] take the place of the hidden states.
        """
        with self._adapters():
            outputs = self._body()(input_ids=batch.input_ids, use_cache=False)  # No mask: see Batch.
        states = outputs.last_hidden_state if self.knows_head else outputs.logits
        selected: Tensor = states[:, :-1][batch.target_mask]
        return selected

    def _body(self) -> Any:
        """Returns the module that `states` runs."""
        return _unwrapped(self.model).base_model if self.knows_head else self.model

    def logits(self, states: Tensor) -> Tensor:
        """Returns the next-token logits [n, V] of n of those states."""
        if not self.knows_head:
            return states
        with self._adapters():
            return _head(_unwrapped(self.model), states)

    def _adapters(self) -> contextlib.AbstractContextManager[None]:
        if self.adapters:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[None] = self.model.disable_adapter()
        return context

    def _in_chunks(self, function: Callable[..., tuple[Tensor, ...]], *columns: Tensor) -> list[Tensor]:
        """Applies a row-wise function to chunks of rows; with more than one, the backward pass recomputes them."""
        size = self._chunk_size()
        if self._has_divided_head():  # Every call of the head gathers it: all processes have to make as many.
            number = most_of_all(max(1, math.ceil(len(columns[0]) / size)), columns[0].device)
            pieces = list(zip(*(torch.tensor_split(column, number) for column in columns), strict=True))
        else:
            pieces = list(zip(*(torch.split(column, size) for column in columns), strict=True))
        if len(pieces) == 1:
            return list(function(*columns))
        results = [checkpoint(function, *piece, use_reentrant=False) for piece in pieces]
        return [torch.cat(column) for column in zip(*results, strict=True)]

    def _chunk_size(self) -> int:
        elements = self.chunk_elements or chunk_elements(on_gpu=self.model.device.type == "cuda")
        return max(1, elements // int(_unwrapped(self.model).config.get_text_config().vocab_size))


def chunk_elements(*, on_gpu: bool) -> int:
    """Returns the most logits that are alive at once: 64 MB of float32 on a CPU, 256 MB on a GPU.

    Every chunk reads the whole head, so a GPU, which multiplies faster than it reads, wants more rows in one.
    """
    return 2**26 if on_gpu else 2**24


def untruncated(sampling: Sampling) -> Sampling:
    """Returns the same temperature over all tokens: what the reference takes, so that no log-ratio is infinite."""
    return replace(sampling, top_p=1.0, top_k=0)


def _head(model: Any, states: Tensor) -> Tensor:
    """Applies the language-model head with the scalings that model families put behind it."""
    config = model.config.get_text_config()
    logits: Tensor = model.get_output_embeddings()(states)
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    if softcap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and 3
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def _is_plain(model: Any) -> bool:
    """Whether the logits are one matrix times the states: no bias, no adapter, and none of `_head`'s scalings."""
    config = model.config.get_text_config()
    scalings = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    return head.is_plain(model.get_output_embeddings()) and not any(getattr(config, name, None) for name in scalings)


@torch.no_grad()
def _knows_head(model: Any) -> bool:
    """Whether `_head` gives the model's own logits; tried on four tokens, since a config cannot tell."""
    if model.get_output_embeddings() is None:
        return False
    was_training = model.training
    model.eval()
    try:
        device = model.get_input_embeddings().weight.device
        input_ids = torch.arange(4, device=device).unsqueeze(0)
        own = model(input_ids=input_ids, use_cache=False).logits
        ours = _head(model, model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state)
        return own.shape == ours.shape and torch.allclose(own, ours, rtol=1e-4, atol=1e-4)
    finally:
        model.train(was_training)


def _unwrapped(model: Any) -> Any:
    """Returns the transformers model inside a PEFT model; its layers carry the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _upcast(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

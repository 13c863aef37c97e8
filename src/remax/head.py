"""Log-probabilities of tokens behind a plain linear head, with a backward pass of its own: no large tensor is kept.

Autograd with recomputation gives the same numbers, but holds several [n, V] tensors at once, makes the entropies again
and one [V, H] gradient per chunk. Here a chunk's logits become its gradient in place, and the weight's gradient is
added up: where there is one of an earlier micro-batch already, in place.

Legend: N completion tokens, n of them in a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_adds_to_grad: ContextVar[bool] = ContextVar("_adds_to_grad", default=False)


@contextmanager
def gradients_in_place() -> Iterator[None]:
    """Within it, backward passes add to the gradient of the head's weight in place, instead of making another one.

    For whoever calls backward() on losses that are made here, in one process: torch.autograd.grad would not see what is
    added. Weights with hooks on their gradient are left out.
    """
    token = _adds_to_grad.set(True)
    try:
        yield
    finally:
        _adds_to_grad.reset(token)


def is_plain(head: Any) -> bool:
    """Whether a head is one matrix and nothing else: no bias, no adapter, no hook that changes what it returns."""
    if type(head) is not nn.Linear or "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return False
    return head.bias is None and type(head.weight) is nn.Parameter


def head_logprobs(
    head: nn.Linear, states: Tensor, targets: Tensor, *, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Returns the log-probabilities of the targets, [N] differentiable, and the entropies, [N].

    Both are of softmax(head(states) / temperature), for states [N, H] and targets [N].
    """
    logprobs, entropies = _HeadLogprobs.apply(states, head.weight, targets, head, temperature, chunk_size)  # type: ignore[no-untyped-call]
    return logprobs, entropies


class _HeadLogprobs(torch.autograd.Function):
    """d logprob(y) / d logits = (onehot(y) - softmax(logits / T)) / T."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, head: nn.Linear, temperature: float, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        in_place = _adds_to_grad.get() and not _is_watched(head.weight)
        ctx.parameter = head.weight if in_place else None  # Now: backward may run in another thread.
        ctx.dtype = states.dtype
        pieces, kept = [], None
        for own, chosen in zip(torch.split(states, chunk_size), torch.split(targets, chunk_size), strict=True):
            kept = None  # Before the next chunk is made: two chunks at once would be twice the memory.
            piece, kept = _forward_chunk(ctx, head, own, chosen)
            pieces.append(piece)
        logprobs, entropies = (torch.cat(column) for column in zip(*pieces, strict=True))
        # One chunk's log-probabilities are small enough to be kept; those of several are made again.
        ctx.save_for_backward(states, weight, targets, kept if len(pieces) == 1 else None)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, targets, logprobs = ctx.saved_tensors
        cast = weight.to(ctx.dtype)
        wants_states, wants_weight = ctx.needs_input_grad[:2]
        d_states = torch.empty_like(states) if wants_states else None
        in_place = ctx.parameter is not None and wants_weight
        if in_place and ctx.parameter.grad is None:
            ctx.parameter.grad = torch.zeros_like(weight)
        d_weight = ctx.parameter.grad if in_place else torch.zeros_like(weight) if wants_weight else None
        gradient = gradient / ctx.temperature
        for start in range(0, len(targets), ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            own = states[part].to(ctx.dtype)
            d_logits = _backward_chunk(ctx, cast, own, targets[part], gradient[part], logprobs)
            if d_states is not None:
                d_states[part] = d_logits @ cast
            if d_weight is not None and d_weight.dtype == ctx.dtype:
                d_weight.addmm_(d_logits.T, own)
            elif d_weight is not None:
                d_weight += d_logits.T @ own
            del d_logits  # Before the next chunk's is made.
        return d_states, None if in_place else d_weight, None, None, None, None


def _forward_chunk(ctx: Any, head: nn.Linear, states: Tensor, targets: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Returns log-probabilities of the targets and entropies, [n] each, and all log-probabilities [n, V]."""
    logits = head(states)
    ctx.dtype = logits.dtype  # Autocast's, which is not there any more in the backward pass.
    logprobs = _scaled(logits, ctx.temperature).log_softmax(-1)
    del logits
    return (_at(logprobs, targets), -logprobs.exp().mul_(logprobs).sum(-1)), logprobs


def _backward_chunk(
    ctx: Any, weight: Tensor, states: Tensor, targets: Tensor, gradient: Tensor, logprobs: Tensor | None
) -> Tensor:
    """Returns the gradient of the logits, [n, V]; logprobs [n, V], if they were kept, are not computed again."""
    probs = logprobs.exp() if logprobs is not None else _scaled(states @ weight.T, ctx.temperature).softmax(-1)
    d_logits = probs.neg_()
    d_logits.scatter_add_(-1, targets.unsqueeze(-1), d_logits.new_ones(len(targets), 1))
    return d_logits.mul_(gradient.unsqueeze(-1)).to(ctx.dtype)


def _is_watched(weight: Tensor) -> bool:
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Returns logits / temperature in float32 or better, as warp_logits has it."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1 else logits / temperature


def _at(values: Tensor, columns: Tensor) -> Tensor:
    return values.gather(-1, columns.unsqueeze(-1)).squeeze(-1)

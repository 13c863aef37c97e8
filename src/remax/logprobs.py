"""Log-probabilities of completions under a causal language model, in float32 and without B x T x V logits.

Legend: B rows, L tokens of prompt and completion, N completion tokens of a micro-batch, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from remax.interfaces import Sampling


def warp_logits(logits: Tensor, sampling: Sampling, keep: Tensor | None = None) -> Tensor:
    """Returns logits [N, V] of the distribution that is sampled from: temperature, then top-k, then top-p.

    Tokens outside the truncated support get -inf. keep [N] names one token per row that stays in the support
    whatever happens: scoring passes the token that was sampled, since a near-tie at the border of the nucleus may
    fall the other way in another batch.
    """
    logits = logits.float() / sampling.temperature
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

"""Which token comes next: the argmax for greedy rows, a draw from the warped distribution for sampled ones.

Legend: N rows, of which the first S are sampled and the others greedy, V vocabulary.
"""

import torch
from torch import Tensor

from remax.interfaces import Sampling
from remax.logprobs import warp_logits


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the next token of each row and its log-probability, both [N].

    logits [N, V] of the model, uniform [S] float64. Greedy rows ignore the sampling's warping.
    """
    num_sampled = len(uniform)
    logprobs = warp_logits(logits[:num_sampled].float(), sampling).log_softmax(-1)
    drawn = draw(logprobs, uniform)
    drawn_logprob = logprobs.gather(-1, drawn[:, None])[:, 0]
    if num_sampled == len(logits):
        return drawn, drawn_logprob
    others = logits[num_sampled:].float()
    likeliest = others.argmax(-1)
    likeliest_logprob = others.gather(-1, likeliest[:, None])[:, 0] - others.logsumexp(-1)
    return torch.cat([drawn, likeliest]), torch.cat([drawn_logprob, likeliest_logprob])


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Returns per row the first token whose cumulative probability exceeds the uniform, [S].

    Probabilities are integers of unit 2^-52: their sum is exact in whatever order a device adds, so it never steps
    up at a token of probability 0, and the last step always exceeds uniform * sum.
    """
    cumulative = logprobs.exp().mul_(2.0**52).long().cumsum_(-1)
    threshold = (uniform * cumulative[:, -1]).long()
    token = torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]
    # Only NaN logits get here with no step left; their log-probability stays NaN, for the trainer to see.
    return token.clamp(max=logprobs.shape[-1] - 1)

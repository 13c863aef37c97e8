"""The mathematics of ReMax as pure tensor functions: no model, no I/O, nothing of ours imported.

    gradient = E_x E_{y~pi} [ sum_t grad log pi(y_t | x, y_<t) G_t ],
    G_t = gamma^(T-t) (r(x,y) - r(x,y*)) - beta K_t

(Li et al., arXiv 2310.10505, Algorithm 1 and Section 4), where y* is the greedy completion and K_t the KL term.

Legend: B sampled completions, T tokens of the longest one; masks are True at the tokens of a completion, its EOS
included. Whatever stands in masked-out places has no effect and gets no gradient.
"""

from typing import Literal

import torch
from torch import Tensor


def advantages(
    rewards: Tensor, baselines: Tensor, clip: float | None = None, clip_mode: Literal["raw", "difference"] = "raw"
) -> Tensor:
    """Returns r(x, y) - r(x, y*), [B], from the rewards of the samples and of their prompts' greedy completions.

    raw: the reward is replaced by clip(r, -c, c), for sample and baseline alike. difference: clip(r - r*, -c, c), which
    the authors' code does with c = 5.
    """
    if clip is None:
        return rewards - baselines
    if clip_mode == "raw":
        return rewards.clamp(-clip, clip) - baselines.clamp(-clip, clip)
    return (rewards - baselines).clamp(-clip, clip)


def kl_in_return(
    log_ratios: Tensor, mask: Tensor, mode: Literal["to_go", "one_step", "loss", "none"] = "to_go"
) -> Tensor:
    """Returns K_t, [B, T], from log pi(y_t) - log pi_ref(y_t), [B, T].

    to_go: sum of the log-ratios from t on. The terms before t do not depend on y_t, so leaving them out changes no
    expectation: this is the unbiased gradient of r - beta KL(pi || pi_ref) over whole sequences.
    one_step: the log-ratio at t alone, as in the authors' code: its expectation is the gradient of each position's
    KL with the prefix held fixed.
    loss, none: 0, the KL is a term of the loss, or there is none.
    """
    log_ratios = log_ratios.masked_fill(~mask, 0.0)
    if mode == "to_go":
        return log_ratios.flip(-1).cumsum(-1).flip(-1).masked_fill(~mask, 0.0)
    if mode == "one_step":
        return log_ratios
    return torch.zeros_like(log_ratios)


def returns(advantages: Tensor, kl: Tensor, mask: Tensor, *, beta: float, gamma: float = 1.0) -> Tensor:
    """Returns G_t = gamma^(T_i - t) A_i - beta K_t, [B, T], t = 0..T_i-1, from A [B] and K [B, T]; no gradient.

    T_i is the length of completion i, so its last token's advantage is discounted once (the authors use 0.99).
    """
    tokens_left = mask.flip(-1).cumsum(-1).flip(-1).to(advantages.dtype)
    result = gamma**tokens_left * advantages.unsqueeze(-1) - beta * kl
    return result.masked_fill(~mask, 0.0).detach()


def k2(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Returns the KL term for the loss by the k2 estimator, (log pi - log pi_ref)^2 / 2 per token, [B, T].

    On-policy its gradient equals that of KL(pi || pi_ref) at each position in expectation; that of the better known
    k3 does not: it is the gradient of KL(pi_ref || pi).
    """
    return (0.5 * (logprobs - ref_logprobs.detach()) ** 2).masked_fill(~mask, 0.0)


def policy_loss(logprobs: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Returns the sum over all tokens of -G_t log pi(y_t), a scalar whose gradient is minus ReMax's, unnormalised."""
    return -(returns * logprobs).masked_fill(~mask, 0.0).sum()


def denominator(aggregation: Literal["sequence", "token"], num_sequences: int, num_tokens: int) -> int:
    """Returns what the summed loss is divided by: the sequences or the tokens of the whole global batch.

    sequence is Algorithm 1. token is biased: lengths depend on y, so even a baseline moves its expectation; the
    authors' code uses it. Both counts are taken over all micro-batches and processes: never a mean of means.
    """
    return max(num_sequences if aggregation == "sequence" else num_tokens, 1)

"""The mathematics of all methods as pure tensor functions: no model, no I/O, nothing of ours imported.

    gradient = E_x E_{y~pi} [ sum_t grad log pi(y_t | x, y_<t) G_t ],
    G_t = gamma^(T-t) (r(x,y) - r(x,y*)) - beta K_t

(Li et al., arXiv 2310.10505, Algorithm 1 and Section 4), where y* is the greedy completion and K_t the KL term. The
other methods put something else in the place of r(x, y*); PPO has a value model and a loss of its own, at the end.

Legend: P prompts with k samples each, B sampled completions, T tokens of the longest one; masks are True at the tokens
of a completion, its EOS included. Whatever stands in masked-out places has no effect and gets no gradient.
"""

from typing import Literal

import torch
from torch import Tensor


def advantages(
    rewards: Tensor, baselines: Tensor, clip: float | None = None, clip_mode: Literal["raw", "difference"] = "raw"
) -> Tensor:
    """Returns r(x, y) - b, any shape, from the rewards of the samples and their baselines: for ReMax r(x, y*).

    raw: the reward is replaced by clip(r, -c, c), for sample and baseline alike. difference: clip(r - r*, -c, c), which
    the authors' code does with c = 5.
    """
    if clip is None:
        return rewards - baselines
    if clip_mode == "raw":
        return rewards.clamp(-clip, clip) - baselines.clamp(-clip, clip)
    return (rewards - baselines).clamp(-clip, clip)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Returns the mean reward of the prompt's other samples, [P, k] from [P, k]; NaN where there is no other.

    RLOO (Kool et al. 2019; Ahmadian et al., arXiv 2402.14740). Missing rewards (NaN) are no samples.
    """
    present = rewards.isfinite()
    known = rewards.masked_fill(~present, 0.0)
    others = known.sum(-1, keepdim=True) - known
    num_others = present.sum(-1, keepdim=True) - present.long()
    return others / num_others


def group_mean(rewards: Tensor) -> Tensor:
    """Returns the mean reward of the prompt's samples, the sample itself included, [P, k] from [P, k].

    GRPO (Shao et al., arXiv 2402.03300). It depends on the sample: the advantage is (k - 1) / k of RLOO's.
    """
    return rewards.nanmean(-1, keepdim=True).expand_as(rewards)


def group_std(rewards: Tensor) -> Tensor:
    """Returns the standard deviation (n - 1) of a prompt's rewards, plus 1e-4, [P, k] from [P, k].

    GRPO divides by it; Dr. GRPO (Liu et al., arXiv 2503.20783) shows the bias of that and does not.
    """
    squares = (rewards - group_mean(rewards)) ** 2
    num_others = rewards.isfinite().sum(-1, keepdim=True) - 1
    return (squares.nansum(-1, keepdim=True) / num_others).sqrt().expand_as(rewards) + 1e-4


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
    """Returns -G_t log pi(y_t) per token, [B, T]; the gradient of its sum is minus ReMax's, unnormalised."""
    return -(returns * logprobs).masked_fill(~mask, 0.0)


def importance_ratios(logprobs: Tensor, drawn_logprobs: Tensor, mask: Tensor, *, clip_max: float) -> Tensor:
    """Returns min(pi(y) / q(y), clip_max), [B] without gradient, of completions drawn from q, from their logs, [B, T].

    Truncated importance sampling (Ionides 2008) of whole completions: E_q[pi/q f(y)] = E_pi[f(y)] for every f, so
    without truncation the weighted gradient is exact. The product of ratios up to a token, or the token's own ratio,
    would not do: the reward depends on the tokens that follow.
    """
    log_ratios = (logprobs - drawn_logprobs).masked_fill(~mask, 0.0).sum(-1)
    return log_ratios.exp().clamp(max=clip_max).detach()


def total(token_losses: Tensor, mask: Tensor, *, mean_of_sequence: bool = False) -> Tensor:
    """Returns the sum over all tokens, a scalar; mean_of_sequence divides every sequence by its length first (GRPO)."""
    sums = token_losses.sum(-1)
    return (sums / mask.sum(-1) if mean_of_sequence else sums).sum()


def denominator(aggregation: Literal["sequence", "token"], num_sequences: int, num_tokens: int) -> int:
    """Returns what the summed loss is divided by: the sequences or the tokens of the whole global batch.

    sequence is Algorithm 1. token is biased: lengths depend on y, so even a baseline moves its expectation; the
    authors' code uses it. Both counts are taken over all micro-batches and processes: never a mean of means.
    """
    return max(num_sequences if aggregation == "sequence" else num_tokens, 1)


# Proximal policy optimisation (Schulman et al., arXiv 1707.06347) -----------------------------------------------------


def token_rewards(rewards: Tensor, log_ratios: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """Returns the reward of every token, [B, T]: -beta log pi/pi_ref, and at the last token also r(x, y), [B]."""
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(last, rewards.unsqueeze(-1), 0.0) - beta * log_ratios.masked_fill(~mask, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Returns generalised advantage estimates, [B, T] (Schulman et al., arXiv 1506.02438, equation 16).

    A_t = sum_{s>=t} (gamma lam)^(s-t) (r_s + gamma V_{s+1} - V_s), from token rewards and values, [B, T]; the value
    after the last token is 0.
    """
    values = values.masked_fill(~mask, 0.0)
    advantage = next_value = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, 0.0)
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Returns the advantages with mean 0 and variance 1 over all tokens of the mask, [B, T]."""
    chosen = advantages[mask]
    scale = (chosen.var(correction=0) + 1e-8).rsqrt()
    return ((advantages - chosen.mean()) * scale).masked_fill(~mask, 0.0)


def ppo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, cliprange: float) -> Tensor:
    """Returns -min(ratio A, clip(ratio, 1 - c, 1 + c) A) per token, [B, T] (arXiv 1707.06347, equation 7).

    Where the new policy is the old one its gradient is that of `policy_loss`.
    """
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    return -torch.minimum(ratio * advantages, clipped * advantages).masked_fill(~mask, 0.0)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange: float) -> Tensor:
    """Returns max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2 per token, [B, T]."""
    clipped = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    losses = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return (0.5 * losses).masked_fill(~mask, 0.0)

"""The loss of a micro-batch: where log-probabilities, rewards and KL meet."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remax import estimators
from remax.batching import Batch
from remax.config import ObjectiveOptions
from remax.interfaces import Sampling
from remax.logprobs import CompletionScorer


class BatchLoss(NamedTuple):
    """The loss of a micro-batch of B rows and what it shows of them."""

    loss: Tensor
    """Scalar, already divided by the global denominator."""
    kl: Tensor
    """[B] log pi(y) - log pi_ref(y) of the whole completion, or with the exact estimator the sum of the KLs at its
    positions; NaN without a reference."""
    entropy: Tensor
    """[B] mean over the row's tokens."""
    no_signal: Tensor
    """[B] True where no token gets a gradient."""
    logprobs: Tensor
    """[B, T] log-probabilities of the tokens, detached."""


def policy_gradient_loss(
    policy: Any,
    batch: Batch,
    advantages: Tensor,
    sampling: Sampling,
    args: ObjectiveOptions,
    denominator: int,
    *,
    ref_logprobs: Tensor | None = None,
    reference: CompletionScorer | None = None,
    drawn_logprobs: Tensor | None = None,
    clip_max: float = math.inf,
) -> BatchLoss:
    """Returns the loss whose gradient is minus REINFORCE's with these advantages on this micro-batch.

    With r(x, y) - r(x, y*) that is ReMax's (arXiv 2310.10505, Algorithm 1); the other critic-free methods differ in
    the advantages, and GRPO averages every sequence over its tokens instead of adding them up. The policy runs
    forward once; the detached log-probabilities of that pass give the KL of the return.

    Args:
        policy: the CompletionScorer of the policy, as Accelerate prepared it.
        batch: B sampled completions; greedy ones are never trained on.
        advantages: [B] reward minus baseline.
        sampling: the distribution they were drawn from.
        args: method, beta, kl_mode, kl_estimator and gamma.
        denominator: of the whole global batch, see estimators.denominator.
        ref_logprobs: [B, T] log-probabilities of the tokens under the reference, at the same temperature but never
            truncated.
        reference: the reference itself, where the loss has the exact KL. With neither, no KL is wanted.
        drawn_logprobs: [B, T] log-probabilities of the tokens as another program drew them, whose distribution is not
            quite the policy's: every completion is then weighed by estimators.importance_ratios.
        clip_max: of these.
    """
    mask = batch.completion_mask
    has_kl = reference is not None or ref_logprobs is not None
    kl_in_loss = has_kl and args.kl_mode == "loss"
    pi = policy(batch, sampling, reference)
    logprobs = pi.logprobs.detach()
    if reference is not None:
        log_ratios = pi.kl.detach()
    else:
        log_ratios = torch.zeros_like(logprobs) if ref_logprobs is None else logprobs - ref_logprobs

    kl = estimators.kl_in_return(log_ratios, mask, args.kl_mode)
    returns = estimators.returns(advantages, kl, mask, beta=args.beta, gamma=args.gamma)
    losses = estimators.policy_loss(pi.logprobs, returns, mask)
    if kl_in_loss:
        kl_losses = pi.kl if reference is not None else estimators.k2(pi.logprobs, logprobs - log_ratios, mask)
        losses = losses + args.beta * kl_losses
    if drawn_logprobs is not None:
        ratios = estimators.importance_ratios(logprobs, drawn_logprobs, mask, clip_max=clip_max)
        losses = losses * ratios.unsqueeze(-1)
    loss = estimators.total(losses, mask, mean_of_sequence=args.method == "grpo")

    sequence_kl = log_ratios.sum(-1)
    return BatchLoss(
        loss / denominator,
        sequence_kl if has_kl else torch.full_like(sequence_kl, math.nan),
        pi.entropies.sum(-1) / mask.sum(-1),
        torch.zeros_like(mask[:, 0]) if kl_in_loss else (returns == 0).all(-1),
        logprobs,
    )

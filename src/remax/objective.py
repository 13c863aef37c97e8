"""The loss of a micro-batch: where log-probabilities, rewards and KL meet."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remax import estimators
from remax.batching import Batch
from remax.config import ObjectiveOptions
from remax.interfaces import Sampling
from remax.logprobs import CompletionScorer, untruncated


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
    reference: CompletionScorer | None,
    batch: Batch,
    advantages: Tensor,
    sampling: Sampling,
    args: ObjectiveOptions,
    denominator: int,
) -> BatchLoss:
    """Returns the loss whose gradient is minus REINFORCE's with these advantages on this micro-batch.

    With r(x, y) - r(x, y*) that is ReMax's (arXiv 2310.10505, Algorithm 1); the other critic-free methods differ in
    the advantages, and GRPO averages every sequence over its tokens instead of adding them up. The policy runs
    forward once; the detached log-probabilities of that pass give the KL of the return.

    Args:
        policy: the CompletionScorer of the policy, as Accelerate prepared it.
        reference: that of the reference; None if no KL is wanted.
        batch: B sampled completions; greedy ones are never trained on.
        advantages: [B] reward minus baseline.
        sampling: the distribution they were drawn from.
        args: method, beta, kl_mode, kl_estimator and gamma.
        denominator: of the whole global batch, see estimators.denominator.
    """
    mask = batch.completion_mask
    kl_in_loss = reference is not None and args.kl_mode == "loss"
    exact = kl_in_loss and args.kl_estimator == "exact"
    pi = policy(batch, sampling, reference if exact else None)
    logprobs = pi.logprobs.detach()
    if reference is None:
        log_ratios = torch.zeros_like(logprobs)
    elif exact:
        log_ratios = pi.kl.detach()
    else:
        with torch.no_grad():
            log_ratios = logprobs - reference(batch, untruncated(sampling)).logprobs

    kl = estimators.kl_in_return(log_ratios, mask, args.kl_mode)
    returns = estimators.returns(advantages, kl, mask, beta=args.beta, gamma=args.gamma)
    losses = estimators.policy_loss(pi.logprobs, returns, mask)
    if kl_in_loss:
        kl_losses = pi.kl if exact else estimators.k2(pi.logprobs, logprobs - log_ratios, mask)
        losses = losses + args.beta * kl_losses
    loss = estimators.total(losses, mask, mean_of_sequence=args.method == "grpo")

    sequence_kl = log_ratios.sum(-1)
    return BatchLoss(
        loss / denominator,
        torch.full_like(sequence_kl, math.nan) if reference is None else sequence_kl,
        pi.entropies.sum(-1) / mask.sum(-1),
        torch.zeros_like(mask[:, 0]) if kl_in_loss else (returns == 0).all(-1),
        logprobs,
    )

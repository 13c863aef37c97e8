"""A small rollout: whether completions end, what they earn, whether there is a signal, and whose log-probabilities."""

import math
from typing import Any

import torch
from torch import Tensor

from remax.doctor.context import SAMPLES, Context
from remax.doctor.findings import Finding, judged
from remax.doctor.reward import BALANCE, learned, length_finding
from remax.doctor.statistics import mean_interval
from remax.logprobs import CompletionScorer
from remax.stages.reward import correlation, wilson_interval

TRUNCATED_WARN = 0.25
"""Share of samples that are cut by the limit. They are scored unfinished and learn no end; a few are normal."""
FEWEST = 16
"""Samples from which on "none at all" is more than chance: with a true share of a fifth, that is seen once in 36."""
SILENT_WARN = 0.5
"""Share of samples whose reward is that of their baseline: half of every batch would be drawn for nothing."""
WATCH = "if length is not what it is to reward, change it; watch completions/mean_length in the run"
GAP_WARN = 2.0
"""Distance of greedy and sampled rewards in standard deviations of a sampled one: squared advantages then are five
times as large as those of a baseline in the middle, and so, roughly, is the gradient's variance."""
LOGPROBS_WARN, LOGPROBS_WARN_BF16, LOGPROBS_FAIL = 1e-3, 0.03, 0.1
"""Mean distance of a token's log-probability between rollout and training, in nats. In float32 rounding is below 1e-4
and in bfloat16 about 0.01; with 0.1 every ratio of probabilities is wrong by a tenth: another policy was sampled."""


def check_policy(context: Context) -> list[Finding]:
    """Whether the policy can be loaded."""
    policy = context.policy
    number = sum(p.numel() for p in policy.parameters())
    finding = f"{type(policy).__name__}, {number:,} parameters in {policy.dtype}, on {policy.device}"
    return [judged("policy", finding, "")]


def check_stopping(context: Context) -> list[Finding]:
    """How many completions end by themselves."""
    rollout, limit = context.rollout, context.args.max_completion_length
    number = len(rollout.samples)
    truncated = sum(c.truncated for c in rollout.samples)
    low, high = wilson_interval(truncated / number, number)
    length = sum(len(c.token_ids) for c in rollout.samples) / number
    finding = (
        f"{number - truncated} of {number} samples and {sum(not c.truncated for c in rollout.greedy)} of "
        f"{len(rollout.greedy)} greedy completions end with EOS; {truncated / number:.0%} are cut at {limit} tokens "
        f"(95% interval {low:.0%} to {high:.0%}), mean length {length:.0f}"
    )
    never = truncated == number
    fix = (
        "check the EOS rows above, teach the model to end with `remax sft`, or set a larger --max_completion_length"
        if never
        else "set a larger --max_completion_length, or teach the model to end with `remax sft`"
    )
    return [judged("stopping", finding, fix, fail=never and number >= FEWEST, warn=truncated / number > TRUNCATED_WARN)]


def check_rewards(context: Context) -> list[Finding]:
    """How many samples have a reward, how greedy ones compare, and whether reward is length."""
    rewards, rollout = context.trial_rewards, context.rollout
    sampled, greedy = rewards.sampled.double(), rewards.greedy.double()
    number, present = len(sampled), sampled.isfinite()
    missing = 1 - torch.cat([sampled, greedy]).isfinite().double().mean().item()
    found = [
        judged(
            "rewards",
            f"{missing:.0%} of {number + len(greedy)} completions have no reward; mean {_mean(sampled[present])}, "
            f"greedy {_mean(greedy[greedy.isfinite()])}",
            "look at the warnings above; more than --max_missing_rewards of a step stop the run",
            fail=missing > context.args.max_missing_rewards,
            warn=missing > 0,
        )
    ]
    if present.sum() > 1:
        found += _gap(sampled, greedy)
        lengths = torch.tensor([len(c.token_ids) for c in rollout.samples], dtype=torch.float64)
        if lengths[present].std() > 0:
            own = correlation(lengths[present], sampled[present])
            # A programmed reward may be about length, so this is never a fault.
            fix = BALANCE if learned(context) else WATCH
            found.append(
                length_finding("reward and length", own, int(present.sum()), "samples", fix=fix, may_fail=False)
            )
    return found


def _gap(sampled: Tensor, greedy: Tensor) -> list[Finding]:
    differences = sampled - greedy.repeat_interleave(SAMPLES)
    differences = differences[differences.isfinite()]
    deviation = float(sampled[sampled.isfinite()].std())
    if not len(differences):
        return []
    mean, low, high = mean_interval(differences.tolist())
    finding = (
        f"sampled minus greedy reward {mean:+.3g} (95% interval {low:+.3g} to {high:+.3g}, n = {len(differences)}), "
        f"with a standard deviation of {deviation:.3g}"
    )
    far = deviation > 0 and max(low, -high, 0.0) > GAP_WARN * deviation
    return [judged("greedy gap", finding, "try --baseline mixed, or a --temperature nearer to greedy", warn=far)]


def check_signal(context: Context) -> list[Finding]:
    """How many samples earn exactly their baseline, so that the reward moves nothing."""
    args, sampled = context.args, context.trial_rewards.sampled.double()
    if args.needs_greedy:
        baseline, what = context.trial_rewards.greedy.double().repeat_interleave(SAMPLES), "the greedy completion's"
    elif args.num_generations > 1:
        baseline, what = sampled.view(-1, SAMPLES).mean(1).repeat_interleave(SAMPLES), "their prompt's mean"
    else:
        baseline, what = sampled[sampled.isfinite()].mean().expand(len(sampled)), "the mean"
    differences = sampled - baseline
    differences = differences[differences.isfinite()]
    number = len(differences)
    if not number:
        return [Finding("signal", "skip", "not looked at: there are no rewards")]
    silent = int((differences == 0).sum())
    low, high = wilson_interval(silent / number, number)
    finding = (
        f"{silent / number:.0%} of {number} samples earn exactly {what} reward (95% interval {low:.0%} to {high:.0%}): "
        "nothing is learned from them"
    )
    fix = "use a reward with more levels, prompts that are neither too easy nor too hard, or a higher --temperature"
    share = silent / number
    return [judged("signal", finding, fix, fail=share == 1 and number >= FEWEST, warn=share > SILENT_WARN)]


def check_log_probabilities(context: Context) -> list[Finding]:
    """Whether training gives the sampled tokens the log-probabilities that they were drawn with."""
    parts, args, samples = context.components, context.args, context.rollout.samples
    trained = parts.token_logprobs(CompletionScorer(parts.policy), samples, parts.sampling, args.micro_batch_tokens)
    distances = torch.cat([_distance(own, c.logprobs) for own, c in zip(trained, samples, strict=True)])
    mean, largest = distances.mean().item(), distances.max().item()
    low_precision = args.bf16 or args.dtype == "bfloat16"
    warn = LOGPROBS_WARN_BF16 if low_precision else LOGPROBS_WARN
    finding = (
        f"rollout and training differ by {mean:.1e} nats per token, at most {largest:.1e}, over {len(distances)} tokens"
    )
    fix = "set --rollout_engine embedded, another --attn_implementation or --dtype float32: one of the two is wrong"
    wrong = not math.isfinite(mean)
    return [judged("log probabilities", finding, fix, fail=wrong or mean > LOGPROBS_FAIL, warn=mean > warn)]


def _distance(trained: Tensor, drawn: Any) -> Tensor:
    return (trained.double().cpu() - torch.tensor(drawn, dtype=torch.float64)).abs()


def _mean(values: Tensor) -> str:
    return f"{values.mean().item():.3g}" if len(values) else "unknown"

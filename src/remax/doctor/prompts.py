"""The prompts: how long they are, which come again, and which are in both datasets."""

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from remax.doctor.context import Context
from remax.doctor.findings import Finding, judged

OVERLONG_WARN, OVERLONG_FAIL = 0.01, 0.5
"""Shares of prompts over --max_prompt_length. A hundredth is an outlier or two; of more, those that are left are
another task than was meant, and most of it is gone with a half."""
DUPLICATES_WARN = 0.01
"""Share of prompts that were there before. Repetition is legitimate weight; more than a hundredth is rarely meant."""
LEAKAGE_FAIL = 0.1
"""Share of evaluation prompts that are trained on. One is worth a warning; with a tenth, what sets training prompts
apart moves the mean by a tenth, which is no less than the gains that evaluations are asked about."""
BARS = " ▁▂▃▄▅▆▇█"
NUM_BINS = 12


def check_prompt_lengths(context: Context) -> list[Finding]:
    """Lengths in tokens as a histogram, and how many are too long. (Empty prompts are refused as they are read.)"""
    prompts, num_overlong = context.prompts
    args = context.args
    lengths = sorted(len(prompt.token_ids) for prompt in prompts)
    total = len(context.prompt_contents)
    finding = (
        f"{total} prompts, none empty; {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]} "
        f"[{histogram(lengths)}]"
    )
    share = num_overlong / total
    if num_overlong:
        done = "dropped" if args.overlong_prompts == "filter" else "cut"
        finding += f"; {num_overlong} ({share:.1%}) are longer than {args.max_prompt_length} and are {done}"
    fix = "set a larger --max_prompt_length"
    return [judged("prompt lengths", finding, fix, fail=share > OVERLONG_FAIL, warn=share > OVERLONG_WARN)]


def histogram(values: Sequence[int]) -> str:
    """Returns bars, one per equal part of the range; a bar that is not empty is never invisible."""
    low, high = min(values), max(values)
    numbers = [0] * NUM_BINS
    for value in values:
        numbers[min(NUM_BINS - 1, (value - low) * NUM_BINS // max(1, high - low))] += 1
    return "".join(BARS[-(-number * (len(BARS) - 1) // max(numbers))] for number in numbers)


def check_room(context: Context) -> list[Finding]:
    """Whether there are enough prompts for a step, and prompt and completion fit in the policy's context."""
    prompts, args, limit = context.prompts[0], context.args, context.context_length
    steps = len(prompts) // args.batch_size
    found = [
        judged(
            "prompts per step",
            f"{len(prompts)} usable prompts, {steps} steps of {args.batch_size} an epoch",
            f"set --batch_size {len(prompts)} or less, or give more prompts",
            fail=steps == 0,
        )
    ]
    if limit:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        needed = longest + args.max_completion_length
        found.append(
            judged(
                "context",
                f"{longest} tokens of prompt and {args.max_completion_length} of completion, of {limit}",
                f"set --max_completion_length {limit - longest} or less, or a smaller --max_prompt_length",
                fail=needed > limit,
            )
        )
    return found


def check_duplicates(context: Context) -> list[Finding]:
    """How many prompts were there before, letter case and white space aside."""
    keys = [fingerprint(content) for content in context.prompt_contents]
    repeated = len(keys) - len(set(keys))
    share = repeated / len(keys)
    finding = f"{repeated} of {len(keys)} prompts ({share:.1%}) repeat an earlier one" if repeated else "none"
    return [
        judged("duplicates", finding, "drop them, unless they are meant to count more", warn=share > DUPLICATES_WARN)
    ]


def check_leakage(context: Context) -> list[Finding]:
    """How many evaluation prompts are trained on, letter case and white space aside."""
    if not context.eval_contents:
        return [Finding("leakage", "skip", "there is no --eval_dataset")]
    trained = {fingerprint(content) for content in context.prompt_contents}
    leaked = sum(fingerprint(content) in trained for content in context.eval_contents)
    share = leaked / len(context.eval_contents)
    finding = f"{leaked} of {len(context.eval_contents)} prompts of --eval_dataset ({share:.1%}) are in --train_dataset"
    fix = "take them out of one of the two: --eval_dataset should be held out"
    return [judged("leakage", finding, fix, fail=share > LEAKAGE_FAIL, warn=leaked > 0)]


def fingerprint(content: Any) -> bytes:
    """Returns a key that prompts share if they differ in letter case and white space alone."""
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=str, ensure_ascii=False)
    return blake2b(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()

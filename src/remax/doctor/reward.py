"""Reward models: whether they prefer what they should, and whether a score depends on its text alone."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from remax.doctor.context import Context
from remax.doctor.findings import Finding, judged
from remax.doctor.statistics import correlation_interval
from remax.doctor.tokenizer import vocabulary_finding
from remax.interfaces import Message
from remax.rewards import RewardModel, reward_input_ids
from remax.stages.reward import Pairs, rank_pairs

BALANCE = "balance lengths in the pairs that it learns from, and watch completions/mean_length in the run"
PROBES = 32
"""Texts that are scored in several ways: enough for a spread, few enough for seconds."""
EXTRA_PADDING = 8
PROBE_ANSWER = " Yes, that is right."
NOISE_WARN, NOISE_FAIL = 0.01, 0.1
"""How much a score may move with what it is padded or batched with, as a fraction of the standard deviation over texts.
Rounding is far below a hundredth; a tenth is noise in every advantage that no baseline takes away."""
LENGTH_WARN, LENGTH_FAIL = 0.3, 0.8
"""Correlations of reward and length, beyond which the whole 95% interval must lie: length then explains a tenth of the
variance, or two thirds, and a longer answer is a better one whatever it says."""
SAME = 1e-3
"""Scores this close, as a fraction of their spread, are one score: a token more, even one that is not read, changes the
rounding of all that is."""


def check_reward_sources(context: Context) -> list[Finding]:
    """Whether the rewards can be loaded."""
    names = ", ".join(function.name for function in context.reward_functions)
    return [judged("reward sources", names, "")]


def check_reward_tokenizer(context: Context) -> list[Finding]:
    """Whether the reward model's tokenizer is that of its embedding, and padding is told from text."""
    tokenizer, config = context.reward_tokenizer, context.reward_config
    if tokenizer is None:
        return [Finding("reward tokenizer", "skip", "there is no --reward_model")]
    found = [vocabulary_finding("reward vocabulary", tokenizer, config, flag="--reward_model")]
    pad, own, eos = config.get_text_config().pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id
    name = "reward pad"
    if pad is None:
        fix = "set pad_token_id in its config.json, to a token that no text has"
        found.append(judged(name, "its config names none, so texts are scored one by one", fix, warn=True))
    elif pad == eos:
        fix = "give it a pad token of its own and train it again with `remax reward`"
        finding = f"id {pad} is also EOS: the scalar is read before it, so a finished and a cut text score alike"
        found.append(judged(name, finding, fix, warn=True))
    elif own is not None and own != pad:
        fix = f"set the pad token of its tokenizer to id {pad}"
        finding = f"id {pad} in its config, {own} in its tokenizer: with other libraries it reads its scalar at padding"
        found.append(judged(name, finding, fix, warn=True))
    else:
        found.append(judged(name, f"id {pad} in config and tokenizer", ""))
    return found


def check_reward_padding(context: Context) -> list[Finding]:
    """Whether a score depends on padding, on what else is in the batch, or on the order."""
    return [finding for model, probes in _probed(context) for finding in padding_findings(model, probes)]


def padding_findings(model: RewardModel, probes: Sequence[list[int]]) -> list[Finding]:
    """Returns how far a model's scores move with padding, batch and order, and whether they differ at all."""
    alone = [_forward(model, [ids])[0] for ids in probes]
    spread = _spread(alone)
    if not spread:
        fix = "train it with `remax reward`, or set another one"
        return [judged("reward scores", f"{len(probes)} texts all score {alone[0]:.4g}", fix, fail=True)]
    if model.batch_size == 1:
        return [Finding("reward padding", "skip", "without a pad token every text is scored alone")]
    together = _forward(model, probes)
    ways = {
        "batch": (alone, together),
        "padding": (together, _forward(model, probes, extra=EXTRA_PADDING)),
        "order": (together, _forward(model, probes[::-1])[::-1]),
    }
    found = []
    for way, (first, second) in ways.items():
        moved = float((torch.tensor(first) - torch.tensor(second)).abs().max()) / spread
        finding = f"{len(probes)} scores move by at most {moved:.1e} of their standard deviation {spread:.3g}"
        fix = "set pad_token_id in the reward model's config to the token that it was trained to ignore"
        wrong = not math.isfinite(moved)
        found.append(judged(f"reward {way}", finding, fix, fail=wrong or moved > NOISE_FAIL, warn=moved > NOISE_WARN))
    return found


def check_reward_position(context: Context) -> list[Finding]:
    """Where the scalar is read: at the last token, so that an EOS counts, or before it."""
    return [finding for model, probes in _probed(context) for finding in position_findings(model, probes)]


def position_findings(model: RewardModel, probes: Sequence[list[int]]) -> list[Finding]:
    """Returns for how many texts the last token changes the score."""
    full, short = ([_forward(model, [ids[:end]])[0] for ids in probes] for end in (None, -1))
    limit = SAME * _spread(full)
    changed = sum(abs(a - b) > limit for a, b in zip(full, short, strict=True))
    finding = f"the last token counts in {changed} of {len(probes)} texts"
    if changed == len(probes):
        return [judged("reward position", f"{finding}: the scalar is read there", "")]
    fix = "give the model a pad token that no text ends with, and train it again with `remax reward`"
    finding += ": elsewhere the scalar is read before it, so a finished and a cut text can score alike"
    return [judged("reward position", finding, fix, warn=True)]


def check_reward_template(context: Context) -> list[Finding]:
    """Whether the template writes a prompt alike before and after it is answered, so that scores fit the prompts."""
    tokenizer = context.reward_tokenizer
    if tokenizer is None or not context.conversational:
        why = "there is no --reward_model" if tokenizer is None else "the prompts are texts"
        return [Finding("reward template", "skip", why)]
    messages = [p.content for p in context.prompts[0][:PROBES] if not isinstance(p.content, str)]
    differing = sum(not _prefix_stays(tokenizer, own) for own in messages)
    finding = f"{differing} of {len(messages)} prompts are written otherwise once an answer follows"
    fix = "use a template that only appends, or score with the one that the reward model was trained with"
    return [judged("reward template", finding, fix, warn=differing > 0)]


def _prefix_stays(tokenizer: Any, prompt: list[Message]) -> bool:
    if prompt[-1]["role"] == "assistant":
        return True
    before: str = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    answer = {"role": "assistant", "content": PROBE_ANSWER.strip()}
    after: str = tokenizer.apply_chat_template([*prompt, answer], tokenize=False)
    return after.startswith(before)


def check_reward_pairs(context: Context) -> list[Finding]:
    """Whether chosen texts score above rejected ones."""
    if context.pairs is None or not context.inputs.reward_model:
        why = "there is no --reward_model" if context.pairs is not None else "there are no --pairs"
        return [Finding("reward pairs", "skip", why)]
    return [finding for model in learned(context) for finding in pair_findings(model, _pairs(context, model))]


def pair_findings(model: RewardModel, pairs: Pairs) -> list[Finding]:
    """Returns the accuracy on pairs with Wilson's 95% interval, and the correlation of reward and length."""
    if not pairs.chosen_ids:
        return [judged("reward pairs", "all are longer than it can read", "give shorter --pairs", warn=True)]
    quality = rank_pairs(model, pairs)
    number = len(pairs.chosen_ids)
    low, high = quality["accuracy_low"], quality["accuracy_high"]
    finding = (
        f"chosen above rejected in {quality['accuracy']:.1%} of {number} pairs (95% interval {low:.1%} to {high:.1%}); "
        f"preferring the longer text gets {quality['longer_wins']:.1%}"
    )
    inverted = high < 0.5
    fix = (
        "look for swapped columns: it prefers what was rejected"
        if inverted
        else "train it longer or on more pairs, or give more --pairs: chance is not excluded"
    )
    return [
        judged("reward pairs", finding, fix, fail=inverted, warn=low <= 0.5),
        length_finding("reward length", quality["length_correlation"], 2 * number, "texts of --pairs"),
    ]


def length_finding(
    check: str, found: float, number: int, of: str, *, fix: str = BALANCE, may_fail: bool = True
) -> Finding:
    """Returns what a correlation of reward and length over so many texts says."""
    low, high = correlation_interval(found, number)
    near = max(low, -high, 0.0)
    finding = f"correlation {found:+.2f} (95% interval {low:+.2f} to {high:+.2f}) over {number} {of}"
    return judged(check, finding, fix, fail=may_fail and near > LENGTH_FAIL, warn=near > LENGTH_WARN)


def learned(context: Context) -> list[RewardModel]:
    """Returns the rewards that are models."""
    return [function for function in context.reward_functions if isinstance(function, RewardModel)]


def _pairs(context: Context, model: RewardModel) -> Pairs:
    """Returns the pairs as the model reads them, without those that are too long for it."""
    pairs = Pairs([], [])
    for row in context.pairs.with_format(None):
        prompt = row.get("prompt") or ""
        chosen, rejected = (
            reward_input_ids(model.tokenizer, prompt, row[side], True) for side in ("chosen", "rejected")
        )
        if model.max_length is None or max(len(chosen), len(rejected)) <= model.max_length:
            pairs.chosen_ids.append(chosen)
            pairs.rejected_ids.append(rejected)
    return pairs


def _probed(context: Context) -> list[tuple[RewardModel, list[list[int]]]]:
    """Returns every reward model with texts for it to score: from the pairs, or the prompts with one same answer."""
    found = []
    for model in learned(context):
        if context.pairs is not None:
            pairs = _pairs(context, model)
            probes = [ids for pair in zip(*pairs, strict=True) for ids in pair]
        else:
            prompts = [prompt.content for prompt in context.prompts[0][:PROBES]]
            probes = [reward_input_ids(model.tokenizer, prompt, _answer(prompt), True) for prompt in prompts]
        room = (model.max_length or math.inf) - EXTRA_PADDING
        fitting = {tuple(ids): ids for ids in probes if 1 < len(ids) <= room}
        if len(fitting) > 1:  # one text has no spread that changes could be compared with
            found.append((model, list(fitting.values())[:PROBES]))
    return found


def _answer(prompt: str | list[Message]) -> str | list[Message]:
    return PROBE_ANSWER if isinstance(prompt, str) else [{"role": "assistant", "content": PROBE_ANSWER.strip()}]


def _spread(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).std(correction=0))


@torch.no_grad()
def _forward(model: RewardModel, rows: Sequence[list[int]], *, extra: int = 0) -> list[float]:
    """Returns the scores of one batch, in its order, padded on the right to `extra` more than its longest row.

    Not through the RewardModel, which sorts by length and scores equal texts once.
    """
    length = max(map(len, rows)) + extra
    input_ids = torch.tensor([row + [model.pad_token_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    with model.placed.on_device():
        device = next(model.model.parameters()).device
        logits = model.model(input_ids=input_ids.to(device), attention_mask=mask.to(device), **model.kwargs).logits
    scores: list[float] = logits.float().view(len(rows)).tolist()
    return scores

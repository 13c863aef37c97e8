"""The policy's tokenizer: what ends a completion, what a prompt starts with, and the chat template."""

from typing import Any

from remax.doctor.context import Context
from remax.doctor.findings import Finding, judged

MARK = "remax-doctor"
"""An answer that no template changes: what stands behind it is the end of a turn."""


def check_eos(context: Context) -> list[Finding]:
    """Whether model and tokenizer agree on what ends a completion."""
    tokenizer, ending = context.tokenizer, context.eos_token_ids
    own = tokenizer.eos_token_id
    in_generation = _ids(context.generation_config.eos_token_id)
    in_config = _ids(getattr(context.config.get_text_config(), "eos_token_id", None))
    finding = f"completions end at {_named(tokenizer, ending)}"
    if unknown := [i for i in in_generation if not 0 <= i < len(tokenizer)]:
        fix = "correct eos_token_id in generation_config.json"
        return [judged("EOS", f"{finding}; the tokenizer has no id {unknown[0]}, which is left out", fix, warn=True)]
    if forgotten := [i for i in in_config if i not in ending]:
        fix = f"add {forgotten[0]} to eos_token_id in generation_config.json, if the model was taught to end with it"
        finding += f", but not at {_named(tokenizer, forgotten)}, which config.json names"
        return [judged("EOS", finding, fix, warn=True)]
    if in_generation and own not in in_generation:
        finding += f"; the tokenizer's {_named(tokenizer, [own])} is not among those of the model"
        fix = "make sure that the model was taught to end with one of them, or correct eos_token of the tokenizer"
        return [judged("EOS", finding, fix, warn=True)]
    return [judged("EOS", finding, "")]


def check_pad(context: Context) -> list[Finding]:
    """Whether the pad token is one of its own. Here padding is known by masks; elsewhere it often is not."""
    pad, ending = context.tokenizer.pad_token_id, context.eos_token_ids
    finding = f"padding is {_named(context.tokenizer, [pad])}"
    fix = "nothing here; before another library trains on the result, give the tokenizer a pad token of its own"
    if pad in ending:
        finding += ", which also ends completions: no harm here, but a trainer that masks pad tokens never teaches it"
    return [judged("pad", finding, fix, warn=pad in ending)]


def check_vocabulary(context: Context) -> list[Finding]:
    """Whether the model has an embedding for every token of the tokenizer."""
    return [vocabulary_finding("vocabulary", context.tokenizer, context.config, flag="--model")]


def vocabulary_finding(check: str, tokenizer: Any, config: Any, *, flag: str) -> Finding:
    """Returns whether every id that a tokenizer can write is a row of the model's embedding."""
    largest, rows = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    finding = f"ids up to {largest}, an embedding of {rows} rows"
    fix = f"put the tokenizer that {flag} was trained with beside it, or resize its embedding"
    return judged(check, finding, fix, fail=largest >= rows)


def check_bos(context: Context) -> list[Finding]:
    """Whether all prompts start alike, with at most one BOS."""
    bos, prompts = context.tokenizer.bos_token_id, context.prompts[0]
    if bos is None:
        return [judged("BOS", "the tokenizer has none", "")]
    starts = [next((n for n, i in enumerate(p.token_ids) if i != bos), len(p.token_ids)) for p in prompts]
    twice, once = sum(n > 1 for n in starts), sum(n == 1 for n in starts)
    finding = (
        f"{once} of {len(prompts)} prompts start with one {_named(context.tokenizer, [bos])}, {twice} with several"
    )
    if twice:
        fix = "take BOS out of the prompts or out of the chat template: one of them writes it too often"
        return [judged("BOS", finding, fix, fail=True)]
    fix = "make the prompts alike: the model sees two kinds of beginnings"
    return [judged("BOS", finding, fix, warn=0 < once < len(prompts))]


def check_chat_template(context: Context) -> list[Finding]:
    """Whether a turn that the template writes ends with an EOS: otherwise no taught answer ever ends."""
    tokenizer, ending = context.tokenizer, context.eos_token_ids
    if not tokenizer.chat_template:
        finding, fix = "none; the prompts are texts", ""
        if context.conversational:
            finding, fix = (
                "none, and the prompts are messages",
                "set a --model with a template, or make the prompts texts",
            )
        return [judged("chat template", finding, fix, fail=context.conversational)]
    after = end_of_turn(tokenizer)
    unused = "" if context.conversational else " (not used: the prompts are texts)"
    if any(i in ending for i in after):
        finding = f"a turn ends with {_named(tokenizer, [i for i in after if i in ending][:1])}, an EOS{unused}"
        return [judged("chat template", finding, "")]
    seen = f"with {_named(tokenizer, after)}" if after else "with nothing"
    finding = f"a turn ends {seen}; completions end at {_named(tokenizer, ending)} alone{unused}"
    ids = sorted({*ending, *after[:1]})
    fix = f'set "eos_token_id": {ids} in generation_config.json of --model' if after else "let the template end answers"
    return [judged("chat template", finding, fix, fail=context.conversational, warn=not context.conversational)]


def end_of_turn(tokenizer: Any) -> list[int]:
    """Returns the ids that the chat template puts behind an answer."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    ids: list[int] = tokenizer(text[text.rindex(MARK) + len(MARK) :], add_special_tokens=False)["input_ids"]
    return ids


def _ids(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _named(tokenizer: Any, ids: Any) -> str:
    """Returns tokens as they are written, with their ids."""
    tokens = [(i, str(tokenizer.convert_ids_to_tokens(i))) for i in ids]
    return " ".join(f"{token if token.strip() else repr(token)} ({i})" for i, token in tokens)

"""Tokenizers that read one character at a time, so that a test can write down the ids."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, START, END = range(5)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = ["\n", *map(chr, range(32, 127))]
VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def characters(text: str) -> list[int]:
    """Returns the ids of a text without special tokens."""
    return [len(SPECIAL) + CHARACTERS.index(c) for c in text]


def turn(role: str, content: str, *, closed: bool = True) -> list[int]:
    """Returns the ids of one ChatML message; not closed: without what the template puts behind it."""
    return [START, *characters(f"{role}\n{content}"), *([END, *characters("\n")] if closed else [])]


def toy_tokenizer(around: str = "$A", **kwargs: Any) -> Any:
    """Returns a tokenizer; around says where it puts <s> and </s>; kwargs as eos_token, pad_token, chat_template."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.add_special_tokens(SPECIAL)
    core.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": "</s>", "pad_token": "<pad>", **kwargs})


def say(*contents: str, roles: Sequence[str] = ("user", "assistant")) -> list[dict[str, Any]]:
    """Returns messages with alternating roles."""
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]

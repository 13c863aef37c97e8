"""Tokenizers of two kinds, one by bytes with a chat template and one like Llama, and prompts that they prepare."""

from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from remax.data import prepare_prompts
from remax.interfaces import Message, Prompt

CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and strict is defined %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if tools %}{{ 'tools=' + tools | map(attribute='name') | join('+') }}{% endif %}"
    "{% if mood is defined %}{{ 'mood=' + mood | string }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_names() -> dict[int, str]:
    """GPT-2's spelling of the 256 bytes: printable ones as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def byte_tokenizer(**kwargs: Any) -> Any:
    """Byte-level, without merges: the id of a byte is the byte, then <|im_start|>, <|im_end|>, <bos>."""
    core = Tokenizer(models.BPE(vocab={name: byte for byte, name in byte_names().items()}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<bos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", **kwargs)


def llama_tokenizer(single: str = "<s> $A") -> Any:
    """Like Llama's: a space is '▁' and one is put in front; bytes for what is not in the vocabulary; BOS.

    Ids: <unk> 0, <s> 1, </s> 2, byte b at 3 + b, '▁' 259, a-z from 260.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama_ids(text: str) -> list[int]:
    """The toy Llama's ids of a text, without its tokenizer."""
    pieces = " " + text
    return [
        i
        for char in pieces
        for i in (
            [259] if char == " " else [260 + ord(char) - 97] if "a" <= char <= "z" else [3 + b for b in char.encode()]
        )
    ]


def say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def prepare(rows: Any, tokenizer: Any, **settings: Any) -> tuple[list[Prompt], int]:
    if not isinstance(rows, Dataset):
        rows = Dataset.from_dict({"prompt": rows}, on_mixed_types="use_json")
    defaults = {"max_prompt_length": 1000, "overlong": "filter", "system_prompt": None, "flag": "--train_dataset"}
    return prepare_prompts(rows, tokenizer, **(defaults | settings))


@pytest.fixture(scope="module")
def chat() -> Any:
    return byte_tokenizer(chat_template=CHATML)


@pytest.fixture(scope="module")
def llama() -> Any:
    return llama_tokenizer()

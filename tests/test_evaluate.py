"""Evaluation: intervals, perplexity against the model's own loss, and the texts that it is measured on."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from remax.batching import collate
from remax.data import load_references
from remax.errors import UserError
from remax.evaluate import bootstrap_interval, perplexity
from remax.interfaces import Sampling
from remax.logprobs import CompletionScorer
from tiny_models import tiny_model
from toy_tokenizers import BOS, CHATML, END, EOS, VOCAB_SIZE, characters, toy_tokenizer, turn


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(generator.normal(3.0, 2.0, size=60), seed=trial, num_resamples=400)
        covered += low <= 3.0 <= high
    assert 0.90 < covered / 200 < 0.985


def test_bootstrap_interval_of_a_constant_and_its_width() -> None:
    assert bootstrap_interval(np.full(10, 2.5)) == (2.5, 2.5)
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_perplexity_weighs_tokens_not_texts() -> None:
    value, (low, high) = perplexity([-2.0 * math.log(3), -6.0 * math.log(5)], [2, 6])
    assert value == pytest.approx(math.exp((2 * math.log(3) + 6 * math.log(5)) / 8))
    assert 3 <= low <= value <= high <= 5 + 1e-9


def test_perplexity_equals_the_models_own_loss() -> None:
    """On one text of which everything after BOS counts, it is exp of the loss that transformers computes."""
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    tokenizer = toy_tokenizer("<s> $A", bos_token="<s>")
    (reference,) = load_references(Dataset.from_list([{"text": "a cat sat"}]), tokenizer, flag="--x", max_length=None)
    assert reference.prompt.token_ids == [BOS]
    assert reference.token_ids == [*characters("a cat sat"), EOS]
    ids = torch.tensor([[BOS, *reference.token_ids]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
        batch = collate([reference], 0, torch.device("cpu"))
        total = CompletionScorer(model)(batch, Sampling(8, (EOS,))).logprobs.sum().item()
    assert perplexity([total], [len(reference.token_ids)])[0] == pytest.approx(math.exp(loss), rel=1e-5)


def test_references_follow_their_prompts() -> None:
    tokenizer = toy_tokenizer("<s> $A", bos_token="<s>")
    rows = [{"prompt": "hi", "completion": " you"}, {"prompt": "a long prompt", "completion": " and more"}]
    for column in ("completion", "chosen"):
        dataset = Dataset.from_list([{"prompt": row["prompt"], column: row["completion"]} for row in rows])
        (reference,) = load_references(dataset, tokenizer, flag="--x", max_length=10)
        assert reference.prompt.token_ids == [BOS, *characters("hi")]
        assert reference.token_ids == [*characters(" you"), EOS]


def test_references_of_conversations() -> None:
    tokenizer = toy_tokenizer("$A", eos_token="<|im_end|>", chat_template=CHATML)
    rows: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yo"}]}
    ]
    (reference,) = load_references(Dataset.from_list(rows), tokenizer, flag="--x", max_length=None)
    opened = turn("assistant", "", closed=False)
    assert reference.prompt.token_ids == [*turn("user", "hi"), *opened]
    assert reference.token_ids == [*characters("yo"), END, *characters("\n")]


def test_without_texts_there_is_no_perplexity() -> None:
    tokenizer = toy_tokenizer("$A")
    with pytest.raises(UserError, match="--x has the columns prompt: there are no texts"):
        load_references(Dataset.from_list([{"prompt": "a"}]), tokenizer, flag="--x", max_length=None)
    with pytest.raises(UserError, match="no text has at most 3 tokens"):
        load_references(Dataset.from_list([{"text": "abcdef"}]), tokenizer, flag="--x", max_length=3)

"""The embedded engine against transformers' own greedy search, lone unpadded forward passes and literal formulas."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from remax.errors import UserError
from remax.interfaces import Completion, Prompt, Rollout, Sampling
from remax.rollout.draw import choose, draw
from remax.rollout.embedded import EmbeddedEngine
from tiny_models import ARCHITECTURES, SLIDING_WINDOW, VOCAB_SIZE, tiny_model

LENGTHS = (3, 13, 1, 7, 9, 2)
EOS = tuple(range(5, 97, 16))
SAMPLING = Sampling(max_completion_length=20, eos_token_ids=EOS)


def make_prompts(lengths=LENGTHS, contains=()) -> list[Prompt]:
    """Random prompts; the longer ones contain the given tokens."""
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for n, length in enumerate(lengths):
        ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
        if length > len(contains):
            ids[: len(contains)] = contains
        prompts.append(Prompt(index=10 * n + 1, content="", token_ids=ids))
    return prompts


def generate(
    model, prompts, sampling=SAMPLING, *, pad=0, max_rows=0, samples=2, greedy=True, seed=0, step=0
) -> Rollout:
    engine = EmbeddedEngine(model, pad_token_id=pad, max_rows=max_rows)
    return engine.generate(prompts, sampling, num_samples=samples, greedy=greedy, seed=seed, step=step)


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def by_key(rollout: Rollout) -> dict[tuple[int, int], Completion]:
    return {(c.prompt.index, c.sample_index): c for c in [*rollout.samples, *rollout.greedy]}


def assert_same(some: Rollout, others: Rollout) -> None:
    """The completions in `some` have the same tokens and log-probabilities in `others`."""
    known = by_key(others)
    assert len(by_key(some)) > 0
    for key, completion in by_key(some).items():
        assert completion.token_ids == known[key].token_ids
        assert completion.truncated == known[key].truncated
        assert completion.logprobs == pytest.approx(known[key].logprobs, abs=1e-4)


def greedy_of_transformers(model, prompts, length, eos, pad) -> list[list[int]]:
    """What model.generate returns, cut after the first EOS."""
    width = max(len(p.token_ids) for p in prompts)
    ids = torch.tensor([[pad] * (width - len(p.token_ids)) + p.token_ids for p in prompts])
    mask = torch.tensor([[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts])
    settings = {"do_sample": False, "max_new_tokens": length, "pad_token_id": pad, "eos_token_id": list(eos) or None}
    rows = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, width:].tolist()
    ends = [next((n for n, token in enumerate(row, 1) if token in eos), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def plain_logits(model, completion: Completion) -> Tensor:
    """Logits [T, V] in float64 of one sequence alone, without padding and without a cache."""
    prompt = completion.prompt.token_ids
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids]), use_cache=False).logits[0].double()
    return logits[len(prompt) - 1 : -1]


def literal_distribution(logits: list[float], sampling: Sampling) -> list[float]:
    """Temperature, then top-k, then the smallest set of likeliest tokens with mass >= top_p; in Python floats."""
    highest = max(logits)
    weights = [math.exp((x - highest) / sampling.temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept = order[: sampling.top_k or None]
    total, nucleus, mass = sum(weights[i] for i in kept), set(), 0.0
    for i in kept:
        nucleus.add(i)
        mass += weights[i] / total
        if mass >= sampling.top_p:
            break
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(weights))]


@contextmanager
def forward_shapes(model) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of input_ids of every forward pass."""
    shapes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def stories(tinystories) -> tuple[Any, list[Prompt], int]:
    """A real model, prompts of different lengths for it, and its EOS."""
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    texts = [
        "Once upon a time",
        "Lily and Tom went to the park. They saw a big",
        "The",
        "One day, a little dog named Max was",
    ]
    prompts = [Prompt(n, text, tokenizer(text)["input_ids"]) for n, text in enumerate(texts)]
    return AutoModelForCausalLM.from_pretrained(tinystories), prompts, tokenizer.eos_token_id


# Agreement with other ways to compute the same


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("case", ["several eos", "pad is eos", "pad is eos is bos"])
def test_greedy_agrees_with_transformers(name, case):
    eos, pad = (EOS, 0) if case == "several eos" else (EOS, EOS[0])
    special = {"bos_token_id": pad, "eos_token_id": pad, "pad_token_id": pad} if case == "pad is eos is bos" else {}
    model = tiny_model(name, **special)
    prompts = make_prompts(contains=(pad,) if special else (11, *eos))
    assert max(LENGTHS) > SLIDING_WINDOW
    for max_eos in (len(eos), 0):  # without an EOS every row crosses the sliding window
        eos = eos[:max_eos]
        rollout = generate(model, prompts, replace(SAMPLING, eos_token_ids=eos), pad=pad)
        expected = greedy_of_transformers(model, prompts, SAMPLING.max_completion_length, eos, pad)
        assert ids_of(rollout.greedy) == expected
        assert [c.truncated for c in rollout.greedy] == [ids[-1] not in eos for ids in expected]
    assert name == "bloom" or max(len(set(ids)) for ids in expected) > 8  # not one token over and over


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "sampling",
    [
        replace(SAMPLING, temperature=0.7),
        replace(SAMPLING, temperature=1.3, top_p=0.8, top_k=12),
    ],
    ids=["temperature", "truncated"],
)
def test_logprobs_agree_with_lone_forward_passes(name, sampling):
    model = tiny_model(name)
    rollout = generate(model, make_prompts(), sampling)
    lengths = {len(c.token_ids) for c in rollout.samples}
    assert min(lengths) < SLIDING_WINDOW < max(lengths)
    plain = replace(sampling, temperature=1.0, top_p=1.0, top_k=0)
    for completion in [*rollout.samples, *rollout.greedy]:
        own = plain if completion.sample_index < 0 else sampling
        for logits, token, logprob in zip(
            plain_logits(model, completion), completion.token_ids, completion.logprobs, strict=True
        ):
            assert logprob == pytest.approx(math.log(literal_distribution(logits.tolist(), own)[token]), abs=1e-4)


def test_real_model(stories):
    model, prompts, eos = stories
    sampling = Sampling(48, (eos,), temperature=0.9, top_p=0.95)
    rollout = generate(model, prompts, sampling, pad=eos)
    assert ids_of(rollout.greedy) == greedy_of_transformers(model, prompts, 48, (eos,), eos)
    for completion in rollout.samples:
        rows = plain_logits(model, completion).tolist()
        probs = [
            literal_distribution(row, sampling)[token] for row, token in zip(rows, completion.token_ids, strict=True)
        ]
        assert completion.logprobs == pytest.approx([math.log(p) for p in probs], abs=1e-4)
    assert_same(generate(model, prompts[1:2], sampling, pad=eos), rollout)


def test_adapter_is_used(llama):
    prompts = make_prompts()
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5
    )
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), config).train()
    rollout = generate(model, prompts)
    model.eval()
    assert ids_of(rollout.greedy) == greedy_of_transformers(model, prompts, 20, EOS, 0)
    for completion in rollout.samples:
        expected = (
            plain_logits(model, completion).log_softmax(-1).gather(-1, torch.tensor(completion.token_ids)[:, None])
        )
        assert completion.logprobs == pytest.approx(expected[:, 0].tolist(), abs=1e-4)
    with model.disable_adapter():
        assert_same(generate(model, prompts), generate(llama, prompts))
    assert ids_of(rollout.greedy) != ids_of(generate(llama, prompts).greedy)


# What a completion may depend on


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_independent_of_the_batch(name):
    model, prompts = tiny_model(name), make_prompts()
    sampling = replace(SAMPLING, temperature=0.8, top_p=0.95)
    rollout = generate(model, prompts, sampling, samples=3)
    assert [(c.prompt.index, c.sample_index) for c in rollout.samples] == [
        (p.index, k) for p in prompts for k in range(3)
    ]
    assert [(c.prompt.index, c.sample_index) for c in rollout.greedy] == [(p.index, -1) for p in prompts]
    for prompt in prompts:
        assert_same(generate(model, [prompt], sampling, samples=3), rollout)
    assert_same(generate(model, prompts[::-1], sampling, samples=3), rollout)
    assert_same(generate(model, prompts, sampling, samples=2, greedy=False), rollout)
    assert_same(generate(model, prompts, sampling, samples=0), rollout)
    for max_rows in (1, 9, 100):
        grouped = generate(model, prompts, sampling, samples=3, max_rows=max_rows)
        assert_same(grouped, rollout)
        assert [c.prompt.index for c in grouped.greedy] == [p.index for p in prompts]


def test_greedy_ignores_sampling_settings(llama):
    prompts = make_prompts()
    plain = generate(llama, prompts)
    for warped in (replace(SAMPLING, temperature=0.01), replace(SAMPLING, temperature=9.0, top_p=0.1, top_k=2)):
        other = generate(llama, prompts, warped, seed=5)
        assert ids_of(other.greedy) == ids_of(plain.greedy)
        for one, two in zip(other.greedy, plain.greedy, strict=True):
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
        assert ids_of(other.samples) != ids_of(plain.samples)


def test_seed_step_and_sample_give_different_draws(llama):
    prompts = [Prompt(4, "", [1, 2, 3])]
    draws = [
        ids_of(generate(llama, prompts, samples=3, greedy=False, seed=seed, step=step).samples)
        for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    draws.append(ids_of(generate(llama, [Prompt(5, "", [1, 2, 3])], samples=3, greedy=False).samples))
    assert len({tuple(ids) for call in draws for ids in call}) == 12
    assert ids_of(generate(llama, prompts, samples=3).samples) == draws[0]


def test_generation_config_is_ignored():
    prompts = make_prompts()
    plain = generate(tiny_model("qwen3"), prompts)
    model = tiny_model("qwen3", use_cache=False)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, max_new_tokens=2, eos_token_id=list(range(50))
    )
    assert_same(generate(model, prompts), plain)


# The distribution that is sampled


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1, ()), Sampling(1, (), temperature=0.5, top_k=20), Sampling(1, (), temperature=1.5, top_p=0.7)],
    ids=["plain", "top_k", "top_p"],
)
def test_frequencies_match_probabilities(llama, sampling):
    num = 20_000
    rollout = generate(llama, [Prompt(0, "", [1, 2, 3])], sampling, samples=num, greedy=False)
    with torch.no_grad():
        probs = literal_distribution(llama(torch.tensor([[1, 2, 3]])).logits[0, -1].tolist(), sampling)
    counts = torch.bincount(torch.tensor(ids_of(rollout.samples))[:, 0], minlength=VOCAB_SIZE).tolist()
    assert all(count == 0 for count, prob in zip(counts, probs, strict=True) if prob == 0)
    frequent = [i for i, prob in enumerate(probs) if prob * num >= 5]
    chi_square = sum((counts[i] - num * probs[i]) ** 2 / (num * probs[i]) for i in frequent)
    freedom = len(frequent) - 1
    assert freedom >= 10
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_draw_inverts_the_cumulative_distribution():
    logprobs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log()
    cases = {0.0: 1, 0.249999: 1, 0.250001: 3, 0.749999: 3, 0.750001: 4, 1 - 2.0**-53: 4}
    uniform = torch.tensor(list(cases), dtype=torch.float64)
    assert draw(logprobs.expand(len(cases), -1), uniform).tolist() == list(cases.values())


def test_rare_tokens_are_drawn():
    """Steps of 1e-9 at either end of the cumulative distribution, far below float32's resolution at 1."""
    logprobs = torch.tensor([1e-9, 1.0, 1e-9]).log().log_softmax(-1)
    uniform = torch.tensor([0.5e-9, 1.5e-9, 1 - 1.5e-9, 1 - 0.5e-9], dtype=torch.float64)
    assert draw(logprobs.expand(4, -1), uniform).tolist() == [0, 1, 1, 2]


def test_tokens_without_probability_are_never_drawn():
    """Also at the very ends of [0, 1), where rounding of a floating-point sum would let them in."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 1000, generator=generator) * 5
    logits[torch.rand(logits.shape, generator=generator) < 0.9] = -torch.inf
    logprobs = logits.log_softmax(-1)
    for uniform in (0.0, 1e-300, 0.5, 1 - 2.0**-53):
        token = draw(logprobs, torch.full((500,), uniform, dtype=torch.float64))
        assert logprobs.gather(-1, token[:, None]).isfinite().all()


def test_nan_logits_stay_in_the_vocabulary_and_show():
    logits, uniform = torch.full((2, 7), torch.nan), torch.full((1,), 0.5, dtype=torch.float64)
    token, logprob = choose(logits, SAMPLING, uniform)
    assert ((token >= 0) & (token < 7)).all()
    assert logprob.isnan().all()


# Ends of completions


def test_eos_and_truncation(llama):
    prompt = Prompt(0, "", [1, 2, 3])
    tokens = generate(llama, [prompt], Sampling(8, ())).greedy[0].token_ids
    assert len(set(tokens)) == 8
    for last, token in enumerate(tokens):
        for limit in (last, last + 1, last + 2):
            if limit > 0:
                greedy = generate(llama, [prompt], Sampling(limit, (token,)), pad=token).greedy[0]
                assert greedy.token_ids == tokens[: last + 1][:limit]
                assert len(greedy.logprobs) == len(greedy.token_ids)
                assert greedy.truncated == (limit <= last)


# Work done


@pytest.mark.parametrize("num_eos", [20, 4])
def test_prompts_are_prefilled_once_and_finished_rows_leave(llama, num_eos):
    prompts = make_prompts()
    seen = []
    hook = llama.register_forward_hook(lambda *args: seen.append(tuple(args[-1].logits.shape)))
    sampling = replace(SAMPLING, max_completion_length=80, eos_token_ids=tuple(range(num_eos)))
    with forward_shapes(llama) as shapes:
        rollout = generate(llama, prompts, sampling, samples=4)
    hook.remove()
    assert shapes[0] == (6, 13)
    assert seen[0] == (6, 1, VOCAB_SIZE)
    lengths = [len(c.token_ids) for c in [*rollout.samples, *rollout.greedy]]
    expected, rows = [], 30
    for produced in range(1, max(lengths)):
        left = sum(length > produced for length in lengths)
        if left <= rows * 7 / 8:
            rows = left
        expected.append((rows, 1))
    assert shapes[1:] == expected
    assert expected[0][0] > 3 * expected[-1][0]


def test_max_rows_bounds_the_rows(llama):
    prompts = make_prompts()
    with forward_shapes(llama) as shapes:
        generate(llama, prompts, Sampling(3, ()), samples=2, max_rows=7)
    assert shapes == [(2, 13), (6, 1), (6, 1), (2, 7), (6, 1), (6, 1), (2, 2), (6, 1), (6, 1)]
    with forward_shapes(llama) as shapes:
        generate(llama, prompts[:2], Sampling(2, ()), samples=2, max_rows=2)
    assert shapes == [(1, 13), (3, 1), (1, 3), (3, 1)]


# The model around a call


def modes(model) -> list[bool]:
    return [module.training for module in model.modules()]


def test_modes_are_restored_and_dropout_is_off():
    prompts = make_prompts()
    plain = generate(tiny_model("gpt2"), prompts)
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    model.gradient_checkpointing_enable()
    model.transformer.h[1].eval()
    before = modes(model)
    assert_same(generate(model, prompts), plain)
    assert modes(model) == before
    with pytest.raises(IndexError):
        generate(model, [Prompt(0, "", [VOCAB_SIZE])])
    assert modes(model) == before
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0


def test_models_with_other_state_are_refused():
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}
    lfm2 = Lfm2Config(**sizes, **heads, layer_types=["conv", "full_attention"], pad_token_id=0)
    t5 = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    for model in (
        MambaForCausalLM(MambaConfig(**sizes)),
        Lfm2ForCausalLM(lfm2),
        T5ForConditionalGeneration(t5),
        OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=11, n_embd=8, n_layer=1, n_head=2)),
    ):
        with pytest.raises(UserError, match=f"of type {model.config.model_type}: "):
            EmbeddedEngine(model, pad_token_id=0)


def test_virtual_tokens_are_refused():
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UserError, match="PromptTuningConfig adapter"):
        EmbeddedEngine(model, pad_token_id=0)

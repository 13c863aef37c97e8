"""The paged engine beyond what every engine must do: its cache, its refusals, and the choice between engines.

transformers' continuous batching runs on the CPU as well, with sdpa and without CUDA graphs.
"""

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache

from remax.errors import UserError
from remax.interfaces import Completion, Prompt, Rollout, Sampling
from remax.rollout import paged
from remax.rollout.choice import make_engine
from remax.rollout.embedded import EmbeddedEngine
from remax.rollout.noise import uniforms
from remax.rollout.paged import PagedEngine, _Choice
from tiny_models import SLIDING_WINDOW, VOCAB_SIZE, tiny_model

pytest.register_assert_rewrite("engine_conformance")

from engine_conformance import SAMPLING, assert_same, ids_of, make_prompts, rows_of  # noqa: E402

SETTINGS: dict[str, Any] = {"num_samples": 3, "greedy": [True, False, True, True, False], "seed": 3, "step": 7}


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def expected(llama) -> Rollout:
    return EmbeddedEngine(llama, pad_token_id=0).generate(make_prompts(), SAMPLING, **SETTINGS)


def watch_configs(monkeypatch) -> list[Any]:
    """The resolved configuration of every manager from now on, as it is when the manager is destroyed."""
    configs: list[Any] = []
    manager = ContinuousBatchingManager
    original = manager.destroy
    monkeypatch.setattr(
        manager, "destroy", lambda self: (configs.append(self.continuous_batching_config), original(self))[1]
    )
    return configs


# Agreement


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mistral"])
def test_same_completions_as_the_embedded_engine(name):
    model, prompts = tiny_model(name), make_prompts()
    sampling = replace(SAMPLING, max_completion_length=20, temperature=0.9, top_p=0.9, top_k=40)
    rollout = PagedEngine(model).generate(prompts, sampling, **SETTINGS)
    assert max(len(c.prompt.token_ids) for c in rollout.samples) > SLIDING_WINDOW
    assert_same(rollout, EmbeddedEngine(model, pad_token_id=0).generate(prompts, sampling, **SETTINGS))


def test_same_completions_of_a_real_model(tinystories):
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    model = AutoModelForCausalLM.from_pretrained(tinystories)
    texts = ["Once upon a time", "Lily and Tom went to the park. They saw a big", "The"]
    prompts = [Prompt(n, text, tokenizer(text)["input_ids"]) for n, text in enumerate(texts)]
    sampling, settings = Sampling(40, (tokenizer.eos_token_id,)), {**SETTINGS, "greedy": True}
    rollout = PagedEngine(model, max_rows=5).generate(prompts, sampling, **settings)
    assert_same(rollout, EmbeddedEngine(model, pad_token_id=0).generate(prompts, sampling, **settings))
    assert len(tokenizer.decode(rollout.greedy[0].token_ids)) > 60


def test_bfloat16_weights_stay_bfloat16():
    model = tiny_model("llama").bfloat16()
    before = [parameter.clone() for parameter in model.parameters()]
    rollout = PagedEngine(model).generate(make_prompts(), SAMPLING, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with torch.no_grad():
        for completion in rollout.greedy:
            prompt, tokens = completion.prompt.token_ids, torch.tensor(completion.token_ids)
            logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1].float()
            logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            assert completion.logprobs == pytest.approx(logprobs.tolist(), abs=0.15)


def test_eager_attention_comes_back(expected, monkeypatch):
    model = tiny_model("llama", attn_implementation="eager")
    engine = PagedEngine(model)
    assert_same(engine.generate(make_prompts(), SAMPLING, **SETTINGS), expected)
    assert model.config._attn_implementation == "eager"

    def fail(manager: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ContinuousBatchingManager, "warmup", fail)
    with pytest.raises(ZeroDivisionError):
        engine.generate(make_prompts(), SAMPLING, **SETTINGS)
    assert model.config._attn_implementation == "eager"


# The cache and the batches


def test_prompts_longer_than_a_batch_are_read_in_pieces(llama, expected, monkeypatch):
    monkeypatch.setattr(paged, "_MAX_BATCH_TOKENS", 5)
    configs = watch_configs(monkeypatch)
    assert_same(PagedEngine(llama, max_rows=4).generate(make_prompts(), SAMPLING, **SETTINGS), expected)
    assert [(c.max_batch_tokens, c.max_requests_per_batch) for c in configs] == [(5, 2), (5, 4)]


def test_rows_wait_if_memory_is_short(llama, expected, monkeypatch):
    """18 rows need a page each; there is memory for fewer, and what is left of it is used."""
    engine = PagedEngine(llama)
    configs = watch_configs(monkeypatch)
    handler = paged_memory_handler()
    sizes = []
    original = handler._check_footprint

    def check(self: Any, *size: int) -> Any:
        sizes.append(size)
        if len(sizes) == 1:
            raise MemoryError
        return original(self, size[0], 4)

    monkeypatch.setattr(handler, "_check_footprint", check)
    assert_same(engine.generate(make_prompts(), SAMPLING, **SETTINGS), expected)
    assert len(sizes) == 2
    assert [c.num_blocks for c in configs] == [20, 4], "of the one that found too little, which is destroyed too"


def paged_memory_handler() -> Any:
    from transformers.generation.continuous_batching import cache

    return cache.PagedAttentionMemoryHandler


def test_nothing_of_the_cache_is_left(llama, monkeypatch):
    caches: list[int] = []
    original = PagedAttentionCache.__init__
    monkeypatch.setattr(
        PagedAttentionCache, "__init__", lambda self, *a, **k: (caches.append(1), original(self, *a, **k))[1]
    )
    engine = PagedEngine(llama)
    for _ in range(2):
        engine.generate(make_prompts(), SAMPLING, **SETTINGS)
    gc.collect()
    assert len(caches) == 3
    assert not [thing for thing in gc.get_objects() if type(thing) is PagedAttentionCache]
    assert not hasattr(llama, "_cached_continuous_batching_manager")
    assert gc.get_freeze_count() == 0


def test_padded_rows_write_where_nobody_reads():
    """A CUDA graph runs for more rows than there are; the slots of these must not be those of a former batch."""
    prompts, sampling = [Prompt(4, "", [1, 2, 3]), Prompt(9, "", [1])], Sampling(5, ())
    completions = [Completion(p, k, [], [], truncated=False) for p in prompts for k in (-1, 0)]
    choice = _Choice(completions, sampling, 1, 2, torch.device("cpu"), 4)
    assert choice.logprobs_of_rows() == [[0.0] * 5] * 4
    storage = torch.zeros(4, dtype=torch.int32)
    choice.fill_defaults(storage)
    assert storage.tolist() == [20] * 4

    def request(row: str, position_offset: int) -> Any:
        return SimpleNamespace(state=SimpleNamespace(request_id=row, position_offset=position_offset))

    # Row 3 has read its prompt and two tokens, row 0 its prompt, row 2 is one beyond its limit.
    args = choice.prepare_tensor_args([request("3", 3), request("0", 3), request("2", 6)])
    assert args.tolist() == [17, 0, 20, 20]
    assert args.dtype == torch.int32
    assert choice.prepare_tensor_args([request("__warmup_DECODING_0__", 1)]).tolist() == [20] * 4
    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    scores = choice(logits.clone(), args)
    uniform = uniforms(1, 2, torch.tensor(9), torch.tensor(0), 2)
    drawn = int((logits[0].double().softmax(0).cumsum(0) <= uniform).sum())
    likeliest = int(logits[1].argmax())
    assert scores.argmax(-1)[:2].tolist() == [drawn, likeliest]
    logprobs = logits.log_softmax(-1)
    written = {(row, t): x for row, values in enumerate(choice.logprobs_of_rows()) for t, x in enumerate(values) if x}
    assert written == {(3, 2): logprobs[0, drawn].item(), (0, 0): logprobs[1, likeliest].item()}


def test_an_error_in_the_generation_thread_is_raised(llama):
    engine = PagedEngine(llama)
    hook = llama.model.layers[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("in the thread")))
    with pytest.raises(KeyError, match="in the thread"):
        engine.generate(make_prompts(), SAMPLING, **SETTINGS)
    hook.remove()
    assert len(engine.generate(make_prompts(), SAMPLING, **SETTINGS).samples) == 15


def test_no_prompts_give_no_rows(llama):
    rollout = PagedEngine(llama).generate([], SAMPLING, num_samples=2, greedy=True, seed=0, step=0)
    assert rows_of(rollout) == []


# Refusals


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gemma2", "soft cap"), ("gpt_neox", r"fails \(RuntimeError\)"), ("bloom", "change by .* nats")],
)
def test_models_that_pages_would_change_are_refused(name, reason):
    with pytest.raises(UserError, match=f"of type {name}: .*{reason}.*set --rollout_engine embedded"):
        PagedEngine(tiny_model(name))


def test_virtual_tokens_are_refused():
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UserError, match="virtual tokens"):
        PagedEngine(model)


def test_float32_weights_are_refused_under_autocast(llama, expected):
    engine = PagedEngine(llama)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="--bf16 and --dtype float32"):
        engine.generate(make_prompts(), SAMPLING, **SETTINGS)
    assert ids_of(engine.generate(make_prompts(), SAMPLING, **SETTINGS).greedy) == ids_of(expected.greedy)


# The choice


class OnCuda:
    """A model that claims to be on a CUDA device."""

    def __init__(self, model: Any, attention: str = "sdpa") -> None:
        self.model, self.device, self.dtype = model, torch.device("cuda", 0), model.dtype
        self.config = SimpleNamespace(_attn_implementation=attention)


@pytest.fixture
def made(monkeypatch) -> list[tuple[str, dict[str, int]]]:
    """Which engines were made with what, none for real."""
    calls: list[tuple[str, dict[str, int]]] = []
    monkeypatch.setattr(paged, "PagedEngine", lambda model, **settings: calls.append(("paged", settings)))
    monkeypatch.setattr(
        "remax.rollout.choice.EmbeddedEngine", lambda model, **settings: calls.append(("embedded", settings))
    )
    return calls


EMBEDDED = ("embedded", {"pad_token_id": 2, "max_rows": 6})
PAGED = ("paged", {"max_rows": 6})


@pytest.mark.parametrize(
    ("name", "attention", "bf16", "engine", "reason"),
    [
        ("embedded", "flash_attention_2", False, EMBEDDED, "embedded, as --rollout_engine says"),
        ("paged", "flash_attention_2", False, PAGED, "paged, as --rollout_engine says"),
        ("paged", "sdpa", False, PAGED, "paged, as --rollout_engine says; slow without --attn_implementation flash"),
        ("auto", "sdpa", False, EMBEDDED, "embedded, for the paged engine gains nothing without flash attention"),
        ("auto", "flash_attention_2", False, PAGED, "paged, for flash attention reads its pages in place"),
        ("auto", "kernels-community/flash-attn3", False, PAGED, "paged, for flash attention reads its pages in place"),
        ("auto", "flash_attention_2", True, EMBEDDED, "embedded, for another cannot be used: .*--dtype float32"),
    ],
)
def test_choice_on_cuda(llama, made, name, attention, bf16, engine, reason):
    _, why = make_engine(name, OnCuda(llama, attention), pad_token_id=2, max_rows=6, bf16=bf16)
    assert made == [engine]
    assert why.startswith(reason.split(".*")[0])
    assert why.count(reason.split(".*")[-1]) == 1


def test_auto_takes_the_embedded_engine_if_the_paged_one_refuses(llama, made, monkeypatch):
    def refuse(*args: Any, **settings: Any) -> Any:
        raise UserError("not this model")

    monkeypatch.setattr(paged, "PagedEngine", refuse)
    _, why = make_engine("auto", OnCuda(llama, "flash_attention_2"), pad_token_id=2, max_rows=6)
    assert made == [EMBEDDED]
    assert why == "embedded, for another cannot be used: not this model"


def test_choice_on_the_cpu(llama):
    engine, why = make_engine("auto", llama, pad_token_id=0)
    assert type(engine) is EmbeddedEngine
    assert why == "embedded, for the model is on the cpu"
    with pytest.raises(UserError, match="--rollout_engine is paged: it is made for CUDA, and the model is on the cpu"):
        make_engine("paged", llama, pad_token_id=0)


def test_paged_needs_16_bits_under_autocast(llama):
    with pytest.raises(UserError, match="--bf16 and --dtype float32"):
        make_engine("paged", OnCuda(llama), pad_token_id=0, bf16=True)

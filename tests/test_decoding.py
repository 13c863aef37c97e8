"""Faster kernels and fixed addresses change no completion, and a recorded step replays as it ran."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from remax.interfaces import Prompt, Rollout, Sampling
from remax.rollout import kernels, static
from remax.rollout.draw import choose
from remax.rollout.embedded import EmbeddedEngine
from remax.rollout.kernels import decoding_kernels, single_query_attention
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_model

EOS = tuple(range(5, 97, 16))
SAMPLING = Sampling(max_completion_length=90, eos_token_ids=EOS[:2], temperature=0.9, top_p=0.95)
SLIDING = ("mistral", "gemma2")


def make_prompts(lengths: tuple[int, ...] = (3, 13, 1, 7, 9, 2)) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(index=10 * n + 1, content="", token_ids=ids) for n, ids in enumerate(rows)]


def generate(
    model: Any, sampling: Sampling = SAMPLING, *, static: bool = False, max_rows: int = 0, **settings: Any
) -> Rollout:
    settings = {"num_samples": 3, "greedy": [True, False, True, True, True, True], "seed": 0, "step": 0, **settings}
    engine = EmbeddedEngine(model, pad_token_id=0, max_rows=max_rows, static=static)
    return engine.generate(make_prompts(), sampling, **settings)


def assert_same(some: Rollout, others: Rollout, tolerance: float = 1e-4) -> None:
    rows, other_rows = ([*rollout.samples, *rollout.greedy] for rollout in (some, others))
    for one, other in zip(rows, other_rows, strict=True):
        assert (one.prompt, one.sample_index) == (other.prompt, other.sample_index)
        assert one.token_ids == other.token_ids
        assert one.truncated == other.truncated
        assert one.logprobs == pytest.approx(other.logprobs, abs=tolerance)


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5)
    return get_peft_model(model, config)


# Fixed addresses


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in SLIDING])
def test_fixed_addresses_change_no_completion(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = tiny_model(name), []
    run = static.Recordings.run
    monkeypatch.setattr(
        static.Recordings, "run", lambda self, shape, step: (shapes.append(shape), run(self, shape, step))
    )
    plain = generate(model)
    assert shapes == []
    assert_same(generate(model, static=True), plain)
    assert shapes[0] == ((18, 5), 80)
    assert [columns for _, columns in shapes] == sorted(columns for _, columns in shapes)
    assert {columns for _, columns in shapes} == {80, 104}
    assert [size for size, _ in shapes] == list(expected_sizes(plain, (18, 5)))
    assert_same(generate(model, static=True, max_rows=8), plain)


def expected_sizes(rollout: Rollout, full: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The smallest stage that holds the rows that are not finished, looked up at every eighth step."""
    for t in range(1, max(len(c.token_ids) for c in [*rollout.samples, *rollout.greedy]) + 7):
        if t % 8 == 1:
            left = [sum(len(c.token_ids) > t for c in rows) for rows in (rollout.samples, rollout.greedy)]
            size = min(s for s in static.stages(*full) if s[0] >= left[0] and s[1] >= left[1])
            if left == [0, 0]:
                return
        if t < SAMPLING.max_completion_length:
            yield size


@pytest.mark.parametrize("settings", [{"num_samples": 0, "greedy": True}, {"greedy": False}], ids=["greedy", "sampled"])
def test_fixed_addresses_with_one_kind_of_rows(settings: dict[str, Any]) -> None:
    model = tiny_model("llama")
    assert_same(generate(model, static=True, **settings), generate(model, **settings))


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10])
def test_fixed_addresses_with_short_completions(length: int) -> None:
    model, sampling = tiny_model("llama"), replace(SAMPLING, max_completion_length=length)
    assert_same(generate(model, sampling, static=True), generate(model, sampling))


def test_fixed_addresses_with_an_adapter_and_checkpointing() -> None:
    model = adapted(tiny_model("llama"))
    model.gradient_checkpointing_enable()
    model.train()
    assert_same(generate(model, static=True), generate(model))


def test_sliding_windows_are_decoded_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static.StaticBatch, "decode", lambda *_: pytest.fail("a window has no fixed addresses"))
    for name in SLIDING:
        generate(tiny_model(name), static=True)


def test_stages() -> None:
    assert static.stages(8, 4) == [(8, 4), (6, 3), (4, 2), (3, 2), (2, 1), (1, 1)]
    assert static.stages(5, 0) == [(5, 0), (4, 0), (3, 0), (2, 0), (1, 0)]
    assert static.stages(0, 1) == [(0, 1)]


WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "lift_fresh")
"""Operations in which a CUDA device is waited for, or sent something from the host."""


class Tape(TorchDispatchMode):
    """Notes operations as a CUDA graph does: which tensors they read and where their results went, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.changed: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        assert name.rstrip("_") not in WAITS, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask's size is not fixed"
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.changed.setdefault(id(value), (value, value.clone()))
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        for tensor, before in self.changed.values():
            tensor.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            if func._schema.is_mutable:
                func(*args, **kwargs)
                continue
            again = func(*args, **kwargs)
            for old, new in zip(tree_iter(result), tree_iter(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """Takes the place of the CUDA recorder."""

    def __init__(self) -> None:
        self.num_warm_ups = self.num_records = self.num_replays = 0

    def warm_up(self, step: Callable[[], None]) -> bool:
        self.num_warm_ups += 1
        step()
        return True

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        self.num_records += 1
        with Tape() as tape:
            step()
        tape.undo()

        def replay() -> None:
            self.num_replays += 1
            tape.replay()

        return replay


@pytest.mark.parametrize("name", ["llama", "gpt2", "adapter"])
@pytest.mark.parametrize("sampling", [SAMPLING, replace(SAMPLING, temperature=1.0, top_p=1.0, top_k=7)])
def test_a_recorded_step_replays_as_it_ran(name: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_model("llama")) if name == "adapter" else tiny_model(name)
    not_recorded = generate(model, sampling, static=True)
    recorder = TapeRecorder()
    monkeypatch.setattr(static, "_recorder", lambda device: recorder)
    assert_same(generate(model, sampling, static=True), not_recorded, tolerance=0)
    assert recorder.num_warm_ups >= recorder.num_records > 1
    assert recorder.num_replays > 20


def test_a_step_that_cannot_be_recorded_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(TapeRecorder):
        def warm_up(self, step: Callable[[], None]) -> bool:
            super().warm_up(step)
            return False

        def record(self, step: Callable[[], None]) -> Callable[[], None]:
            raise AssertionError

    monkeypatch.setattr(static, "_recorder", lambda device: Refusing())
    model = tiny_model("llama")
    assert_same(generate(model, static=True), generate(model))


def test_without_a_recording_the_steps_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(TapeRecorder):
        def record(self, step: Callable[[], None]) -> None:
            self.num_records += 1

    recorder = Failing()
    monkeypatch.setattr(static, "_recorder", lambda device: recorder)
    model = tiny_model("llama")
    assert_same(generate(model, static=True), generate(model))
    assert recorder.num_records == 1


def test_a_step_that_is_broken_off_can_be_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As happens on CUDA when the model waits for the device; here the break comes at the last moment."""

    class BreakingOff(TapeRecorder):
        def warm_up(self, step: Callable[[], None]) -> bool:
            with monkeypatch.context() as patch:
                patch.setattr(static, "choose", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
                with pytest.raises(RuntimeError, match="broken"):
                    step()
            return super().warm_up(step)

    monkeypatch.setattr(static, "_recorder", lambda device: BreakingOff())
    model = tiny_model("llama")
    assert_same(generate(model, static=True), generate(model))


# Kernels


@pytest.fixture
def small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels._packs():
        pytest.skip("oneDNN packs no weights on this processor")
    monkeypatch.setattr(kernels, "_MIN_ELEMENTS", 0)


@pytest.mark.usefixtures("small_weights_too")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2", "gemma2", "adapter"])
def test_packed_weights_change_no_completion(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_model("llama")) if name == "adapter" else tiny_model(name)
    monkeypatch.setattr(kernels, "can_be_lean", lambda body: False)
    products = []
    pack = kernels._product_of
    monkeypatch.setattr(kernels, "_product_of", lambda layer: products.append(layer) or pack(layer))
    packed = generate(model)
    assert len(products) == len(kernels._linear_layers(model)) > 8
    monkeypatch.setattr(kernels, "_packs", lambda: False)
    assert_same(packed, generate(model))
    assert len(products) == len(kernels._linear_layers(model))


@pytest.mark.usefixtures("small_weights_too")
def test_weights_are_packed_anew_and_let_go() -> None:
    model = tiny_model("llama")
    layer, inputs = model.model.layers[0].self_attn.o_proj, torch.randn(3, 2, 32)
    with decoding_kernels(model, 16):
        assert {"forward"} <= vars(layer).keys() & vars(model.model).keys()
        assert torch.allclose(layer(inputs), nn.functional.linear(inputs, layer.weight), atol=1e-5)
    with pytest.raises(IndexError):
        EmbeddedEngine(model, pad_token_id=0).generate(
            [Prompt(0, "", [VOCAB_SIZE])], SAMPLING, num_samples=1, greedy=True, seed=0, step=0
        )
    assert not any("forward" in vars(module) for module in model.modules())
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    with torch.no_grad():
        layer.weight.add_(1.0)
    with decoding_kernels(model, 16):
        assert torch.allclose(layer(inputs), nn.functional.linear(inputs, layer.weight), atol=1e-4)
    with decoding_kernels(model, 15):  # not worth it
        assert not {"forward"} & (vars(layer).keys() | vars(model.model).keys())


@pytest.mark.parametrize(("name", "passes_by"), [("llama", True), ("qwen2", True), ("qwen3", True), ("mistral", False)])
def test_single_tokens_pass_the_modules_by_and_no_completion_changes(
    name: str, passes_by: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(The tiny Mistral has a sliding window.)"""
    model, widths = tiny_model(name), []
    generator = torch.Generator().manual_seed(0)
    for parameter in model.base_model.parameters():
        if parameter.dim() == 1:  # norms and biases, which begin as ones and zeros
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    layer = type(model.model.layers[0])
    forward = layer.forward

    def watched(self: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        widths.append(states.shape[1])
        return forward(self, states, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", watched)
    lean = generate(model)
    assert (1 not in widths) == passes_by
    monkeypatch.setattr(kernels, "can_be_lean", lambda body: False)
    assert_same(lean, generate(model))
    assert 1 in widths


def test_an_attention_of_somebody_elses_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(*args: Any, **kwargs: Any) -> Any:
        output, weights = sdpa_attention_forward(*args, **kwargs)
        return output / 2, weights

    model = tiny_model("llama")
    with decoding_kernels(model, 16):
        assert "forward" in vars(model.model)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "halved", halved)
    model.config._attn_implementation = "halved"
    with decoding_kernels(model, 16):
        assert "forward" not in vars(model.model)
    model.config._attn_implementation = "sdpa"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", halved)
    with decoding_kernels(model, 16):
        assert "forward" not in vars(model.model)


def test_a_body_that_somebody_patched_stays_patched() -> None:
    model, calls = tiny_model("llama"), []
    forward = model.model.forward
    model.model.forward = own = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    rollout = generate(model)
    assert len(calls) >= max(len(c.token_ids) for c in rollout.samples)
    assert vars(model.model)["forward"] is own


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "adapter", "hook", "positions for a part of a head"])
def test_other_models_are_left_their_modules(name: str) -> None:
    model = (
        adapted(tiny_model("llama")) if name == "adapter" else tiny_model(name if name in ARCHITECTURES else "llama")
    )
    body = model.get_base_model().model if name == "adapter" else model.base_model
    if name == "hook":
        body.layers[1].mlp.register_forward_hook(lambda *_: None)
    elif name.startswith("positions"):
        body.rotary_emb.inv_freq = body.rotary_emb.inv_freq[:1]
    assert not kernels.can_be_lean(body)


@pytest.mark.usefixtures("small_weights_too")
def test_what_somebody_else_put_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = own = layer.forward
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", other := lambda *args, **kwargs: None)
    with decoding_kernels(model, 16):
        assert vars(layer)["forward"] is own
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other
    assert vars(layer)["forward"] is own
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "adapter"])
@pytest.mark.parametrize("at_fixed_addresses", [False, True])
def test_weights_cast_once_give_the_bits_of_autocast(
    name: str, at_fixed_addresses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny_model("llama")) if name == "adapter" else tiny_model(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_once = generate(model, static=at_fixed_addresses)
        monkeypatch.setattr("remax.rollout.embedded.decoding_kernels", lambda *_: nullcontext())
        assert_same(cast_once, generate(model, static=at_fixed_addresses), tolerance=0)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_single_queries_attend_as_sdpa_does(key_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 1, 4, 8, generator=generator).transpose(1, 2)
    key, value = torch.randn(2, 3, key_heads, 12, 8, generator=generator)[:, :, :, 2:9].unbind()
    seen = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]]).bool()[:, None, None]
    module = nn.Module()
    module.num_key_value_groups = 4 // key_heads
    for mask in (None, seen, torch.where(seen, 0.0, -torch.inf), torch.rand(3, 1, 1, 7, generator=generator)):
        for scaling in (None, 0.7):
            ours, _ = single_query_attention(module, query, key, value, mask, scaling=scaling)
            theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
            assert torch.allclose(ours, theirs, atol=1e-6)
            assert ours.shape == theirs.shape == (3, 1, 4, 8)


# The choice of a token


def test_rows_are_chosen_by_their_kind() -> None:
    """By the definitions, row by row in float64."""
    logits = 3 * torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    uniform = torch.tensor([0.3, 0.0, 0.9999], dtype=torch.float64)
    token, logprob = choose(logits, Sampling(1, (), temperature=0.5), uniform)
    for row in range(5):
        probs = (logits[row].double() / (0.5 if row < 3 else 1.0)).softmax(-1).tolist()
        if row < 3:
            expected = next(i for i in range(11) if sum(probs[: i + 1]) > uniform[row])
        else:
            expected = max(range(11), key=lambda i: probs[i])
        assert token[row] == expected
        assert logprob[row].exp().item() == pytest.approx(probs[expected], rel=1e-5)

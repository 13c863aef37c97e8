"""Frozen models that rest in the CPU's memory: the same storages, bit for bit, before and after a phase."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remax.config import ReMaxConfig
from remax.interfaces import Completion, Prompt
from remax.loading import load_reference, load_rewards, place_reference
from remax.placement import Placed
from remax.precision import hold_in_bfloat16
from remax.rewards import RewardModel
from test_reward_models import reward_llama
from tiny_models import tiny_model
from toy_tokenizers import toy_tokenizer


class Elsewhere(Placed):
    """Another device, played by copies in the same memory."""

    def _copy(self, data: Tensor) -> Tensor:
        return data.clone()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.data for name, tensor in named}


def places(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors(model).items()}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(torch.arange(8).unsqueeze(0)).logits
    return output


@pytest.fixture
def tied() -> Any:
    model: Any = tiny_model("llama", tie_word_embeddings=True).requires_grad_(False)
    # Another parameter over the same memory, as some checkpoints tie.
    model.model.layers[0].mlp.gate_proj.weight = nn.Parameter(
        model.model.layers[0].mlp.up_proj.weight.data, requires_grad=False
    )
    return model


def test_every_tensor_is_swapped_and_comes_back(tied: Any) -> None:
    placed = Elsewhere(tied, "cpu", "offload")
    before, at_rest, expected = places(tied), {k: v.clone() for k, v in tensors(tied).items()}, logits(tied)
    assert any("inv_freq" in name for name in before)
    for _ in range(2):
        with placed.on_device():
            during = places(tied)
            assert not set(during.values()) & set(before.values())
            assert tied.lm_head.weight is tied.model.embed_tokens.weight
            assert during["model.layers.0.mlp.gate_proj.weight"] == during["model.layers.0.mlp.up_proj.weight"]
            assert len(set(during.values())) == len(set(before.values())), "what was shared is still shared"
            assert torch.equal(logits(tied), expected)
        assert places(tied) == before
        assert all(torch.equal(tensor, at_rest[name]) for name, tensor in tensors(tied).items())


def test_the_copies_are_dropped(tied: Any) -> None:
    copies = []

    class Noted(Elsewhere):
        def _copy(self, data: Tensor) -> Tensor:
            copy = super()._copy(data)
            copies.append(torch.multiprocessing.reductions.StorageWeakRef(copy.untyped_storage()))
            return copy

    placed = Noted(tied, "cpu", "offload")
    with placed.on_device():
        assert copies
        assert not any(copy.expired() for copy in copies)
    assert all(copy.expired() for copy in copies)


def test_an_error_restores_too(tied: Any) -> None:
    placed = Elsewhere(tied, "cpu", "offload")
    before = places(tied)
    with pytest.raises(KeyError), placed.on_device():
        raise KeyError
    assert places(tied) == before


def test_an_error_while_copying_restores_too(tied: Any) -> None:
    class Full(Elsewhere):
        left = 5

        def _copy(self, data: Tensor) -> Tensor:
            self.left -= 1
            if not self.left:
                raise torch.OutOfMemoryError
            return super()._copy(data)

    placed = Full(tied, "cpu", "offload")
    before = places(tied)
    with pytest.raises(torch.OutOfMemoryError), placed.on_device():
        pass
    assert places(tied) == before
    with placed.on_device():
        assert not set(places(tied).values()) & set(before.values()), "it can be opened again"


def test_opened_again_inside_nothing_happens(tied: Any) -> None:
    placed = Elsewhere(tied, "cpu", "offload")
    before = places(tied)
    with placed.on_device():
        during = places(tied)
        with placed.on_device():
            assert places(tied) == during
        assert places(tied) == during
    assert places(tied) == before


class OnDevice(Tensor):
    """A tensor that pretends to be on another device until it is asked for on the CPU."""

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor).clone()


def test_what_forward_made_on_the_device_rests_too(tied: Any) -> None:
    """As dynamic RoPE does with its frequencies."""
    placed = Elsewhere(tied, "cpu", "offload")
    with placed.on_device():
        made = torch.full((4,), 2.0).as_subclass(OnDevice)
        tied.model.rotary_emb.register_buffer("inv_freq", made, persistent=False)
        there = made.data_ptr()
    assert tied.model.rotary_emb.inv_freq.tolist() == [2.0] * 4
    assert tied.model.rotary_emb.inv_freq.data_ptr() != there


def test_what_was_cast_meanwhile_is_what_is_copied() -> None:
    model = tiny_model("llama").requires_grad_(False)
    placed = Elsewhere(model, "cpu", "offload")
    with placed.on_device():
        pass
    hold_in_bfloat16(model)
    before = places(model)
    with placed.on_device():
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        assert not set(places(model).values()) & set(before.values())
    assert places(model) == before


def test_copies_that_are_made_in_inference_mode_can_be_used_outside_of_it(tied: Any) -> None:
    placed = Elsewhere(tied, "cpu", "offload")
    with torch.inference_mode(), placed.on_device():
        assert not any(tensor.is_inference() for tensor in tied.parameters())


@pytest.mark.parametrize("placement", ["resident", "offload"])
def test_on_the_cpu_nothing_moves(tied: Any, placement: Any) -> None:
    before = places(tied)
    placed = Placed(tied, torch.device("cpu"), placement)
    with placed.on_device():
        assert places(tied) == before
    assert places(tied) == before


def test_resident_model_goes_to_the_device_at_once() -> None:
    model = tiny_model("llama")
    Placed(model, "meta")
    assert {tensor.device.type for tensor in tensors(model).values()} == {"meta"}


@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_going_to_be_sharded_does_not_go_to_the_device_whole(sharded: bool, tmp_path: Path) -> None:
    reward_llama().save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    device = torch.device("meta")
    rewards, tokenizers = [str(tmp_path), reward_llama()], [None, toy_tokenizer()]
    loaded, given = load_rewards(rewards, tokenizers, 4, device, conversational=False, sharded=sharded)
    reference = load_reference(tiny_model("llama"))
    place_reference(reference, None, ReMaxConfig(), device, sharded=sharded)
    for model in (loaded.model, reference.model):
        assert next(model.parameters()).device.type == ("cpu" if sharded else "meta")
    assert next(given.model.parameters()).device.type == "meta", "its owner's: it is not sharded"


def test_reward_model_scores_alike_and_only_there() -> None:
    scored = [Completion(Prompt(0, "a", [1]), 0, [2], [], truncated=False, text=text) for text in ("b c", "d e f")]
    model = reward_llama()
    expected = RewardModel(model, toy_tokenizer())(scored)
    offloaded = RewardModel(model, toy_tokenizer(), device="cpu", placement="offload")
    offloaded.placed = Elsewhere(model, "cpu", "offload")
    before, seen = places(model), []
    model.register_forward_hook(lambda *_: seen.append(places(model)))
    assert offloaded(scored) == expected
    assert seen
    assert not any(set(during.values()) & set(before.values()) for during in seen)
    assert places(model) == before

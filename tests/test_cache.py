"""The cache with room for new tokens holds what transformers' growing cache holds, and changes no completion."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from remax.interfaces import Prompt, Sampling
from remax.rollout import embedded
from remax.rollout.cache import RoomyLayer, make_cache
from tiny_models import tiny_model

CONFIG = LlamaConfig(num_hidden_layers=2)


def states(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 4, tokens, 8, generator=generator).unbind()
    return keys, values


def test_it_holds_what_the_growing_cache_holds() -> None:
    ours, theirs = make_cache(CONFIG, 3), DynamicCache(config=CONFIG)
    assert all(type(layer) is RoomyLayer for layer in ours.layers)
    for step, (rows, tokens, keep) in enumerate([(2, 5, [1, 0, 1, 1]), (4, 1, [3, 0]), (2, 1, [0, 1]), (2, 1, [1])]):
        for layer in range(2):
            keys, values = states(rows, tokens, 10 * step + layer)
            for mine, other in zip(ours.update(keys, values, layer), theirs.update(keys, values, layer), strict=True):
                assert torch.equal(mine, other)
        assert ours.get_seq_length() == theirs.get_seq_length() == 5 + step
        for cache in (ours, theirs):
            cache.batch_select_indices(torch.tensor(keep))
    with pytest.raises(AssertionError, match="more tokens than there was room"):
        ours.update(*states(1, 1, 0), 0)


def test_under_autocast_keys_are_cast_once_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' layer keeps the float32 keys of the rotary embedding, and attention casts them at every token."""
    engine = embedded.EmbeddedEngine(tiny_model("llama"), pad_token_id=0)
    prompts = [Prompt(i, "", list(range(3, 5 + i))) for i in range(4)]
    types, update = set(), RoomyLayer.update

    def watched(layer: RoomyLayer, *args: Any) -> Any:
        keys, values = update(layer, *args)
        types.add((args[0].dtype, keys.dtype, values.dtype))
        return keys, values

    def generate() -> list[tuple[list[int], list[float]]]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rollout = engine.generate(prompts, Sampling(24, (7,)), num_samples=2, greedy=True, seed=0, step=1)
        return [(c.token_ids, c.logprobs) for c in [*rollout.samples, *rollout.greedy]]

    monkeypatch.setattr(RoomyLayer, "update", watched)
    cast_once = generate()
    assert types == {(torch.float32, torch.bfloat16, torch.bfloat16)}
    monkeypatch.setattr(embedded, "make_cache", lambda config, num_new_tokens: DynamicCache(config=config))
    assert cast_once == generate()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
def test_it_changes_no_completion(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(architecture)
    engine = embedded.EmbeddedEngine(model, pad_token_id=0)
    prompts = [Prompt(i, "", list(range(3, 5 + i))) for i in range(4)]
    sampling = Sampling(24, tuple(range(0, 60, 7)))

    def generate() -> list[tuple[list[int], list[float]]]:
        rollout = engine.generate(prompts, sampling, num_samples=2, greedy=True, seed=0, step=1)
        return [(c.token_ids, c.logprobs) for c in [*rollout.samples, *rollout.greedy]]

    with_room = generate()
    monkeypatch.setattr(embedded, "make_cache", lambda config, num_new_tokens: DynamicCache(config=config))
    growing = generate()
    assert len({len(ids) for ids, _ in with_room}) > 1, "rows have to leave the batch at different times"
    for (ids, logprobs), (expected_ids, expected_logprobs) in zip(with_room, growing, strict=True):
        assert ids == expected_ids
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-5)

"""Saved models: the one in memory, merged and whole on the disk."""

# ruff: noqa: F811

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from remax.config import ModelOptions
from remax.models import add_adapter, load_policy, load_reward_model, new_reward_model, quiet
from remax.saving import save_model
from remax.sharding import kept
from small_policies import LORA, assert_close, folder, logits, policy, saved, stir  # noqa: F401
from tiny_models import tiny_model
from toy_tokenizers import EOS, PAD, VOCAB_SIZE, toy_tokenizer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_model_is_the_model_in_memory(tied: bool, tmp_path: Path) -> None:
    policy = tiny_model("llama", vocab_size=VOCAB_SIZE, tie_word_embeddings=tied)
    before, config = weights(policy), policy.config.to_dict()
    tokenizer = toy_tokenizer("<s> $A", bos_token="<s>")
    save_model(policy, tokenizer, tmp_path / "model", eos_token_ids=[EOS, 4])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(policy))
    assert loaded.generation_config.eos_token_id == [EOS, 4]
    assert loaded.generation_config.pad_token_id == PAD
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("ab")["input_ids"] == tokenizer("ab")["input_ids"]
    assert_unchanged(policy, before)
    assert policy.config.to_dict() == config
    assert ("lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")) is not tied
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_process_that_only_helps_gathering_keeps_and_writes_nothing(tmp_path: Path) -> None:
    policy = tiny_model("llama", vocab_size=VOCAB_SIZE)
    drawn = kept(policy, ((name, tensor) for name, tensor in policy.named_parameters()), keeps=False)
    assert drawn == {}
    written: list[Any] = []
    save_model(policy, toy_tokenizer(), tmp_path / "model", on_main=written.append, is_main=False)
    (write,) = written
    with pytest.raises(AttributeError, match="NoneType"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapter_is_merged_on_disk_and_untouched_in_memory(name: str, tmp_path: Path) -> None:
    base = tiny_model(name, vocab_size=VOCAB_SIZE)
    base.save_pretrained(tmp_path / "base")
    adapted = add_adapter(base, LORA).eval()
    stir(adapted)
    before, expected = weights(adapted), logits(adapted)
    with adapted.disable_adapter():
        assert (logits(adapted) - expected).abs().max() > 0.1
    there = saved(adapted, tmp_path / "model", eos_token_ids=[EOS])
    assert_unchanged(adapted, before)
    assert torch.equal(logits(adapted), expected)
    # AutoModel would apply an adapter_config.json beside the weights a second time.
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    assert_close(logits(AutoModelForCausalLM.from_pretrained(there)), expected)
    assert_close(logits(load_policy(there, ModelOptions(), flag="--model")), expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with quiet():
        alone = PeftModel.from_pretrained(base, str(tmp_path / "model" / "adapter"))
    assert_close(logits(alone), expected)


def test_adapter_of_a_reward_model_is_merged_with_its_head(folder: str, tmp_path: Path) -> None:
    tokenizer = toy_tokenizer(pad_token=None)
    model = new_reward_model(folder, LORA, tokenizer, seed=1, flag="--model")
    stir(model)
    with torch.no_grad():
        model.get_base_model().score.modules_to_save["default"].weight.mul_(3.0)
    expected = logits(model.eval())
    before = weights(model)
    save_model(model, tokenizer, tmp_path / "reward")
    assert_unchanged(model, before)
    loaded = load_reward_model(str(tmp_path / "reward"), flag="--reward_model")
    assert_close(logits(loaded), expected)
    assert loaded.config.pad_token_id == VOCAB_SIZE


def test_saving_again_replaces_the_model_and_a_failure_keeps_the_former_one(
    policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = saved(policy, tmp_path / "model")
    (tmp_path / "model" / "left-over.txt").touch()
    former = logits(policy)
    with torch.no_grad():
        policy.lm_head.weight.mul_(2.0)

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    tokenizer = toy_tokenizer()
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", full_disk)
        with pytest.raises(OSError, match="no space"):
            save_model(policy, tokenizer, tmp_path / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(there)), former)
    saved(policy, tmp_path / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(there)), logits(policy))
    assert not (tmp_path / "model" / "left-over.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_checkpoint_with_a_contradictory_generation_config_can_be_saved(policy: Any, tmp_path: Path) -> None:
    policy.generation_config = GenerationConfig(do_sample=False, temperature=0.6, eos_token_id=EOS)
    policy.generation_config.pad_token_id = PAD
    loaded = AutoModelForCausalLM.from_pretrained(saved(policy, tmp_path / "model", eos_token_ids=[EOS]))
    assert loaded.generation_config.eos_token_id == EOS
    assert policy.generation_config.temperature == 0.6

"""Loading and refusing models, and dropout that is really off."""

# ruff: noqa: F811

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    LlamaForSequenceClassification,
)

from remax.config import ModelOptions
from remax.errors import UserError
from remax.models import (
    add_adapter,
    check_model_exists,
    copy_as_reference,
    disable_dropout,
    give_own_pad_token,
    load_policy,
    load_reward_model,
    load_tokenizer,
    new_reward_model,
    quiet,
)
from small_policies import IDS, LORA, assert_close, folder, logits, policy, saved, stir  # noqa: F401
from tiny_models import tiny_model
from toy_tokenizers import BOS, EOS, PAD, VOCAB_SIZE, toy_tokenizer

# Loading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./no/such", "there is no such folder; set the path of a model"),
        ("/no/such/folder", "there is no such folder"),
        ("runs/first/model", "there is no such folder"),
        ("models/", "there is no such folder"),
        (" ", "is empty: there is no model to load"),
        ("{tmp}", "that folder holds no model (no config.json); set a folder in"),
        ("{tmp}/run", "that folder holds no model (no config.json); set {tmp}/run/model"),
        ("{tmp}/file.txt", "that is a file; set the folder that holds the model"),
    ],
)
def test_model_that_cannot_be_there_is_refused_without_loading(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").touch()
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").touch()
    with pytest.raises(UserError) as error:
        check_model_exists(name.format(tmp=tmp_path), flag="--model")
    assert str(error.value).startswith("--model is ")
    assert said.format(tmp=tmp_path) in str(error.value)


def test_a_misspelt_folder_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sft" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--model is sft/modle: there is no such folder; did you mean sft/model"):
        check_model_exists("sft/modle", flag="--model")
    with pytest.raises(UserError, match="--model is gold/model: there is no such folder; set the path"):
        check_model_exists("gold/model", flag="--model")
    (tmp_path / "Qwen" / "Qwen2.5-0.5B").mkdir(parents=True)
    check_model_exists("Qwen/Qwen2.5-1.5B", flag="--model")  # a folder of models from the hub, of which one is there


def test_folders_and_hub_names_may_exist(folder: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    for name in (folder, str(tmp_path), "gpt2", "Qwen/Qwen3-0.6B"):
        check_model_exists(name, flag="--model")


def test_hub_name_that_cannot_be_reached_is_told_in_one_sentence() -> None:
    for load in (load_tokenizer, load_reward_model, lambda name, flag: load_policy(name, ModelOptions(), flag=flag)):
        with pytest.raises(
            UserError, match=r"^--model is nobody/nothing: its .* could not be loaded \(.*\); set a folder"
        ):
            load("nobody/nothing", flag="--model")


def test_policy_has_the_type_that_was_asked_for_and_the_same_weights(policy: Any, folder: str) -> None:
    assert torch.equal(logits(load_policy(folder, ModelOptions(), flag="--model")), logits(policy))
    loaded = load_policy(folder, ModelOptions(dtype="bfloat16", attn_implementation="eager"), flag="--model")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "eager"


def test_loading_is_silent(folder: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        load_policy(folder, LORA, flag="--model")
        new_reward_model(folder, ModelOptions(), toy_tokenizer(), seed=0, flag="--model")
    out, err = capfd.readouterr()
    assert out + err + caplog.text == ""


def test_adapter_is_on_all_linear_layers_and_starts_without_effect(policy: Any, folder: str) -> None:
    adapted = load_policy(folder, ModelOptions(use_peft=True, lora_r=4, lora_alpha=12), flag="--model")
    assert isinstance(adapted, PeftModel)
    assert_close(logits(adapted), logits(policy))
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 12)
    on = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    assert on == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("modules", [["no_proj"], ["q_proj", "lm_head"]])
def test_adapter_that_cannot_be_trained_is_refused(modules: list[str], folder: str) -> None:
    options = ModelOptions(use_peft=True, lora_target_modules=modules)
    with pytest.raises(UserError, match=r"^--lora_target_modules is \["):
        load_policy(folder, options, flag="--model")


def test_adapter_folder_gives_its_base_with_the_adapter_merged(policy: Any, folder: str, tmp_path: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    with quiet():
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
    stir(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    name = str(tmp_path / "adapter")
    assert (logits(adapted) - logits(policy)).abs().max() > 0.1
    loaded = load_policy(name, ModelOptions(), flag="--model")
    assert not isinstance(loaded, PeftModel)
    assert_close(logits(loaded), logits(adapted))
    # With a new adapter, the model with it off is the policy as given, not the base below the old one.
    again = load_policy(name, LORA, flag="--model")
    with again.disable_adapter():
        assert_close(logits(again), logits(adapted))
    assert load_tokenizer(name, flag="--model").get_vocab() == toy_tokenizer().get_vocab()
    with pytest.raises(UserError, match="that is an adapter without its model; merge it"):
        new_reward_model(name, ModelOptions(), toy_tokenizer(), seed=0, flag="--model")


def test_policy_with_missing_weights_is_refused(folder: str) -> None:
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"it lacks weights of a LlamaForCausalLM \(model.norm.weight, 1 in all\)"):
        load_policy(folder, ModelOptions(), flag="--model")
    with pytest.raises(UserError, match=r"it lacks weights of a LlamaForSeq.* \(model.norm.weight, 1 in all\)"):
        new_reward_model(folder, ModelOptions(), toy_tokenizer(), seed=0, flag="--model")


def test_damaged_weights_are_told_in_one_sentence(folder: str) -> None:
    (Path(folder) / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(UserError, match=r"^--model is .*: its model could not be loaded \(.*\); set"):
        load_policy(folder, ModelOptions(), flag="--model")


# Reward models --------------------------------------------------------------------------------------------------------


def reward_model_folder(base: str, folder: Path, num_labels: int = 1) -> Path:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    saved(model, folder)
    return folder


def test_reward_model_is_loaded_frozen_and_as_it_was_saved(folder: str, tmp_path: Path) -> None:
    there = reward_model_folder(folder, tmp_path / "reward")
    loaded = load_reward_model(str(there), flag="--reward_model")
    assert isinstance(loaded, LlamaForSequenceClassification)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.score.weight, load_file(there / "model.safetensors")["score.weight"])
    with pytest.raises(
        UserError, match=r"that is a reward model \(LlamaForSequenceClassification\), which cannot write"
    ):
        load_policy(str(there), ModelOptions(), flag="--model")


def test_what_cannot_reward_is_refused_before_its_weights_are_read(folder: str, tmp_path: Path) -> None:
    two = reward_model_folder(folder, tmp_path / "two", num_labels=2)
    (two / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"it has 2 labels \(Llama.*\), and a reward model has one; train one with `remax r"
    ):
        load_reward_model(str(two), flag="--reward_model")
    (Path(folder) / "model.safetensors").unlink()
    for num_labels in (2, 1):
        config = json.loads((Path(folder) / "config.json").read_text())
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(num_labels)}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        said = (
            rf"a plain language model \(LlamaForCausalLM, num_labels {num_labels}\) has no reward head.*`remax reward`"
        )
        with pytest.raises(UserError, match=said):
            load_reward_model(folder, flag="--reward_model")


def test_reward_model_whose_head_would_be_random_is_refused(folder: str, tmp_path: Path) -> None:
    there = reward_model_folder(folder, tmp_path / "reward")
    tensors = load_file(there / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"it lacks weights of a LlamaForSequenceClassification \(score.weight, 1 in all\)"
    ):
        load_reward_model(str(there), flag="--reward_model")


def test_new_head_comes_from_the_seed_alone(folder: str) -> None:
    def head(seed: int) -> torch.Tensor:
        return new_reward_model(folder, ModelOptions(), toy_tokenizer(), seed=seed, flag="--model").score.weight

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = head(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(head(1), first)
    assert not torch.equal(head(2), first)
    assert first.shape == (1, 32)


def test_adapter_of_a_reward_model_trains_the_head(folder: str) -> None:
    model = new_reward_model(folder, LORA, toy_tokenizer(), seed=1, flag="--model")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        "base_model.model.score.modules_to_save.default.weight"
    }


@pytest.mark.parametrize(
    ("tokens", "own"),
    [
        ({"pad_token": "<pad>", "bos_token": "<s>"}, True),
        ({"pad_token": None}, False),
        ({"pad_token": "</s>"}, False),
        ({"pad_token": "<s>", "bos_token": "<s>"}, False),
    ],
)
def test_pad_token_of_a_reward_model_is_neither_eos_nor_bos(tokens: dict[str, Any], own: bool, policy: Any) -> None:
    tokenizer = toy_tokenizer(**tokens)
    give_own_pad_token(policy, tokenizer)
    assert tokenizer.pad_token_id == policy.config.pad_token_id == (PAD if own else VOCAB_SIZE)
    assert tokenizer.pad_token_id not in (BOS, EOS)
    assert policy.get_input_embeddings().num_embeddings == (VOCAB_SIZE if own else VOCAB_SIZE + 1)
    assert torch.isfinite(policy.get_input_embeddings().weight).all()


def test_spare_embeddings_are_used_before_new_ones_are_made() -> None:
    model = tiny_model("llama", vocab_size=VOCAB_SIZE + 7)
    give_own_pad_token(model, toy_tokenizer(pad_token=None))
    assert model.get_input_embeddings().num_embeddings == VOCAB_SIZE + 7


# Dropout --------------------------------------------------------------------------------------------------------------


FALCON = FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.3)
WITH_DROPOUT = {
    "llama": lambda: tiny_model("llama", attention_dropout=0.3),
    "gpt2": lambda: tiny_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
    "opt": lambda: tiny_model("opt", dropout=0.3, attention_dropout=0.3, layerdrop=0.3),
    "falcon": lambda: FalconForCausalLM(FALCON),
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_without_dropout_train_mode_equals_eval_mode(name: str, lora: bool) -> None:
    model = WITH_DROPOUT[name]()
    before = model.config.to_dict()
    if lora:
        model = add_adapter(model, ModelOptions(use_peft=True, lora_dropout=0.3))
        stir(model)
    expected = logits(model.eval())
    assert not torch.allclose(logits(model.train()), expected, atol=1e-2), "the test has to start with dropout"
    disable_dropout(model)
    assert torch.equal(logits(model.train()), expected)
    assert model.config.to_dict() == before


def test_reference_is_a_frozen_copy_of_the_policy_as_it_is(policy: Any) -> None:
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    policy(IDS).logits.sum().backward()
    expected = logits(policy)
    reference = copy_as_reference(policy.train())
    assert policy.training
    assert all(p.requires_grad and p.grad is not None for p in policy.parameters())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    assert torch.equal(logits(reference), expected)
    assert not reference.training
    assert all(not p.requires_grad and p.grad is None for p in reference.parameters())

"""Both supervised stages end to end on tiny models: what is learned, what is measured, what is left on disk."""

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import trl
import yaml
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from remax.config import RewardConfig, SFTConfig
from remax.errors import UserError
from remax.interfaces import Completion, Prompt
from remax.models import load_reward_model, load_tokenizer
from remax.processes import ALONE
from remax.recording import RunFolder
from remax.rewards import RewardModel
from remax.stages.reward import Pairs, rank_pairs, run_reward, tokenise_pairs
from remax.stages.run import MetricsLog
from remax.stages.sft import run_sft
from remax.trackers import Trackers
from toy_tokenizers import BOS, CHATML, END, EOS, VOCAB_SIZE, characters, say, toy_tokenizer, turn

QUICK = {"report_to": ["none"], "learning_rate": 5e-3, "lr_scheduler_type": "constant", "batch_size": 8}


def dataset(*rows: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


def run(stage: str, settings: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, float]:
    """Runs the stage of that name."""
    if stage == "sft":
        return run_sft(SFTConfig(**settings), *args, **kwargs)
    return run_reward(RewardConfig(**settings), *args, **kwargs)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def base(tmp_path: Path) -> str:
    """Folder of an untrained Llama whose tokenizer pads with EOS, as many do."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=96, eos_token_id=EOS, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer = toy_tokenizer("<s> $A", bos_token="<s>", pad_token="</s>", chat_template=CHATML)
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def pairs(number: int, seed: int) -> datasets.Dataset:
    """Pairs of ragged texts: x is preferred to y."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcde"), rng.integers(2, 12))) for _ in range(number)]
    return dataset(*({"prompt": "say ", "chosen": text + "x", "rejected": text[::-1] + "y"} for text in texts))


# Reward modelling -----------------------------------------------------------------------------------------------------


def trl_accuracy(folder: Path, held_out: Pairs) -> float:
    """What TRL's own trainer measures with the saved model; its mean over batches is exact for equal batches."""
    rows = datasets.Dataset.from_dict(held_out._asdict())
    settings = {"bf16": False, "per_device_eval_batch_size": 10, "report_to": "none", "disable_tqdm": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.RewardTrainer(
            load_reward_model(str(folder), flag="--model"),
            trl.RewardConfig(output_dir=str(folder / "trl"), **settings),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=load_tokenizer(str(folder), flag="--model"),
        )
        return float(trainer.evaluate()["eval_accuracy"])


@pytest.mark.parametrize("lora", [False, True])
def test_reward_model_is_learned_measured_on_held_out_pairs_and_saved(lora: bool, base: str, out: Path) -> None:
    held_out = pairs(40, seed=1)
    steps = 12 if lora else 25
    config = RewardConfig(
        output_dir=str(out), max_steps=steps, use_peft=lora, lora_dropout=0.1 if lora else 0.0, **QUICK
    )
    metrics = run_reward(config, base, pairs(64, seed=0), held_out)

    steps_logged = records(out / "metrics.jsonl")
    assert [record["step"] for record in steps_logged] == list(range(1, steps + 1))
    assert steps_logged[0]["loss"] == pytest.approx(math.log(2), abs=0.1)
    assert np.mean([record["loss"] for record in steps_logged]) == pytest.approx(metrics["loss"], rel=1e-5)
    if not lora:
        assert steps_logged[-1]["loss"] < 0.1
        assert metrics["eval/accuracy"] == 1.0

    expected = {name.removeprefix("eval/"): value for name, value in metrics.items() if name != "loss"}
    assert json.loads((out / "eval.json").read_text()) == expected
    assert yaml.safe_load((out / "config.yaml").read_text())["max_steps"] == steps
    left = {path.name for path in out.iterdir()}
    assert left == {"model", "metrics.jsonl", "config.yaml", "eval.json", "checkpoints"}

    saved, tokenizer = load_reward_model(str(out / "model"), flag="--m"), load_tokenizer(str(out / "model"), flag="--m")
    tokenised = tokenise_pairs(held_out, tokenizer, 96, flag="--eval_dataset")
    assert rank_pairs(RewardModel(saved, tokenizer), tokenised) == pytest.approx(expected, abs=1e-5)
    assert trl_accuracy(out / "model", tokenised) == pytest.approx(expected["accuracy"], abs=1e-6)
    # The tokenizer padded with EOS, which would have hidden from the model whether an answer is finished.
    prompt = Prompt(0, "say ", [])
    finished, cut = (Completion(prompt, 0, [], [], truncated, "abc") for truncated in (False, True))
    first, second = RewardModel(saved, tokenizer)([finished, cut])
    assert abs(first - second) > 1e-4


def test_reward_model_reads_the_texts_that_it_will_score(base: str, out: Path) -> None:
    conversation = {
        "prompt": say("hi"),
        "chosen": say("yo", roles=["assistant"]),
        "rejected": say("no", roles=["assistant"]),
    }
    tokenizer = load_tokenizer(base, flag="--model")
    assert tokenise_pairs(dataset(conversation), tokenizer, 96, flag="--x") == Pairs(
        [turn("user", "hi") + turn("assistant", "yo")], [turn("user", "hi") + turn("assistant", "no")]
    )
    implicit = {"chosen": conversation["prompt"] + conversation["chosen"], "rejected": say("hi", "no")}
    assert tokenise_pairs(dataset(implicit), tokenizer, 96, flag="--x") == tokenise_pairs(
        dataset(conversation), tokenizer, 96, flag="--x"
    )
    text = tokenise_pairs(dataset({"prompt": "a", "chosen": "b", "rejected": "c"}), tokenizer, 96, flag="--x")
    assert text == Pairs([[BOS, *characters("ab"), EOS]], [[BOS, *characters("ac"), EOS]])


def test_over_long_pairs_are_dropped_with_a_count(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(base, flag="--model")
    rows = [{"chosen": "a" * n, "rejected": "b" * m} for n, m in [(8, 8), (9, 1), (1, 9), (2, 3)]]
    kept = tokenise_pairs(dataset(*rows), tokenizer, 10, flag="--train_dataset")
    assert [len(ids) for ids in kept.chosen_ids] == [10, 4]
    assert capsys.readouterr().out == "2 of 4 pairs of --train_dataset were dropped: over 10 tokens.\n"


def test_without_held_out_pairs_nothing_is_claimed(base: str, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = RewardConfig(output_dir=str(out), max_steps=5, logging_steps=2, **QUICK)
    metrics = run_reward(config, base, pairs(16, seed=0))
    assert list(metrics) == ["loss"]
    assert not (out / "eval.json").exists()
    lines, errors = capfd.readouterr()
    assert errors == "", "no progress bars and no warnings"
    limit, *steps, claim, where = lines.splitlines()
    assert limit == "The model has 96 positions: examples are limited to that instead of 1024 tokens."
    assert [line.split("  ")[0] for line in steps] == ["step 2/5", "step 4/5", "step 5/5"]
    logged = records(out / "metrics.jsonl")
    mean = {name: (logged[0][name] + logged[1][name]) / 2 for name in ("loss", "accuracy")}
    assert steps[0] == f"step 2/5  loss {mean['loss']:.4f}  accuracy {mean['accuracy']:.4f}"
    assert claim.startswith("No --eval_dataset was given: nothing held-out was measured")
    assert where == f"The reward model is in {out / 'model'}."


def test_loaded_reward_model_is_trained_in_place_and_keeps_the_dropout_of_its_adapter(base: str, out: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    config = RewardConfig(output_dir=str(out), max_steps=1, use_peft=True, lora_dropout=0.25, **QUICK)
    run_reward(config, model, pairs(8, seed=0), processing_class=load_tokenizer(base, flag="--model"))
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}
    saved = load_reward_model(str(out / "model"), flag="--model")
    assert torch.equal(saved.score.weight, model.score.modules_to_save["default"].weight)
    assert not torch.equal(saved.score.weight, model.score.original_module.weight)
    assert saved.config.pad_token_id == VOCAB_SIZE, "the tokenizer padded with EOS"


# Supervised fine-tuning -----------------------------------------------------------------------------------------------

CHAT = [("hi", "yo"), ("and you", "fine, thanks")]
TEXT = [("ask ab: ", "yes"), ("c? ", "no, never ever")]
FORMATS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": p + c, "other": 1} for p, c in TEXT],
    "chosen": [{"chosen": p + c, "rejected": "?"} for p, c in TEXT],
    "prompt and completion": [{"prompt": p, "completion": c, "text": "?"} for p, c in TEXT],
    "prompt and chosen": [{"prompt": p, "chosen": c, "rejected": "?"} for p, c in TEXT],
    "messages": [{"messages": say(p, c)} for p, c in CHAT],
    "chosen messages": [{"chosen": say(p, c), "rejected": say("?", "?")} for p, c in CHAT],
    "prompt and chosen messages": [
        {"prompt": say(p), "chosen": say(c, roles=["assistant"]), "rejected": []} for p, c in CHAT
    ],
}


def trained_tokens(name: str) -> list[tuple[list[int], int]]:
    """Ids of every example and how many of them, from the start, are not trained."""
    if "messages" in name:
        header = [*characters("assistant\n")]
        return [
            (turn("user", p) + turn("assistant", c), len(turn("user", p)) + 1 + len(header) if "prompt" in name else 1)
            for p, c in CHAT
        ]
    return [([BOS, *characters(p + c), EOS], 1 + len(characters(p)) if "prompt" in name else 1) for p, c in TEXT]


@pytest.mark.parametrize("name", FORMATS)
def test_loss_is_over_the_right_tokens_of_every_format(name: str, base: str, out: Path) -> None:
    config = SFTConfig(output_dir=str(out), max_steps=1, **{**QUICK, "learning_rate": 1e-12, "batch_size": 1})
    rows = dataset(*FORMATS[name])
    metrics = run_sft(config, base, rows, rows)
    model = AutoModelForCausalLM.from_pretrained(base)
    losses = []
    for ids, start in trained_tokens(name):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        losses += functional.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]), reduction="none").tolist()
    assert metrics["eval/loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_answer_and_its_end_are_learned_and_the_run_is_complete(base: str, out: Path) -> None:
    rows = dataset(*[{"prompt": "q: ", "completion": "yes"}, {"prompt": "say it: ", "completion": "no"}] * 4)
    metrics = run_sft(SFTConfig(output_dir=str(out), max_steps=25, **{**QUICK, "learning_rate": 1e-2}), base, rows)
    losses = [record["loss"] for record in records(out / "metrics.jsonl")]
    assert losses[-1] < 0.1 < 3 < losses[0]
    assert metrics == {"loss": pytest.approx(np.mean(losses), rel=1e-5)}
    model, tokenizer = (load.from_pretrained(out / "model") for load in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("say it: ", return_tensors="pt")["input_ids"]
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert generated[0].tolist() == [BOS, *characters("say it: no"), EOS]
    assert {path.name for path in out.iterdir()} == {"model", "metrics.jsonl", "config.yaml", "checkpoints"}
    assert model.config.use_cache


def test_stop_token_of_the_chat_template_ends_completions(base: str, out: Path) -> None:
    run_sft(SFTConfig(output_dir=str(out), max_steps=1, **QUICK), base, dataset(*FORMATS["messages"]))
    assert AutoModelForCausalLM.from_pretrained(out / "model").generation_config.eos_token_id == [EOS, END]


def test_loaded_model_is_trained_in_place_and_left_as_a_plain_model(base: str, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    before = model.lm_head.weight.clone()
    rows = dataset(*FORMATS["text"])
    run_sft(
        SFTConfig(output_dir=str(out), max_steps=2, **QUICK),
        model,
        rows,
        processing_class=load_tokenizer(base, flag="-"),
    )
    assert not torch.equal(model.lm_head.weight, before)
    assert "forward" not in vars(model)
    assert (out / "model" / "model.safetensors").exists()


def test_adapter_of_sft_is_merged(base: str, out: Path) -> None:
    config = SFTConfig(output_dir=str(out), max_steps=3, use_peft=True, lora_r=4, gradient_checkpointing=True, **QUICK)
    rows = dataset(*FORMATS["text"])
    metrics = run_sft(config, base, rows, rows)
    saved = AutoModelForCausalLM.from_pretrained(out / "model")
    assert (out / "model" / "adapter" / "adapter_config.json").exists()
    still = SFTConfig(output_dir=str(out.parent / "again"), max_steps=1, **{**QUICK, "learning_rate": 1e-12})
    again = run_sft(still, saved, rows, rows, load_tokenizer(base, flag="--model"))
    assert again["eval/loss"] == pytest.approx(metrics["eval/loss"], abs=1e-5)


def test_cut_examples_keep_their_start_and_are_counted(
    base: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SFTConfig(output_dir=str(out), max_steps=1, max_length=6, **{**QUICK, "learning_rate": 1e-12})
    rows = dataset({"text": "abcdefghij"})
    metrics = run_sft(config, base, rows, rows)
    told = "1 of 1 examples reach 6 tokens, where they are cut: such do not teach how to end."
    assert capsys.readouterr().out.splitlines()[0] == told
    assert json.loads((out / "eval.json").read_text()) == {
        name: metrics[f"eval/{name}"] for name in ("loss", "perplexity")
    }
    ids = [BOS, *characters("abcde")]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(base)(torch.tensor([ids])).logits[0]
    expected = functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    assert metrics["eval/loss"] == pytest.approx(float(expected), abs=1e-5)


# Both -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_micro_batches_change_nothing(stage: str, base: str, tmp_path: Path) -> None:
    losses = []
    for micro_batch_size in (0, 3):
        folder = tmp_path / f"out{micro_batch_size}"
        shared = {**QUICK, "output_dir": str(folder), "max_steps": 3, "micro_batch_size": micro_batch_size}
        run(stage, shared, base, pairs(13, seed=0))
        losses.append([record["loss"] for record in records(folder / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
    assert losses[0][2] != pytest.approx(losses[0][1], abs=1e-4)


ROWS = dataset({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "d", "rejected": "e"})
CHATS = dataset({"chosen": say("hi", "yo"), "rejected": say("hi", "no")})


@pytest.mark.parametrize(
    ("settings", "arguments", "said"),
    [
        ({"report_to": ["clipboard"]}, {}, "--report_to is clipboard: that is no tracker that is installed here"),
        ({"report_to": ["none", "tensorboard"]}, {}, "or none alone"),
        ({"use_peft": True, "lora_target_modules": ["x"]}, {}, "--lora_target_modules is ['x']"),
        ({}, {"model": "./missing"}, "--model is ./missing: there is no such folder"),
        ({}, {"train_dataset": dataset({"answer": "a"})}, "--train_dataset has "),
        ({}, {"train_dataset": CHATS, "processing_class": toy_tokenizer()}, "its tokenizer has no chat template"),
        ({}, {"processing_class": toy_tokenizer(eos_token=None)}, "EOS"),
        ({}, {"eval_dataset": dataset({"answer": "a"})}, "--eval_dataset has "),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_mistakes_are_told_and_leave_nothing_behind(
    stage: str, settings: dict[str, Any], arguments: dict[str, Any], said: str, base: str, out: Path
) -> None:
    shared = {**QUICK, "output_dir": str(out), "max_steps": 1, **settings}
    given = {"model": base, "train_dataset": ROWS, **arguments}
    with pytest.raises(UserError) as error:
        run(stage, shared, **given)
    assert said in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"answer": "a", "question": "b"}],
            "has the columns answer, question: there is nothing to fine-tune on; name",
        ),
        ([{"text": "a"}, {"text": None}], "has no value in column 'text' of row 1"),
        (
            [{"prompt": say("a"), "completion": "b"}],
            "has a column 'prompt' in conversational format: standard is",
        ),
        ([{"messages": "hi"}], "has a column 'messages' in standard format: conversational is needed there"),
        ([{"text": say("hi")}], "has a column 'text' in conversational format: standard is needed there"),
    ],
)
def test_examples_that_cannot_be_used(rows: list[dict[str, Any]], said: str, base: str, out: Path) -> None:
    with pytest.raises(UserError) as error:
        run_sft(SFTConfig(output_dir=str(out), **QUICK), base, dataset(*rows))
    assert said in str(error.value)
    assert not out.exists()


def test_limits_that_leave_nothing_to_learn_from(base: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = SFTConfig(output_dir=str(out), max_length=3, **QUICK)
    with pytest.raises(UserError, match=r"^--max_length is 3: no example of --train_dataset is left; set a larger one"):
        run_sft(config, base, dataset({"prompt": "a long prompt", "completion": "b"}))
    assert capsys.readouterr().out == "1 of 1 examples were dropped: their prompts alone fill 3 tokens.\n"
    with pytest.raises(UserError, match=r"^--max_length is 3: no pair of --train_dataset is that short"):
        run_reward(RewardConfig(output_dir=str(out), max_length=3, **QUICK), base, ROWS)
    assert not out.exists()


def test_loaded_models_without_a_scalar_head_are_refused(base: str, out: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), load_tokenizer(base, flag="--model")
    with pytest.raises(UserError, match=r"^--model is a LlamaForCausalLM: it has no reward head; pass a name"):
        run_reward(RewardConfig(output_dir=str(out), **QUICK), model, ROWS, processing_class=tokenizer)
    assert not out.exists()


def test_folder_that_holds_a_run_is_refused_and_kept(base: str, out: Path) -> None:
    out.mkdir()
    (out / "metrics.jsonl").write_text("{}\n")
    for stage in ("sft", "reward"):
        with pytest.raises(UserError, match="it already holds a run"):
            run(stage, {"output_dir": str(out), **QUICK}, base, ROWS)
    assert (out / "metrics.jsonl").read_text() == "{}\n"


def test_run_that_diverges_is_stopped_with_the_cause(out: Path) -> None:
    folder = RunFolder(str(out))
    folder.create({})
    config = SFTConfig(learning_rate=3.0, report_to="none")
    trackers = Trackers(config, folder, say=print)
    log = MetricsLog(SimpleNamespace(processes=ALONE, folder=folder, trackers=trackers, config=config), 2)  # type: ignore[arg-type]
    state = type("State", (), {"global_step": 7, "max_steps": 9})
    with pytest.raises(
        UserError, match=r"^--learning_rate is 3.0: the loss is nan at step 7, .*; set a smaller one\.$"
    ):
        log.on_log(None, state, None, {"loss": math.nan})
    assert records(out / "metrics.jsonl") == [{"step": 7, "loss": None, "epoch": 3.5, "num_processes": 1}]

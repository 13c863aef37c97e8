"""Direct preference optimisation on tiny models: its loss and gradient, what it learns, measures and leaves on disk."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import trl
import yaml
from peft import PeftModel
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from remax import DPOConfig, SFTConfig, UserError, run_dpo, run_sft
from remax.cli import main
from remax.models import add_adapter, load_tokenizer
from remax.stages.dpo import Preference, preferences, rank_preferences
from remax.stages.reward import wilson_interval
from toy_tokenizers import BOS, CHATML, END, EOS, START, VOCAB_SIZE, characters, say, toy_tokenizer, turn

QUICK = {"report_to": ["none"], "learning_rate": 3e-3, "lr_scheduler_type": "constant", "batch_size": 8}
RAGGED = [("ask: ", "yes", "no, not ever"), ("and? ", "well, of course", "n"), ("c", "dd", "eee"), ("fgh", "i", "j")]


def dataset(*rows: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


def as_rows(triples: Sequence[tuple[str, str, str]]) -> datasets.Dataset:
    return dataset(*(dict(zip(("prompt", "chosen", "rejected"), triple, strict=True)) for triple in triples))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tokenizer(around: str = "<s> $A", **kwargs: Any) -> Any:
    return toy_tokenizer(around, bos_token="<s>", **kwargs)


def llama(**kwargs: Any) -> Any:
    """An untrained Llama, which would drop attention weights in training."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{"vocab_size": VOCAB_SIZE, "max_position_embeddings": 96, "eos_token_id": EOS, **sizes, **kwargs},
        attention_dropout=0.3,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """Folder of such a model with a tokenizer that pads with EOS, as many do."""
    llama().save_pretrained(tmp_path / "base")
    tokenizer(pad_token="</s>", chat_template=CHATML).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# The loss -------------------------------------------------------------------------------------------------------------


def log_likelihood(model: Any, before: list[int], after: list[int]) -> torch.Tensor:
    """log p(after | before) from the logits of one sequence without padding."""
    ids = torch.tensor(before + after)
    log_probs = model(ids.unsqueeze(0)).logits[0].log_softmax(dim=-1)
    return log_probs[:-1].gather(-1, ids[1:, None])[len(before) - 1 :].sum()


def closed_form_margins(policy: Any, reference: Any, beta: float, triples: Sequence[tuple[str, str, str]]) -> Any:
    """beta ((log pi(y+) - log ref(y+)) - (log pi(y-) - log ref(y-))) of every pair."""
    margins = []
    for prompt, chosen, rejected in triples:
        before = [BOS, *characters(prompt)]
        good, bad = [*characters(chosen), EOS], [*characters(rejected), EOS]
        with torch.no_grad():
            expected = log_likelihood(reference, before, good) - log_likelihood(reference, before, bad)
        margins.append(beta * (log_likelihood(policy, before, good) - log_likelihood(policy, before, bad) - expected))
    return torch.stack(margins)


def policy_of(kind: str) -> Any:
    if kind == "full":
        return llama()
    model = add_adapter(llama(), DPOConfig(lora_r=4, lora_dropout=0.5))
    if kind == "trained adapter":
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    ("kind", "micro_batch_size"), [("full", 0), ("full", 3), ("new adapter", 2), ("trained adapter", 2)]
)
def test_loss_and_gradient_are_the_closed_form_where_the_policy_has_left_the_reference(
    kind: str, micro_batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of one step gives the weights at which a run of two takes its second."""
    start = policy_of(kind)
    reference = copy.deepcopy(start).eval()
    after_one, after_two = copy.deepcopy(start), copy.deepcopy(start)
    gradient: dict[str, torch.Tensor] = {}
    training_step = trl.DPOTrainer.training_step

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = training_step(self, *args, **kwargs)
        gradient.update({n: p.grad.clone() for n, p in after_two.named_parameters() if p.grad is not None})
        assert (self.ref_model is None) == (kind == "new adapter"), "there the adapter is turned off instead"
        return loss

    monkeypatch.setattr(trl.DPOTrainer, "training_step", recorded)
    for steps, model in ((1, after_one), (2, after_two)):
        config = DPOConfig(
            **{**QUICK, "batch_size": 4, "learning_rate": 1e-2},
            output_dir=str(tmp_path / str(steps)),
            max_steps=steps,
            micro_batch_size=micro_batch_size,
            beta=0.3,
        )
        run_dpo(config, model, as_rows(RAGGED), processing_class=tokenizer())

    after_one.eval().zero_grad()
    loss = -functional.logsigmoid(closed_form_margins(after_one, reference, 0.3, RAGGED)).mean()
    loss.backward()
    first, second = records(tmp_path / "2" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["loss"] == pytest.approx(loss.item(), abs=2e-6)
    assert abs(loss.item() - math.log(2)) > 0.05
    expected = {name: p.grad for name, p in after_one.named_parameters() if p.grad is not None}
    assert gradient.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-4, atol=2e-6, msg=name)
    norm = torch.stack([value.norm() for value in expected.values()]).norm().item()
    assert second["grad_norm"] == pytest.approx(norm, rel=1e-4)

    if isinstance(after_one, PeftModel):
        assert list(after_one.peft_config) == ["default"]
        assert {path.name for path in (tmp_path / "1" / "model" / "adapter").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "README.md",
        }
    assert "forward" not in vars(after_one.get_base_model() if isinstance(after_one, PeftModel) else after_one)


@pytest.mark.parametrize("lora", [False, True])
def test_held_out_pairs_are_measured_by_the_implicit_reward(lora: bool, base: str, out: Path) -> None:
    """Five pairs are a batch of three and a smaller one, of which a mean of means would be wrong."""
    (prompt, chosen, rejected), *others = RAGGED
    triples = [(prompt, rejected, chosen), *others, ("k", "l", "")]
    config = DPOConfig(**{**QUICK, "batch_size": 3}, output_dir=str(out), max_steps=4, use_peft=lora, beta=0.3)
    metrics = run_dpo(config, base, as_rows(RAGGED[:3]), as_rows([*triples[:-1], ("k", "l", "</s>")]))
    load = AutoModelForCausalLM.from_pretrained
    margins = closed_form_margins(load(out / "model"), load(base), 0.3, triples).detach().double()
    accuracy = (margins > 0).double().mean().item()
    assert 0 < accuracy < 1
    low, high = wilson_interval(accuracy, 5)
    quality = json.loads((out / "eval.json").read_text())
    assert quality == {name.removeprefix("eval/"): value for name, value in metrics.items() if name != "loss"}
    expected = {"num_pairs": 5, "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
    expected |= {"loss": -functional.logsigmoid(margins).mean().item(), "margin": margins.mean().item()}
    assert quality == pytest.approx(expected, abs=2e-6)


def test_ranking_at_known_margins() -> None:
    quality = rank_preferences(torch.tensor([2.0, -1.0, 0.0, 3.0] * 5, dtype=torch.float64))
    assert quality["num_pairs"] == 20
    assert quality["accuracy"] == 0.5, "a tie ranks nothing"
    assert quality["margin"] == pytest.approx(1.0)
    assert quality["loss"] == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in (2, -1, 0, 3)]))
    # Wilson's interval of 10 in 20, by hand: (0.5 + z^2/40 -+ z sqrt(1/80 + z^2/1600)) / (1 + z^2/20).
    assert (quality["accuracy_low"], quality["accuracy_high"]) == pytest.approx((0.29930, 0.70070), abs=1e-5)


# The tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>"])
def test_texts_end_in_one_eos_and_start_with_what_the_tokenizer_puts_there(around: str) -> None:
    bos = [BOS] if "<s>" in around else []
    pair = {"prompt": "ab", "chosen": "c", "rejected": "d</s>"}
    implicit = {"chosen": "the film", "rejected": "the end</s></s>"}
    (explicit,) = preferences(dataset(pair), tokenizer(around), 96, flag="--x")
    assert explicit == Preference([*bos, *characters("ab")], [*characters("c"), EOS], [*characters("d"), EOS])
    (whole,) = preferences(dataset(implicit), tokenizer(around), 96, flag="--x")
    assert whole == Preference(bos, [*characters("the film"), EOS], [*characters("the end"), EOS])


def test_tokens_that_merge_with_the_prompt_belong_to_the_completions() -> None:
    class Pairwise:
        """Joins two letters to one token, so that the end of an odd prompt depends on what follows."""

        eos_token_id = 0

        def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
            pieces = [text[i : i + 2] for i in range(0, len(text), 2)]
            return {"input_ids": [int.from_bytes(piece.encode(), "big") for piece in pieces]}

    ab, c, cd, ce, f = (int.from_bytes(piece, "big") for piece in (b"ab", b"c", b"cd", b"ce", b"f"))
    rows = [{"prompt": "abc", "chosen": "df", "rejected": "e"}, {"prompt": "ab", "chosen": "c", "rejected": "cd"}]
    assert preferences(dataset(*rows), Pairwise(), 96, flag="--x") == [
        Preference([ab], [cd, f, 0], [ce, 0]),
        Preference([ab], [c, 0], [cd, 0]),
    ]


def test_conversations_start_their_completions_behind_the_header_of_the_answer() -> None:
    chat, head = tokenizer(chat_template=CHATML), [START, *characters("assistant\n")]

    def answers(chosen: str, rejected: str) -> dict[str, Any]:
        return {"chosen": say(chosen, roles=["assistant"]), "rejected": say(rejected, roles=["assistant"])}

    expected = Preference(
        turn("user", "hi") + head,
        [*characters("yo"), END, *characters("\n")],
        [*characters("yes"), END, *characters("\n")],
    )
    assert preferences(dataset({"prompt": say("hi"), **answers("yo", "yes")}), chat, 96, flag="--x") == [expected]
    implicit = {"chosen": say("hi", "yo"), "rejected": say("hi", "yes")}
    assert preferences(dataset(implicit), chat, 96, flag="--x") == [expected]
    prefilled = {"prompt": say("hi", "y"), **answers("o", "es")}
    ((prompt_ids, chosen_ids, _),) = preferences(dataset(prefilled), chat, 96, flag="--x")
    assert prompt_ids == [*expected.prompt_ids, *characters("y")]
    assert chosen_ids == expected.chosen_ids[1:]
    longer = {"chosen": say("hi", "yo"), "rejected": say("hi", "yo", "and", "so")}
    (goes_on,) = preferences(dataset(longer), chat, 96, flag="--x")
    assert goes_on.prompt_ids == expected.prompt_ids
    assert goes_on.chosen_ids == expected.chosen_ids
    (strangers,) = preferences(dataset({"chosen": say("a", "b"), "rejected": say("c", "d")}), chat, 96, flag="--x")
    assert strangers.prompt_ids == []
    assert strangers.chosen_ids == turn("user", "a") + turn("assistant", "b")


def test_first_token_without_bos_counts_neither_in_training_nor_in_the_evaluation(tmp_path: Path) -> None:
    rows = dataset({"chosen": "abc", "rejected": "xy"}, {"chosen": "abc", "rejected": "bcdef"})
    losses = []
    for steps in (1, 2):
        config = DPOConfig(
            output_dir=str(tmp_path / str(steps)), max_steps=steps, **{**QUICK, "batch_size": 2, "learning_rate": 1e-2}
        )
        metrics = run_dpo(config, llama(), rows, rows, tokenizer("$A"))
        losses.append((metrics["eval/loss"], records(tmp_path / str(steps) / "metrics.jsonl")[-1]["loss"]))
    (evaluated, _), (_, trained) = losses
    assert evaluated == pytest.approx(trained, abs=2e-6)
    assert evaluated < math.log(2) - 0.01


def test_over_long_pairs_are_dropped_with_a_count(base: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"chosen": "a" * n, "rejected": "b" * m} for n, m in [(8, 8), (9, 1), (1, 9), (2, 3)]]
    kept = preferences(dataset(*rows), load_tokenizer(base, flag="--model"), 10, flag="--train_dataset")
    assert [len(pair.chosen_ids) for pair in kept] == [9, 3]
    assert capsys.readouterr().out == "2 of 4 pairs of --train_dataset were dropped: over 10 tokens.\n"
    with pytest.raises(UserError, match=r"^--max_length is 3: no pair of --train_dataset is that short"):
        run_dpo(DPOConfig(output_dir=str(out), max_length=3, **QUICK), base, dataset(*rows))
    assert not out.exists()


# A run ----------------------------------------------------------------------------------------------------------------


def test_preferences_are_learned_and_the_run_is_complete(
    base: str, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """x is preferred to y, behind ragged texts."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcde"), rng.integers(2, 12))) for _ in range(48)]
    rows = as_rows([("say ", text + "x", text[::-1] + "y") for text in texts])
    capfd.readouterr()
    metrics = run_dpo(DPOConfig(output_dir=str(out), max_steps=15, logging_steps=5, **QUICK), base, rows, rows)
    lines, errors = capfd.readouterr()
    steps = records(out / "metrics.jsonl")
    assert [record["step"] for record in steps] == list(range(1, 16))
    assert np.mean([record["loss"] for record in steps]) == pytest.approx(metrics["loss"], rel=1e-5)
    assert metrics["eval/accuracy"] > 0.9
    assert metrics["eval/loss"] < 0.5
    left = {path.name for path in out.iterdir()}
    assert left == {"model", "metrics.jsonl", "config.yaml", "eval.json", "checkpoints"}
    assert yaml.safe_load((out / "config.yaml").read_text())["beta"] == 0.1
    assert "pairs ranked right" in (out / "model" / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.use_cache
    assert errors == "", "no progress bars and no warnings"
    limit, *shown, held_out, where = lines.splitlines()
    assert limit == "The model has 96 positions: examples are limited to that instead of 1024 tokens."
    last = {name: np.mean([record[name] for record in steps[10:]]) for name in ("loss", "rewards/accuracies")}
    assert shown[-1].startswith(
        f"step 15/15  loss {last['loss']:.4f}  accuracy {last['rewards/accuracies']:.4f}  token"
    )
    assert held_out.startswith("Held-out pairs ranked right by the implicit reward: ")
    assert where == f"The model is in {out / 'model'}."


def test_without_held_out_pairs_nothing_is_measured(base: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = as_rows([*RAGGED, ("same", "a", "a")])
    metrics = run_dpo(DPOConfig(output_dir=str(out), max_steps=1, **QUICK), base, rows)
    assert list(metrics) == ["loss"]
    assert not (out / "eval.json").exists()
    first, *_, nothing, _ = capsys.readouterr().out.splitlines()
    assert first == "1 pairs of --train_dataset were dropped: chosen and rejected are the same."
    assert nothing == "No --eval_dataset was given: nothing held-out was measured."


def test_stop_token_of_the_chat_template_ends_completions(base: str, out: Path) -> None:
    rows = dataset({"chosen": say("hi", "yo"), "rejected": say("hi", "no")})
    run_dpo(DPOConfig(output_dir=str(out), max_steps=1, **{**QUICK, "batch_size": 1}), base, rows)
    assert AutoModelForCausalLM.from_pretrained(out / "model").generation_config.eos_token_id == [EOS, END]


def flags(base: str, data: Path, out: Path, **changes: Any) -> list[str]:
    """The command line of a small run."""
    settings = {"model": base, "train_dataset": data, "output_dir": out, "max_steps": 2, "batch_size": 4, **changes}
    return ["dpo", "--report_to", "none", *(part for name in settings for part in (f"--{name}", str(settings[name])))]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in as_rows(RAGGED)))
    return path


def test_command_line(base: str, data: Path, tmp_path: Path) -> None:
    full, lora = tmp_path / "full", tmp_path / "lora"
    assert main(flags(base, data, full, eval_dataset=data, learning_rate=1e-3, beta=0.2)) == 0
    assert yaml.safe_load((full / "config.yaml").read_text())["beta"] == 0.2
    assert json.loads((full / "eval.json").read_text())["margin"] > 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in (base, full / "model"))
    assert not torch.equal(before, after)
    assert main([*flags(str(full / "model"), data, lora), "--use_peft", "--gradient_checkpointing"]) == 0
    assert (lora / "model" / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_dataset": "columns.jsonl"}, "has no column 'chosen', which learning from preferences needs"),
        ({"eval_dataset": "columns.jsonl"}, "--eval_dataset has no column 'chosen'"),
        ({"model": "reward"}, "that is a reward model (LlamaForSequenceClassification), which cannot write"),
        ({"model": "./missing"}, "--model is ./missing: there is no such folder"),
        ({"beta": 0}, "--beta is 0.0: the loss would be the same for every policy"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    changes: dict[str, Any], said: str, base: str, data: Path, out: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("columns.jsonl").write_text('{"answer": "a", "question": "b"}\n')
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained("reward")
    load_tokenizer(base, flag="--model").save_pretrained("reward")
    capsys.readouterr()
    assert main(flags(base, data, out, **changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("remax: ")
    assert len(error.splitlines()) == 1
    assert said in error
    assert not out.exists()


def test_run_that_diverges_is_stopped_without_a_model(base: str, data: Path, out: Path, capsys: Any) -> None:
    assert main(flags(base, data, out, learning_rate=1e30, max_grad_norm=0, max_steps=4)) == 2
    assert "nothing is learned from here on; set a smaller one." in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"config.yaml", "metrics.jsonl", "checkpoints"}


def test_run_that_fails_in_its_first_step_leaves_nothing(base: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(trl.DPOTrainer, "training_step", fail)
    with pytest.raises(torch.OutOfMemoryError):
        run_dpo(DPOConfig(output_dir=str(out), max_steps=1, **QUICK), base, as_rows(RAGGED))
    assert not out.exists()


def test_loaded_reward_model_is_refused(base: str, out: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    given = load_tokenizer(base, flag="--model")
    said = r"^--model is a LlamaForSequenceClassification: that is a reward model, which cannot write; pass a language"
    with pytest.raises(UserError, match=said):
        run_dpo(DPOConfig(output_dir=str(out), **QUICK), model, as_rows(RAGGED), processing_class=given)
    with pytest.raises(UserError, match=said):
        run_sft(SFTConfig(output_dir=str(out), **QUICK), model, as_rows(RAGGED), processing_class=given)
    assert not out.exists()

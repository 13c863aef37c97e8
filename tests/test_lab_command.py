"""`remax lab` from the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from remax.cli import main
from remax.config import LabConfig, LabInputs
from remax.errors import UserError
from remax.lab.experiment import assemble_lab
from remax.lab.report import number
from remax.lab.statistics import Estimate
from remax.logprobs import CompletionScorer
from tiny_models import tiny_model
from toy_tokenizers import EOS, VOCAB_SIZE, toy_tokenizer

REWARDS = """
def letters(completions, **columns):
    return [0.1 * sum(ord(c) % 7 for c in text) for text in completions]

def constant(completions, **columns):
    return [1.0] * len(completions)

def unlikely(completions, **columns):
    # None for the last ones, which are the greedy completions.
    return [1.0] * (len(completions) - 3) + [None] * 3

def nothing(completions, **columns):
    return [None] * len(completions)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    for name, size in (("policy", VOCAB_SIZE), ("larger", VOCAB_SIZE + 3)):
        tiny_model("llama", vocab_size=size, eos_token_id=EOS).save_pretrained(folder / name)
        toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{c} cat"}) + "\n" for c in "abcdef"))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def flags(world: Path, out: Path, **changes: Any) -> list[str]:
    settings = {
        "model": world / "policy",
        "reward_funcs": f"{world / 'rewards.py'}:letters",
        "train_dataset": world / "prompts.jsonl",
        "output_dir": out,
        "batch_size": 3,
        "max_completion_length": 5,
        "num_gradients": 4,
        **changes,
    }
    chosen = {name: value for name, value in settings.items() if value is not None}
    return ["lab", *(part for name, value in chosen.items() for part in (f"--{name}", *str(value).split()))]


def test_command(world: Path, tmp_path: Path, capsys: Any) -> None:
    methods = ["remax", "remax:mixed", "reinforce", "reinforce:moving_average", "rloo", "grpo", "dr_grpo", "ppo"]
    out = tmp_path / "out"
    assert main(flags(world, out, methods=" ".join(methods), reward_offset=5, ref_model=world / "policy")) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    results = json.loads((out / "lab.json").read_text(), parse_constant=refuse)
    assert results["settings"]["reward_offset"] == 5
    assert {"remax-rlhf", "torch", "transformers"} <= set(results["versions"])
    assert [section["reward_offset"] for section in results["sections"]] == [0, 5]
    for section in results["sections"]:
        assert list(section["methods"]) == methods
        for figures in section["methods"].values():
            variance, (low, high) = figures["variance"]["value"], figures["variance"]["interval"]
            assert low <= variance * 1.5
            assert low < high
            layers = [layer["value"] for layer in figures["variance_by_layer"].values()]
            assert sum(layers) == pytest.approx(variance, rel=1e-6)
            tokens = figures["sampled_tokens"]["value"] + figures["greedy_tokens"]["value"]
            assert figures["variance_x_tokens"]["value"] == pytest.approx(variance * tokens, rel=1e-6)
            assert len(figures["cosines"]) == 4
    plain = results["sections"][0]["methods"]
    assert [figures["greedy_tokens"]["value"] > 0 for figures in plain.values()] == [True, True] + [False] * 6
    assert [figures["num_generations"] for figures in plain.values()] == [1, 2, 1, 1, 2, 2, 2, 1]
    assert [figures["agreement"] is not None for figures in plain.values()] == [False, *[True] * 4, *[False] * 3]
    half = plain["dr_grpo"]["variance"]["value"] / plain["rloo"]["variance"]["value"]
    assert half == pytest.approx(0.25, rel=1e-4), "with two samples Dr. GRPO's gradient is half of RLOO's"
    assert imread(out / "lab.png").shape[1] == 1500
    shown = capsys.readouterr().out
    assert "rewards as they are" in shown
    assert "rewards shifted by N(0, 5 sd) per prompt" in shown
    assert "unmoved" in shown
    assert {path.name for path in out.iterdir()} == {"lab.json", "lab.png", "config.yaml"}
    assert yaml.safe_load((out / "config.yaml").read_text())["methods"] == methods

    again = tmp_path / "again"
    assert main(["lab", "--config", str(out / "config.yaml"), "--output_dir", str(again)]) == 0
    assert json.loads((again / "lab.json").read_text())["sections"] == results["sections"]


def test_num_generations_is_for_all_methods(world: Path, tmp_path: Path) -> None:
    assert main(flags(world, tmp_path / "out", methods="rloo reinforce", num_generations=3, num_gradients=2)) == 0
    methods = json.loads((tmp_path / "out" / "lab.json").read_text())["sections"][0]["methods"]
    assert [figures["num_generations"] for figures in methods.values()] == [3, 3]
    assert methods["rloo"]["sampled_tokens"] == methods["reinforce"]["sampled_tokens"]


def test_reference_is_loaded_only_where_log_ratios_are_not_zero(world: Path) -> None:
    def reference(ref_model: str | None = None, **settings: Any) -> CompletionScorer | None:
        inputs = LabInputs(
            model=str(world / "policy"), train_dataset=str(world / "prompts.jsonl"), reward_funcs=["x"],
            ref_model=ref_model,
        )  # fmt: skip
        args = LabConfig(methods=["remax"], batch_size=2, max_completion_length=4, **settings)
        trainings = {"remax": args.training("remax")}
        return assemble_lab(inputs, [lambda completions, **columns: [1.0]], args, trainings).reference

    assert reference() is None
    assert reference(top_p=0.9, beta=0.0) is None
    assert reference(top_p=0.9) is not None
    assert reference(str(world / "policy")) is not None
    with pytest.raises(UserError, match=r"^--ref_model is .*larger: its vocabulary is not that of --model"):
        reference(str(world / "larger"))


MISTAKES = {
    "unknown method": ({"methods": "remax rolo"}, "--methods has rolo: there is no such method; set some of remax, re"),
    "unknown baseline": ({"methods": "remax:none"}, "--methods has remax:none: remax has no such baseline; set remax:"),
    "twice": ({"methods": "remax remax:greedy"}, "--methods is remax remax:greedy: one is named twice"),
    "one sample": (
        {"methods": "remax rloo", "num_generations": 1},
        "--num_generations is 1: rloo of --methods compare",
    ),
    "one gradient": ({"num_gradients": 1}, "--num_gradients is 1: one gradient has no variance"),
    "no prompts": ({"batch_size": 0}, "--batch_size is 0: "),
    "negative offset": ({"reward_offset": -1}, "--reward_offset is -1.0: no standard deviation is negative"),
    "kl of ppo": ({"kl_mode": "loss"}, "--kl_mode is loss: ppo takes the KL as reward per token"),
    "value model": ({"methods": "remax", "value_model": "x"}, "--value_model is x: only ppo has one"),
    "unused": ({"num_eval_prompts": 8}, "--num_eval_prompts is 8: the lab evaluates nothing"),
    "no reward": ({"reward_funcs": None}, "neither --reward_model nor --reward_funcs is set"),
    "no KL": ({"ref_model": "{world}/policy", "beta": 0, "methods": "remax"}, "--ref_model is {world}/policy: with"),
    "no reference": ({"ref_model": "{world}/none"}, "--ref_model is {world}/none: "),
    "few prompts": ({"batch_size": 7}, "--batch_size is 7: --train_dataset has only 6 usable prompts"),
    "no unit": (
        {"reward_funcs": "{world}/rewards.py:constant", "reward_offset": 5},
        "--reward_offset is 5.0: the rewards of all samples are equal",
    ),
    "no rewards": ({"reward_funcs": "{world}/rewards.py:nothing"}, "the rewards (nothing) gave no number"),
    "no greedy rewards": ({"reward_funcs": "{world}/rewards.py:unlikely"}, "the rewards (unlikely) gave no number"),
    "no room": ({"num_gradients": 10**9, "methods": "remax"}, "--num_gradients is 1000000000: two sets of gradients"),
}


@pytest.mark.parametrize(("changes", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_sentence_and_leave_nothing(
    changes: dict[str, Any], said: str, world: Path, tmp_path: Path, capsys: Any
) -> None:
    filled = {k: v.replace("{world}", str(world)) if isinstance(v, str) else v for k, v in changes.items()}
    assert main(flags(world, tmp_path / "out", **filled)) == 2
    error = capsys.readouterr().err
    errors = [line for line in error.splitlines() if line.startswith("remax: ")]
    assert len(errors) == 1
    assert errors[0].startswith("remax: " + said.replace("{world}", str(world)))
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_numbers_are_short() -> None:
    values = [0.0, 0.00012, 0.1234, 12.345, 1234.4, 12345.0, 999_999.0, 1234567.0, 2.5e9, -0.5, None]
    shown = ["0", "1.2e-04", "0.123", "12.3", "1234", "12.3k", "1000k", "1.23M", "2.5G", "-0.5", "\N{INFINITY}"]
    assert [number(value) for value in values] == shown


def test_quotients_by_zero_are_infinite() -> None:
    one, none = Estimate(1.0, np.ones(100)), Estimate(0.0, np.zeros(100))
    assert (one / none).value == float("inf")
    assert (one / none).interval == (float("inf"), float("inf"))

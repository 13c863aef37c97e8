"""`remax winrate`: outputs of every form, mistakes, and the command from end to end."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from judging import HOSTILE, fake_endpoint, longer, write
from remax.cli import main
from remax.config import WinrateConfig, WinrateInputs
from remax.errors import UserError
from remax.winrate.command import run_winrate
from remax.winrate.endpoint import KEY_VARIABLE
from remax.winrate.outputs import numbered, pair_up, read_outputs
from test_cli import world  # noqa: F401
from toy_tokenizers import toy_tokenizer

# Outputs --------------------------------------------------------------------------------------------------------------


def record(prompt: str, index: int, step: int, sample: int = 0, **others: Any) -> dict[str, Any]:
    text = f"{prompt}{step}{sample}"
    row = {"step": step, "prompt_index": index, "sample_index": sample, "prompt": prompt, "completion": text}
    return {**row, "greedy_completion": f"greedy {step}", "reward": 1.0, "truncated": sample == 0, **others}


def test_our_completions_give_each_prompts_latest(tmp_path: Path, capsys: Any) -> None:
    rows = [record("p", 0, 1), record("q", 1, 2, 1), record("q", 1, 2, 0), record("p", 0, 3), record("p", 7, 3)]
    rows += [record("q", 1, 4, greedy_completion=None), record("r", 2, 1, 1), record("r", 2, 1, 0)]
    path = write(tmp_path / "completions.jsonl", rows)
    side = read_outputs(path, flag="--a", do_sample=False)
    assert [(o.key, o.text) for o in side.outputs] == [
        (("p", 0), "greedy 3"),
        (("q", 0), "greedy 2"),
        (("p", 1), "greedy 3"),
        (("r", 0), "greedy 1"),
    ]
    assert not any(o.truncated for o in side.outputs)
    assert "has completions of 3 steps" in capsys.readouterr().out
    sampled = read_outputs(path, flag="--a", do_sample=True).outputs
    assert [(o.text, o.truncated) for o in sampled] == [("p30", True), ("q40", True), ("p30", True), ("r10", True)]
    without = write(tmp_path / "bare.jsonl", [record("p", 0, 1, greedy_completion=None, answer=3)])
    assert read_outputs(without, flag="--a", do_sample=True).outputs[0].columns == {"answer": 3}
    with pytest.raises(UserError, match="no greedy completions to compare; set --do_sample"):
        read_outputs(without, flag="--a", do_sample=False)


def test_alpaca_eval_files_meet_conversations(tmp_path: Path) -> None:
    rows = [{"instruction": q, "output": f"{q}!", "generator": "them", "dataset": "d"} for q in ("one", "two", "one")]
    theirs = read_outputs(write(tmp_path / "b.json", rows), flag="--b", do_sample=False)
    assert theirs.generator == "them"
    assert theirs.outputs[0].columns == {"generator": "them", "dataset": "d"}
    chat = [{"prompt": [{"role": "user", "content": q}], "completion": f"{q}?"} for q in ("two", "one", "three")]
    ours = read_outputs(write(tmp_path / "a.jsonl", chat), flag="--a", do_sample=False)
    pairs = pair_up(ours, theirs)
    assert [(p.a.text, p.b.text) for p in pairs] == [("two?", "two!"), ("one?", "one!")]
    for completion in pairs[0].completions():
        assert completion.prompt.content == [{"role": "user", "content": "two"}]
    assert pairs[0].completions()[1].content == [{"role": "assistant", "content": "two!"}]
    plain = [{"prompt": "two", "completion": "2"}]
    texts = read_outputs(write(tmp_path / "c.jsonl", plain), flag="--a", do_sample=False)
    assert isinstance(pair_up(texts, theirs)[0].prompt, list), "both sides are judged in one format"


def test_equal_prompts_are_paired_in_their_order() -> None:
    assert numbered(["x", "y", "x"]) == [("x", 0), ("y", 0), ("x", 1)]
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]
    assert numbered([system, "x"])[0] != numbered(["x"])[0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", [{"instruction": "x", "answer": "y"}], ["--a", "instruction, answer", "AlpacaEval"]),
        ("a.json", [{"instruction": "x", "output": None}], ["no value", "'output'", "row 0"]),
        ("a.jsonl", [{"prompt": "x", "completion": 3}], ["a int", "'completion'", "row 0"]),
        ("a.jsonl", [{"prompt": "other", "completion": "c"}], ["no prompt is in both"]),
        ("a.jsonl", [], ["empty file"]),
        ("nowhere.jsonl", None, ["nowhere.jsonl", "does not exist"]),
    ],
)
def test_mistakes_in_files(name: str, content: Any, words: list[str], tmp_path: Path, capsys: Any) -> None:
    a = tmp_path / name if content is None else write(tmp_path / name, content)
    b = write(tmp_path / "b.jsonl", [{"prompt": "x", "completion": "c"}])
    (tmp_path / "r.py").write_text("def f(completions, **_): return [1.0] * len(completions)")
    out = tmp_path / "out"
    flags = ["--reward_funcs", f"{tmp_path / 'r.py'}:f", "--reward_timeout_seconds", "0", "--output_dir", str(out)]
    assert main(["winrate", str(a), b, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert ";" in error
    assert all(word in error for word in words), error
    assert not out.exists()


MISTAKES = {
    "no judge": (["a.json", "b.json"], "there is no judge"),
    "two judges": (["a.json", "b.json", "--reward_model", "r", "--judge_url", "http://x"], "there can be one judge"),
    "no judge model": (["a.json", "b.json", "--judge_url", "http://x"], "--judge_model is not set"),
    "no prompts": (["m", "b.json", "--reward_model", "r"], "--eval_dataset is not set: the checkpoint m"),
    "prompts ignored": (["a.json", "b.json", "--eval_dataset", "p", "--reward_model", "r"], "it would be ignored"),
    "itself": (["m", "m", "--eval_dataset", "p", "--reward_model", "r"], "nothing to compare"),
    "one side": (["m", "--eval_dataset", "p", "--reward_model", "r"], "--b must be set"),
    "no address": (["a.json", "b.json", "--judge_url", "ftp://x", "--judge_model", "j"], "no address of an endpoint"),
    "greedy heat": (["a.json", "b.json", "--reward_model", "r", "--temperature", "0.5"], "--temperature is 0.5"),
    "no such model": (["./m", "b.json", "--eval_dataset", "p", "--reward_model", "r"], "--a is ./m"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_settings(mistake: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, words = MISTAKES[mistake]
    assert main(["winrate", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_password_in_the_address_is_not_repeated(capsys: Any) -> None:
    url = "http://me:hunter2@x/v1"  # pragma: allowlist secret
    assert main(["winrate", "a.json", "b.json", "--judge_url", url, "--judge_model", "j"]) == 2
    error = capsys.readouterr().err
    assert "hunter2" not in error
    assert KEY_VARIABLE in error


# The command ----------------------------------------------------------------------------------------------------------


def test_two_files_and_an_endpoint(tmp_path: Path, capsys: Any) -> None:
    outputs = {"a": [*HOSTILE, "a long answer"], "b": ["b"] * 8}
    paths = [
        write(
            tmp_path / f"{name}.json",
            [{"instruction": f"q{k}", "output": text, "generator": name} for k, text in enumerate(texts)],
        )
        for name, texts in outputs.items()
    ]
    out = tmp_path / "out"
    with fake_endpoint(longer) as (url, _):
        flags = ["--judge_url", url, "--judge_model", "j", "--output_dir", str(out)]
        assert main(["winrate", *paths, *flags]) == 0
        assert main(["winrate", *paths, *flags]) == 2, "a result is not overwritten"
    printed = capsys.readouterr().out
    assert "A: a, " in printed
    assert "characters on average" in printed
    result = json.loads((out / "winrate.json").read_text())
    assert (result["wins"], result["losses"], result["ties"]) == (7, 1, 0)
    assert result["position"] == {"first_rate": 0.5, "agreement": 1.0}
    assert result["mean_length"]["a"] == pytest.approx(sum(map(len, outputs["a"])) / 8)
    records = [json.loads(line) for line in (out / "pairs.jsonl").read_text().split("\n") if line]
    assert [r["a"] for r in records] == outputs["a"]
    assert [r["winner"] for r in records] == ["a"] * 6 + ["b", "a"]
    with (out / "pairs.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert table[5]["a"].startswith("'=HYPERLINK")
    assert [row["winner"] for row in table] == [r["winner"] for r in records]
    for name in ("pairs.jsonl", "pairs.csv"):
        assert not {"\x1b", "\u202e", "\u2028"} & set((out / name).read_text())


def test_a_judge_that_sees_no_difference_is_told(tmp_path: Path, capsys: Any) -> None:
    """The instructions of AlpacaEval are messages, so a function that takes completions for texts measures lists."""
    paths = [
        write(tmp_path / f"{name}.json", [{"instruction": q, "output": text, "generator": name} for q, text in outputs])
        for name, outputs in {"a": [("q", "long text"), ("r", "x")], "b": [("q", "short"), ("r", "x")]}.items()
    ]
    (tmp_path / "rewards.py").write_text(
        "def length(completions, **_):\n    return [len(text) for text in completions]\n"
        "def letters(completions, **_):\n    return [len(text[0]['content']) for text in completions]\n"
    )
    printed = {}
    for name in ("length", "letters"):
        judge = ["--reward_funcs", f"{tmp_path / 'rewards.py'}:{name}", "--reward_timeout_seconds", "0"]
        assert main(["winrate", *paths, *judge, "--output_dir", str(tmp_path / name)]) == 0
        printed[name] = capsys.readouterr().out
        assert "1 pairs have the same output twice, and count as ties." in printed[name]
    assert "every pair is a tie: the judge sees no difference" in printed["length"]
    assert "sees no difference" not in printed["letters"]
    with (tmp_path / "length" / "pairs.csv").open(newline="") as file:
        assert json.loads(next(csv.DictReader(file))["prompt"]) == [{"role": "user", "content": "q"}]


def test_two_checkpoints_and_rewards(world: Path, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    """The outputs are those of `remax evaluate`, sampled and greedy, from checkpoints and from its files."""
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(world / "policy")
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(other)
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(other)
    (tmp_path / "rewards.py").write_text(
        "def letters(completions, answer, **_):\n    return [len(set(text)) for text in completions]\n"
    )
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"{c} cat", "answer": c} for c in "abcdef"])
    settings = ["--eval_dataset", prompts, "--max_completion_length", "9", "--reward_timeout_seconds", "0"]
    names = {"a": str(world / "policy"), "b": str(other)}
    evaluated = {}
    for side, name in names.items():
        folder = tmp_path / f"evaluated-{side}"
        assert main(["evaluate", "--model", name, *settings, "--output_dir", str(folder)]) == 0
        evaluated[side] = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]

    out = tmp_path / "sampled"
    judge = ["--reward_funcs", f"{tmp_path / 'rewards.py'}:letters", "--do_sample"]
    assert main(["winrate", *names.values(), *settings, *judge, "--output_dir", str(out)]) == 0
    records = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    for side in names:
        assert [r[side] for r in records] == [row["completion"] for row in evaluated[side]]
        for r in records:
            assert r[f"reward_{side}"] == len(set(r[side]))
            assert r[f"length_{side}"] == len(r[side])
    assert [r["score"] for r in records] == [(np.sign(r["reward_a"] - r["reward_b"]) + 1) / 2 for r in records]
    assert yaml.safe_load((out / "config.yaml").read_text())["a"] == names["a"]

    capsys.readouterr()
    result = run_winrate(
        WinrateInputs(
            a=str(tmp_path / "evaluated-a" / "completions.jsonl"),
            b=str(other),
            eval_dataset=prompts,
            reward_model=str(world / "reward"),
        ),
        WinrateConfig(max_completion_length=9, output_dir=str(tmp_path / "greedy")),
    )
    assert (result["num_judged"], result["num_unpaired"]) == (6, {"a": 0, "b": 0})
    records = [json.loads(line) for line in (tmp_path / "greedy" / "pairs.jsonl").read_text().splitlines()]
    for side in names:
        assert [r[side] for r in records] == [row["greedy_completion"] for row in evaluated[side]]
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    low, high = result["win_rate"]["interval"]
    assert f"win rate, ties as half {result['win_rate']['mean']:.1%} {low:.1%} to {high:.1%}" in lines
    for side, name in (("a", result["a"]["name"]), ("b", str(other))):
        assert f"{side.upper()}: {name}, {result['mean_length'][side]:.0f} characters on average" in lines


def test_a_reward_model_without_a_template_is_found_at_the_start(world: Path, tmp_path: Path) -> None:  # noqa: F811
    copy = tmp_path / "untemplated"
    shutil.copytree(world / "reward", copy)
    (copy / "chat_template.jinja").unlink()
    theirs = write(tmp_path / "b.json", [{"instruction": "a", "output": "b"}])
    prompts = write(tmp_path / "p.jsonl", [{"prompt": [{"role": "user", "content": "a"}]}])
    # The policy has no template either, which shows as soon as it is to answer.
    with pytest.raises(UserError, match=r"--reward_model is .* has no chat template"):
        run_winrate(
            WinrateInputs(a=str(world / "policy"), b=theirs, eval_dataset=prompts, reward_model=str(copy)),
            WinrateConfig(),
        )

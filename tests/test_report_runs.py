"""`remax report` of runs that go on, of folders that hold none, and at the end of a training."""

# ruff: noqa: F811

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remax.cli import main
from remax.config import ReportConfig
from remax.errors import UserError
from remax.report.reading import read_runs
from remax.report.summary import summarise
from report_pages import Parsed, report, rows_of, undrawn  # noqa: F401
from report_runs import held_out, write_lines, write_run
from toy_tokenizers import toy_tokenizer
from toy_training import PROMPTS, policy

# A run that goes on, and folders that are none ------------------------------------------------------------------------


def test_a_run_that_goes_on_is_shown_up_to_its_last_whole_line(tmp_path: Path, undrawn: None) -> None:
    folder = write_run(tmp_path / "run", ended=False, max_steps=9)
    for name in ("metrics.jsonl", "completions.jsonl", "eval.jsonl", "eval_completions.jsonl"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole + '{"step": 5, "reward": 1, "prompt": "é'.encode()[:-1])
    (run,) = read_runs([str(folder)])
    assert (run.step, len(run.completions), len(run.held_out), len(run.evaluations)) == (4, 12, 9, 3)
    parsed = report(folder)
    assert "It is shown after step 4 of 9." in parsed.text
    assert len(rows_of(parsed)) == 21
    assert "has not ended" not in report(write_run(tmp_path / "ended")).text


def test_a_run_before_its_second_evaluation_is_shown_by_its_steps(tmp_path: Path, undrawn: None) -> None:
    folder = write_run(tmp_path / "run", ended=False)
    first = (folder / "eval.jsonl").read_text().splitlines()[0]
    (folder / "eval.jsonl").write_text(first + "\n")
    parsed = report(folder)
    assert "One evaluation is there to compare" in parsed.text
    (folder / "metrics.jsonl").unlink()
    assert "No step is done yet." in report(folder).text


def test_what_was_evaluated_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "eval_completions.jsonl").open("a") as file:
        file.write(json.dumps(held_out(4, 0, completion="again")) + "\n")
    (run,) = read_runs([str(folder)])
    assert len(run.held_out) == 9
    drawn = [r["completion"] for r in run.held_out.read(range(9)) if (r["step"], r["prompt_index"]) == (4, 0)]
    assert drawn == ["again"]


def damaged(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")


def no_object(folder: Path) -> None:
    (folder / "completions.jsonl").write_text("[1]\n")


def other_encoding(folder: Path) -> None:
    (folder / "eval.jsonl").write_bytes(b'{"step": 0, "x": "\xff"}\n')


def too_deep(folder: Path) -> None:
    (folder / "alarms.jsonl").write_text("[" * 100_000 + "\n")


def no_rewards(folder: Path) -> None:
    write_lines(folder / "metrics.jsonl", [{"step": 1, "loss": 2.0}])


def no_step(folder: Path) -> None:
    write_lines(folder / "metrics.jsonl", [{"reward": 1.0}])


def empty(folder: Path) -> None:
    for file in folder.glob("*.jsonl"):
        file.unlink()


def gone(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damaged, "line 2 of metrics.jsonl is no JSON object"),
        (no_object, "line 1 of completions.jsonl is no JSON object"),
        (other_encoding, "line 1 of eval.jsonl is no JSON object"),
        (too_deep, "line 1 of alarms.jsonl is no JSON object"),
        (no_rewards, "a run without rewards, perhaps of `remax sft`"),
        (no_step, "metrics.jsonl has a line without a step"),
        (empty, "it holds no run, or one that has not done its first step"),
        (gone, "there is no such folder"),
    ],
)
def test_what_is_no_run_is_one_sentence(harm: Any, message: str, tmp_path: Path, capsys: Any) -> None:
    folder = write_run(tmp_path / "run")
    harm(folder)
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"remax: --runs has {folder}: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*/*.html"))


def test_folders_that_cannot_go_together(tmp_path: Path, capsys: Any) -> None:
    folder = write_run(tmp_path / "run")
    assert main(["report", str(folder), str(tmp_path / "x" / ".." / "run")]) == 2
    assert "one folder is named twice" in capsys.readouterr().err
    assert main(["report", *[str(folder)] * 9]) == 2
    assert "--runs names 9 runs: there are colours for 8" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "--runs must be set" in capsys.readouterr().err
    assert main(["report", str(folder), "--output_file", str(tmp_path)]) == 2
    assert "that is a folder" in capsys.readouterr().err
    assert main(["report", str(folder), "--output_file", str(tmp_path / "no" / "x.html")]) == 2
    assert "it cannot be written (No such file or directory)" in capsys.readouterr().err
    with pytest.raises(UserError, match="--runs is empty"):
        ReportConfig(runs=[])


def test_damaged_settings_and_provenance_leave_the_figures(tmp_path: Path, undrawn: None) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "provenance.json").write_text('{"starts": 3}')
    for text in ("a: [", "- 1", "a: &x [1]\nb: *x", "\x00"):
        (folder / "config.yaml").write_text(text)
        parsed = report(folder)
        assert "config.yaml is missing or cannot be read" in parsed.text
        assert "no provenance.json" in parsed.text


def test_the_command_writes_where_it_is_told(tmp_path: Path, capsys: Any, undrawn: None) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert main(["report", str(first)]) == 0
    assert f"The report is {first / 'report.html'} (" in capsys.readouterr().out
    assert main(["report", str(first), str(second)]) == 0
    assert (first / "report-of-several.html").is_file()
    assert main(["report", "--runs", str(second), "--output_file", str(tmp_path / "own.html")]) == 0
    assert (tmp_path / "own.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in second.iterdir() if path.suffix == ".html") == []
    assert not list(tmp_path.rglob("*.partial"))


# At the end of a training ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    policy().save_pretrained(folder / "model")
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(folder / "model")
    reward = "def vowels(completions, **_):\n    return [sum(c in 'aeiou' for c in text) / 4 for text in completions]\n"
    (folder / "rewards.py").write_text(reward)
    write_lines(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    return folder


def train(world: Path, output_dir: Path, *flags: str) -> int:
    files = ["--model", f"{world / 'model'}", "--reward_funcs", f"{world / 'rewards.py'}:vowels"]
    files += ["--train_dataset", f"{world / 'prompts.jsonl'}", "--eval_dataset", f"{world / 'prompts.jsonl'}"]
    settings = ["--batch_size", "4", "--max_completion_length", "6", "--max_steps", "2", "--report_to", "none"]
    settings += ["--reward_timeout_seconds", "0", "--save_steps", "-1", "--output_dir", str(output_dir)]
    return main(["train", *files, *settings, *flags])


def test_a_training_leaves_its_report(world: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert train(world, out) == 0
    assert f"The report is {out / 'report.html'}." in capsys.readouterr().out
    parsed = Parsed((out / "report.html").read_text(encoding="utf-8"))
    assert "In 2 steps, on held-out prompts, the reward" in parsed.text
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    sampled_line = parsed.data["charts"]["reward"]["panels"][0]["lines"][0]
    assert sampled_line["y"] == pytest.approx([line["reward"] for line in metrics], rel=1e-4)
    drawn = [row for row in rows_of(parsed) if row["source"] == 1]
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert sorted((row["step"], row["index"]) for row in drawn) == sorted((r["step"], r["prompt_index"]) for r in lines)
    assert "has not ended" not in parsed.text


def test_a_training_that_a_guard_stops_leaves_its_report_too(world: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    guard = ["--alarms", "stop", "--max_truncated", "0.001", "--alarm_window", "1", "--learning_rate", "0.1"]
    assert train(world, out, "--max_steps", "30", *guard) == 3
    assert f"The report is {out / 'report.html'}." in capsys.readouterr().out
    text = Parsed((out / "report.html").read_text(encoding="utf-8")).text
    assert "The run has not ended" in text
    assert "Alarm after step" in text


def test_a_report_that_fails_does_not_fail_the_training(
    world: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Path:
        raise RuntimeError("the pens\nare dry")

    monkeypatch.setattr("remax.report.command.write_report", fail)
    out = tmp_path / "out"
    assert train(world, out) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "pens" in line]
    assert lines == [f"The report could not be made (the pens are dry); `remax report {out}` tries again."]
    assert (out / "model").is_dir()


def test_a_training_leaves_what_its_report_needs(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train(world, out) == 0
    (run,) = read_runs([str(out)])
    assert len(run.held_out) == 2 * len(PROMPTS)
    for evaluation in run.evaluations:
        for name in ("reward", "reward/greedy", "kl", "entropy", "completions/mean_length"):
            values = run.by_prompt(name, evaluation["step"])
            assert np.mean([*values.values()]) == pytest.approx(evaluation[name], abs=1e-9)
    first = next(run.held_out.read([0]))
    assert first["prompt"] == PROMPTS[0]
    assert first["values"]["reward"] == sum(c in "aeiou" for c in first["completion"]) / 4
    assert first["values"]["reward/greedy"] == sum(c in "aeiou" for c in first["greedy_completion"]) / 4
    assert summarise(run).changes["reward"].change.interval is not None
    (start,) = run.starts
    assert (start["step"], start["num_processes"]) == (0, 1)
    other = tmp_path / "other"
    assert train(world, other, "--log_completions", "false") == 0
    assert not list(other.glob("*completions.jsonl"))

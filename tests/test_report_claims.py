"""What `remax report` says of runs: which is the best of several, how to repeat one, and what its curves mean."""

# ruff: noqa: F811

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from remax.report.curves import charts
from remax.report.reading import read_runs
from remax.report.shapes import Chart
from remax.report.summary import headline, summarise
from report_pages import Parsed, report, undrawn  # noqa: F401
from report_runs import held_out, metrics_of, write_lines, write_run

# Which run is the best ------------------------------------------------------------------------------------------------

NONE_NAMED = dict.fromkeys(("reward_model", "gold_reward_model", "eval_dataset"))
"""What the settings of a training in Python hold: its rewards and data are objects."""


def said_of(*folders: Path) -> str:
    runs = read_runs([str(folder) for folder in folders])
    return headline(runs, [summarise(run) for run in runs])


def without_gold(folder: Path) -> Path:
    for name in ("eval.jsonl", "eval_completions.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for line in lines:
            values = line.get("values", line)
            for key in ("gold", "gold/greedy", "eval/gold", "eval/gold/greedy"):
                values.pop(key, None)
        write_lines(folder / name, lines)
    return folder


def test_of_comparable_runs_the_best_is_named(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, steps=steps, seed=steps) for name, steps in (("a", 4), ("b", 6))]
    # At the last step s, the gold reward of prompt i is -(s (i + 1) + i), and its reward is the opposite.
    assert said_of(*folders).startswith("Of 2 runs, a reaches the highest gold reward on held-out prompts: \u22129.0 (")
    for folder in folders:
        without_gold(folder)
    assert said_of(*folders).startswith("Of 2 runs, b reaches the highest reward on held-out prompts: 13.0 (")


def test_runs_that_end_alike_are_called_the_same(tmp_path: Path) -> None:
    same, alike = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert said_of(same, alike).startswith("2 runs reach the same gold reward on held-out prompts: \u22129.0 (")
    worse = write_run(tmp_path / "c", steps=6)
    assert said_of(worse, same, alike).startswith("Of 3 runs, a and b reach the same highest gold reward")


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (NONE_NAMED, NONE_NAMED, "the settings of some do not say which rewards they had"),
        ({}, NONE_NAMED, "the settings of some do not say which rewards they had"),
        ({}, {"reward_model": "other/model"}, "their settings name different rewards"),
        ({}, {"reward_funcs": ["rewards.py:brevity"]}, "their settings name different rewards"),
        ({"reward_weights": [1.0, 2.0]}, {"reward_weights": [2.0, 1.0]}, "their settings name different rewards"),
        ({"num_eval_prompts": 64}, {"num_eval_prompts": 16}, "their settings name different evaluations"),
        ({"temperature": 1.0}, {"temperature": 0.7}, "their settings name different evaluations"),
        ({"max_completion_length": 24}, {"max_completion_length": 48}, "their settings name different evaluations"),
        ({}, {"eval_dataset": "others.jsonl"}, "their settings name different evaluations"),
    ],
)
def test_runs_whose_rewards_or_evaluations_differ_are_not_ranked(
    first: dict[str, Any], second: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folders = [without_gold(write_run(tmp_path / name, **own)) for name, own in (("a", first), ("b", second))]
    assert said_of(*folders) == f"2 runs side by side; {reason}, so none is called the best."


def test_runs_of_other_rewards_prompts_or_lengths_are_not_ranked(tmp_path: Path) -> None:
    one = without_gold(write_run(tmp_path / "one"))
    other = without_gold(write_run(tmp_path / "other", prompts=2))
    assert "they were evaluated on different prompts" in said_of(one, other)
    texts = without_gold(write_run(tmp_path / "texts"))
    lines = [json.loads(line) for line in (texts / "eval_completions.jsonl").read_text().splitlines()]
    write_lines(texts / "eval_completions.jsonl", [{**line, "prompt": "Other?"} for line in lines])
    assert "they were evaluated on different prompts" in said_of(one, texts)
    names = without_gold(write_run(tmp_path / "names"))
    write_lines(names / "metrics.jsonl", [{"step": 4, "reward": 0.4, "rewards/price/mean": 0.4}])
    assert "their settings name different rewards" in said_of(one, names)
    (names / "eval.jsonl").unlink()
    assert "not all have evaluations on held-out prompts" in said_of(one, names)


def test_one_gold_reward_judges_runs_that_learn_from_different_rewards(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=6, reward_model="other/model")
    assert "a reaches the highest gold reward" in said_of(one, other)
    third = write_run(tmp_path / "c", gold_reward_model="other/model")
    assert "their settings name different rewards" in said_of(one, third)


def test_a_reward_is_the_file_that_was_meant_where_the_run_was_started(tmp_path: Path) -> None:
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "rewards.py").touch()
    function = {"reward_model": None, "reward_funcs": ["rewards.py:f"]}
    one = without_gold(write_run(tmp_path / "x" / "one", **function))
    namesake = without_gold(write_run(tmp_path / "y" / "namesake", **function))
    assert "their settings name different rewards" in said_of(one, namesake)
    whole = {**function, "reward_funcs": [f"{tmp_path / 'x' / 'rewards.py'}:f"]}
    again = without_gold(write_run(tmp_path / "y" / "again", **whole))
    assert "reach the same reward" in said_of(one, again)


# How to repeat it -----------------------------------------------------------------------------------------------------


def started(folder: Path, command: str, **more: Any) -> Path:
    start = json.loads((folder / "provenance.json").read_text())["starts"][0] | {"command": command, **more}
    (folder / "provenance.json").write_text(json.dumps({"starts": [start]}), encoding="utf-8")
    return folder


def last_words(parsed: Parsed) -> str:
    return parsed.text[parsed.text.index("To run ") :] if "To run " in parsed.text else ""


def test_a_training_is_repeated_from_its_settings_where_it_was_started(tmp_path: Path, undrawn: None) -> None:
    folder = write_run(tmp_path / "a b" / "run")
    settings = f"{shlex.quote(str(folder / 'config.yaml'))} --output_dir NEW"
    there = f"cd '{tmp_path / 'a b'}' && remax train --config"
    assert f"{there} {settings}\nremax report {shlex.quote(str(folder))}" in last_words(report(folder))
    for command in (
        "remax train --accelerate_config ddp --model M --num_processes 2",
        "remax train --accelerate-config=ddp --model M --num-processes=2",
    ):
        text = last_words(report(started(folder, command, num_processes=2)))
        assert "config.yaml' --accelerate_config ddp --num_processes 2 --output_dir NEW\n" in text


@pytest.mark.parametrize(
    ("command", "processes", "then"),
    [
        ("python train.py", 1, ""),
        ("remax compare --spec spec.yaml", 1, ""),
        ("remax train --model M", 2, ", in 2 processes as then"),  # Under torchrun.
        ("remax train --config 'unclosed", 1, ""),
    ],
)
def test_what_its_settings_do_not_say_is_not_repeated_from_them(
    command: str, processes: int, then: str, tmp_path: Path, undrawn: None
) -> None:
    folder = started(write_run(tmp_path / "run"), command, num_processes=processes)
    text = last_words(report(folder))
    assert text.startswith(f"To run run again, run its command above with another output_dir{then}.")
    assert "--config" not in text
    assert f"remax report {folder}" in text


def test_of_several_runs_it_is_said_which_is_repeated_how(tmp_path: Path, undrawn: None) -> None:
    folders = [write_run(tmp_path / name) for name in "abc"]
    started(folders[1], "python train.py")
    text = last_words(report(*folders))
    assert text.startswith("To run b again, run its command above with another output_dir.")
    assert "To run a, c again, and to make this page again (by remax" in text
    assert [line.split()[6] for line in text.splitlines() if "--config" in line] == [
        f"{folder / 'config.yaml'}" for folder in (folders[0], folders[2])
    ]


def test_a_run_of_which_no_command_is_known_is_not_repeated(tmp_path: Path, undrawn: None) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "provenance.json").unlink()
    parsed = report(folder)
    assert "no commands, versions and hardware are recorded" in parsed.text
    assert "To make this page again" in parsed.text
    assert last_words(parsed) == ""


# What is said of the curves -------------------------------------------------------------------------------------------


def charts_of(*folders: Path) -> dict[str, Chart]:
    return {chart.key: chart for chart in charts(read_runs([str(folder) for folder in folders]))}


def test_a_reward_that_nobody_learned_is_not_called_learned(tmp_path: Path) -> None:
    verifiable = {"reward_model": None, "reward_funcs": ["rewards.py:exact"]}
    for name, config in (("functions", verifiable), ("model", {})):
        folder = write_run(tmp_path / name, **config)
        assert "learned" not in report(folder).text
        assert charts_of(folder)["held-out"].title == "Reward against gold reward, held out"
        alone = charts_of(without_gold(folder))["held-out"]
        assert alone.title == "Reward, held out"
        assert ("nothing tells whether a higher reward is a better policy" in alone.reading) == (name == "model")


def test_nothing_is_said_of_a_greedy_line_that_is_not_there(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", method="rloo")
    assert "greedy" in charts_of(folder)["reward"].reading
    write_lines(folder / "metrics.jsonl", [{**metrics_of(step), "reward/greedy": None} for step in (1, 2)])
    assert "greedy" not in charts_of(folder)["reward"].reading


def test_intervals_are_spoken_of_where_they_are_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert "95% intervals" in charts_of(folder)["held-out"].reading
    (folder / "eval_completions.jsonl").unlink()
    chart = charts_of(folder)["held-out"]
    assert "interval" not in chart.reading
    assert "and is never trained on" in chart.reading


def test_many_prompts_have_no_bootstrap_intervals(tmp_path: Path) -> None:
    (run,) = read_runs([str(write_run(tmp_path / "run", prompts=600))])
    basis = summarise(run).basis
    assert "the same 600 held-out prompts; 95% intervals over prompts" in basis
    assert "bootstrap" not in basis


def test_rewards_one_by_one_are_those_of_a_run_with_several(tmp_path: Path) -> None:
    def rewards(folder: Path, names: str) -> Path:
        own = {f"rewards/{name}/mean": 0.5 for name in names}
        write_lines(folder / "metrics.jsonl", [{"step": step, "reward": 1.0, **own} for step in (1, 2)])
        return folder

    one, other = rewards(write_run(tmp_path / "a"), "a"), rewards(write_run(tmp_path / "b"), "b")
    assert "functions" not in charts_of(one, other)
    both = charts_of(rewards(one, "ac"), other)["functions"]
    assert [name for name, _ in both.names] == ["a", "c"]
    assert "drawn" not in both.reading
    many = charts_of(rewards(one, "abcdefg"))["functions"]
    assert [name for name, _ in many.names] == list("abcdef")
    assert "The first 6 of 7 are drawn; metrics.jsonl has all." in many.reading


def test_a_few_values_are_no_hint_at_a_trick(tmp_path: Path) -> None:
    assert "unless rewards have only a few values" in charts_of(write_run(tmp_path / "run"))["histogram"].reading


def test_only_what_is_there_is_explained(tmp_path: Path, undrawn: None) -> None:
    folder = write_run(tmp_path / "run")
    gap = "Gap is the reward of the sample minus that of the greedy completion of the same prompt."
    parsed = report(folder)
    assert gap in parsed.text
    assert "its baseline" not in parsed.text
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    write_lines(folder / "completions.jsonl", [{**line, "greedy_reward": None} for line in lines])
    assert gap in report(folder).text  # Of the evaluations.
    values = {"reward": 1.0}
    write_lines(folder / "eval_completions.jsonl", [held_out(step, 0, values=values) for step in (0, 4)])
    text = report(folder).text
    assert gap not in text
    assert "Best and worst go by the reward" in text
    for name in ("completions.jsonl", "eval_completions.jsonl"):
        (folder / name).unlink()
    text = report(folder).text
    assert "No completions were kept" in text
    assert "Best and worst" not in text


def test_a_list_that_is_not_set_is_told_like_any_other_setting(tmp_path: Path, undrawn: None) -> None:
    first, second = write_run(tmp_path / "a", reward_weights=[]), write_run(tmp_path / "b", reward_weights=[1.0])
    text = report(first, second).text
    assert "[]" not in text
    assert "reward_weights\u2013[1.0]" in text
    third = write_run(tmp_path / "c")  # Without the setting: that is no difference.
    assert "All settings are the same." in report(first, third).text

"""`remax report`: what changed between before and after, the curves, and what else the page says."""

# ruff: noqa: F811

import json
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from remax.report.curves import charts
from remax.report.reading import labels, read_runs
from remax.report.shapes import MOST_POINTS, Line, running_mean, smoothed, thinned
from remax.report.summary import headline, mean, summarise
from report_pages import report, rows_of, undrawn  # noqa: F401
from report_runs import held_out, metrics_of, write_lines, write_run

# Before and after -----------------------------------------------------------------------------------------------------


def test_before_and_after_are_those_of_the_evaluations_and_the_change_is_paired(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    before, gains = rng.normal(0, 10, 40), rng.normal(0.5, 0.2, 40)
    folder = write_run(tmp_path / "run")
    values = {0: before, 2: before * 7, 4: before + gains}
    lines = [
        held_out(step, prompt, values={"reward": own[prompt], "kl": float(prompt)})
        for step, own in values.items()
        for prompt in range(40)
    ]
    write_lines(folder / "eval_completions.jsonl", lines)
    write_lines(folder / "eval.jsonl", [{"step": s, "eval/reward": v.mean(), "eval/kl": 0} for s, v in values.items()])
    (run,) = read_runs([str(folder)])
    summary = summarise(run)
    change = summary.changes["reward"]
    assert change.before.value == pytest.approx(before.mean())
    assert change.after.value == pytest.approx((before + gains).mean())
    assert change.change.value == pytest.approx(gains.mean())
    # Prompts differ by 10, their gains by 0.2: only pairing sees the gain.
    assert change.change.interval is not None
    assert change.before.interval is not None
    error = gains.std(ddof=1) / np.sqrt(40)
    expected = (gains.mean() - 1.96 * error, gains.mean() + 1.96 * error)
    assert change.change.interval == pytest.approx(expected, abs=0.15 * error)
    assert change.before.interval[1] - change.before.interval[0] == pytest.approx(
        3.92 * before.std(ddof=1) / np.sqrt(40), rel=0.1
    )
    assert change.verdict == "rose"
    assert "on held-out prompts, the reward rose" in headline([run], [summary])
    assert "the same 40 held-out prompts" in summary.basis


def test_a_prompt_without_a_value_at_one_end_is_left_out_of_the_change(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", prompts=4)
    lines = [json.loads(line) for line in (folder / "eval_completions.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == 4 and line["prompt_index"] == 3:
            line["values"]["reward"] = None
    write_lines(folder / "eval_completions.jsonl", lines)
    (run,) = read_runs([str(folder)])
    change = summarise(run).changes["reward"]
    assert change.change.value == pytest.approx((4 * 1 + 4 * 2 + 4 * 3) / 3)
    assert change.before.value == pytest.approx((0 + 1 + 2 + 3) / 4)


def test_without_evaluations_the_first_and_last_steps_stand_in(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=30)
    (folder / "eval.jsonl").unlink()
    (folder / "eval_completions.jsonl").unlink()
    (run,) = read_runs([str(folder)])
    summary = summarise(run)
    change = summary.changes["reward"]
    assert change.before.value == pytest.approx(0.1 * np.mean(range(1, 11)))
    assert change.after.value == pytest.approx(0.1 * np.mean(range(21, 31)))
    assert change.change.interval is None
    assert "the first and the last 10 steps" in summary.basis
    assert "on training prompts" in headline([run], [summary])


def test_means_without_prompts_have_no_intervals(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "eval_completions.jsonl").unlink()
    (run,) = read_runs([str(folder)])
    summary = summarise(run)
    assert summary.changes["reward"].before.interval is None
    assert summary.changes["reward"].after.value == pytest.approx(4 * 2 + 1)
    assert "only means were kept" in summary.basis


def test_many_values_have_a_normal_interval_and_few_the_same_by_bootstrap() -> None:
    values = np.random.default_rng(0).normal(5, 2, 2000)
    interval = mean(values).interval
    few = mean(values[:500]).interval
    assert interval is not None
    assert few is not None
    assert interval == pytest.approx((values.mean() - 0.0877, values.mean() + 0.0877), abs=0.005)
    assert few[1] - few[0] == pytest.approx(2 * (interval[1] - interval[0]), rel=0.1)
    assert mean(values[:1]).interval is None


# Curves ---------------------------------------------------------------------------------------------------------------


def test_the_charts_that_a_run_has(tmp_path: Path) -> None:
    drawn = {chart.key: chart for chart in charts(read_runs([str(write_run(tmp_path / "run"))]))}
    assert list(drawn) == [
        *("reward", "held-out", "against-kl", "kl", "length", "entropy", "gradient", "fractions", "functions"),
        *("histogram", "time", "memory"),
    ]
    assert all(chart.reading.endswith(".") for chart in drawn.values())
    sampled_line, greedy_line = drawn["reward"].panels[0].lines
    assert sampled_line.x.tolist() == [1, 2, 3, 4]
    assert greedy_line.y == pytest.approx([0.15, 0.25, 0.35, 0.45])
    trained_on, gold = drawn["held-out"].panels
    assert (trained_on.label, gold.label) == ("reward", "gold reward")
    assert trained_on.lines[0].y == pytest.approx([1, 5, 9])
    assert gold.lines[0].y == pytest.approx([-1, -5, -9])
    path = drawn["against-kl"].panels[0].lines[0]
    assert (path.x.tolist(), path.y.tolist()) == ([0, 2, 4], [1, 5, 9])
    phases = {line.name: line.y.tolist() for line in drawn["time"].panels[0].lines}
    assert phases == {"rollout": [1.0] * 4, "reward": [0.5] * 4, "update": [0.25] * 4, "rest": [0.25] * 4}
    assert {line.name: line.y[0] for line in drawn["memory"].panels[0].lines} == {"rollout": 3.0, "update": 5.0}
    heat = drawn["histogram"].panels[0].heat
    assert heat is not None
    assert heat.shares.sum(axis=0) == pytest.approx([1, 1, 1, 1])
    centres = (heat.y_edges[1:] + heat.y_edges[:-1]) / 2
    height = heat.y_edges[1] - heat.y_edges[0]
    assert (heat.shares * centres[:, None]).sum(axis=0) == pytest.approx([2, 3, 4, 5], abs=height)


def test_what_a_method_does_not_measure_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = [{k: None if k in ("reward/greedy", "kl") else v for k, v in metrics_of(s).items()} for s in (1, 2)]
    write_lines(folder / "metrics.jsonl", lines)
    for name in ("completions.jsonl", "eval.jsonl", "eval_completions.jsonl"):
        (folder / name).unlink()
    drawn = {chart.key: chart for chart in charts(read_runs([str(folder)]))}
    assert not {"kl", "held-out", "against-kl", "histogram"} & set(drawn)
    assert drawn["reward"].names == [("sampled", 0)]
    report(folder)  # And is drawn.


def test_a_running_mean_is_the_mean_of_as_many_on_both_sides() -> None:
    values = np.arange(9.0) ** 2
    slow = [values[max(0, i - h) : i + h + 1].mean() for i in range(9) for h in [min(i, 8 - i, 2)]]
    assert running_mean(values, 5) == pytest.approx(slow)
    assert thinned(np.arange(10.0)).tolist() == list(range(10))
    many = thinned(np.arange(5 * MOST_POINTS, dtype=float))
    assert many.tolist() == [5 * i + 2 for i in range(MOST_POINTS)]
    short = Line(0, "x", 0, values, values)
    assert smoothed(short) is short
    long = smoothed(Line(0, "x", 0, np.arange(100.0), np.arange(100.0) % 2))
    assert long.faint is not None
    assert long.y[50] == pytest.approx(2 / 5)  # over 5 steps: an even one in the middle has two odd neighbours


def test_several_runs_are_over_each_other_with_what_tells_them_apart(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a" / "out", learning_rate=1e-3)
    second = write_run(tmp_path / "b" / "out", steps=6, learning_rate=2e-3, max_steps=4)
    parsed = report(first, second)
    assert parsed.data["runs"] == ["a/out", "b/out"]
    lines = parsed.data["charts"]["reward"]["panels"][0]["lines"]
    assert [(line["run"], line["name"], line["colour"]) for line in lines] == [
        (0, "sampled", 0),
        (0, "greedy", 0),
        (1, "sampled", 1),
        (1, "greedy", 1),
    ]
    assert {row["run"] for row in rows_of(parsed)} == {0, 1}
    boxes = [attributes for tag, attributes in parsed.elements if tag == "input" and "data-run" in attributes]
    assert [box["data-run"] for box in boxes] == ["0", "1"]
    settings = parsed.text[parsed.text.index("run 1: a/out") :]
    assert re.search(r"learning_rate\s*0\.001\s*0\.002", settings)
    assert "6 settings that all runs share" in parsed.text


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    assert labels([tmp_path / "x"]) == ["x"]
    assert labels([tmp_path / "x", tmp_path / "y" / "x"]) == [f"{tmp_path.name}/x", "y/x"]
    assert labels([tmp_path / "p" / "s", tmp_path / "q" / "t"]) == ["s", "t"]


# What else the page says ----------------------------------------------------------------------------------------------


def test_settings_commands_versions_hardware_and_alarms(tmp_path: Path, undrawn: None) -> None:
    folder = write_run(tmp_path / "run")
    write_lines(folder / "alarms.jsonl", [{"step": 3, "event": "alarm", "metric": "kl", "message": "Alarm: too far"}])
    parsed = report(folder)
    text = " ".join(parsed.text.split())
    for expected in (
        "remax train --model M",
        "abc123",
        "A CPU",
        "A GPU, A GPU",
        "2.13.0",
        "learning_rate",
        "Alarm: too far",
        f"remax report {folder}",
    ):
        assert expected in text, expected
    assert "Dotted: an alarm." in text
    assert "None was raised" not in text
    assert "None was raised" in report(write_run(tmp_path / "quiet")).text
    assert "switched off (--alarms off)" in report(write_run(tmp_path / "off", alarms="off")).text


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_can_be_told_from_the_ground(theme: int) -> None:
    style = (files("remax.report") / "page.css").read_text(encoding="utf-8")
    colours = {
        name: pair.split(", ")[theme] for name, pair in re.findall(r"--(\w+): light-dark\((#\w{6}, #\w{6})\)", style)
    }

    def contrast(name: str, ground: str) -> float:
        light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for ground in ("paper", "card"):
        for name in ("ink", "soft", "accent", "warn"):
            assert contrast(name, ground) >= 4.5, (name, ground)
        for index in range(8):
            assert contrast(f"c{index}", ground) >= 3, (index, ground)
    for ground in ("added", "removed", "found"):
        assert contrast("ink", ground) >= 4.5, ground

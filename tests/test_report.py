"""`remax report`: what it reads, what it says, and what no text of a run can do to it."""

import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remax.cli import main
from remax.config import ReportConfig
from remax.errors import UserError
from remax.markup import embedded_json
from remax.report.completions import LONGEST_TEXT
from remax.report.curves import charts
from remax.report.drawing import Drawing
from remax.report.page import page
from remax.report.reading import labels, read_runs
from remax.report.shapes import MOST_POINTS, Line, running_mean, smoothed, thinned
from remax.report.summary import headline, mean, summarise
from report_runs import held_out, metrics_of, sampled, write_lines, write_run
from toy_tokenizers import toy_tokenizer
from toy_training import PROMPTS, policy

MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&lt;b&gt;&amp;<!--"
UNSEEN = "a\x00b\x1b[31m\u202ec\u2028d\u200be\U000e0041f"
HOSTILE = MARKUP + UNSEEN
SEEN = MARKUP + "a\ufffdb\ufffd[31m\ufffdc\ufffdd\ufffde\ufffdf"


class Parsed(HTMLParser):
    """What a browser would see: elements with their attributes, texts, and the contents of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open != "style":
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.scripts[0])
        return content


def report(*folders: Path) -> Parsed:
    return Parsed(page(read_runs([str(folder) for folder in folders])))


def rows_of(parsed: Parsed) -> list[dict[str, Any]]:
    """The completions of a page, with their texts."""
    texts, columns = parsed.data["completions"]["texts"], parsed.data["completions"]["rows"]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for row in rows:
        row |= {name: None if row[name] is None else texts[row[name]] for name in ("prompt", "text", "greedy")}
    return rows


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the pictures out of pages: they take most of the time."""
    nothing = Drawing("<svg></svg>", {"path": False, "panels": []})
    monkeypatch.setattr("remax.report.page.draw", lambda charts, *_: {chart.key: nothing for chart in charts})


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
    assert "the learned reward rose" in headline([run], [summary])
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
    learned, gold = drawn["held-out"].panels
    assert learned.lines[0].y == pytest.approx([1, 5, 9])
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
    assert "Of 2 runs, a/out reaches the highest gold reward" in parsed.text
    settings = parsed.text[parsed.text.index("run 1: a/out") :]
    assert re.search(r"learning_rate\s*0\.001\s*0\.002", settings)
    assert "3 settings that all runs share" in parsed.text


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    assert labels([tmp_path / "x"]) == ["x"]
    assert labels([tmp_path / "x", tmp_path / "y" / "x"]) == [f"{tmp_path.name}/x", "y/x"]
    assert labels([tmp_path / "p" / "s", tmp_path / "q" / "t"]) == ["s", "t"]


# Completions ----------------------------------------------------------------------------------------------------------


def test_the_page_holds_every_completion_of_a_small_run(tmp_path: Path, undrawn: None) -> None:
    folder = write_run(tmp_path / "run")
    rows = rows_of(report(folder))
    assert len(rows) == 3 * 3 + 4 * 3
    (one,) = [row for row in rows if (row["source"], row["step"], row["index"]) == (0, 4, 2)]
    assert one == {
        **{"run": 0, "source": 0, "step": 4, "index": 2, "prompt": "Question 2", "greedy": "a cat sat 4"},
        **{"text": "the cat number 2 sat for 4 steps", "reward": 14, "greedyReward": 13.5, "gold": -14, "length": 9},
        "truncated": 0,
    }
    (other,) = [row for row in rows if (row["source"], row["step"], row["index"]) == (1, 3, 0)]
    assert (other["reward"], other["greedyReward"], other["gold"], other["truncated"]) == (3, 1, None, 1)


def test_conversations_and_very_long_texts(tmp_path: Path, undrawn: None) -> None:
    folder = write_run(tmp_path / "run")
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "é"}]}]
    long = "x" * LONGEST_TEXT + "yz"
    write_lines(folder / "completions.jsonl", [sampled(1, 0, prompt=prompt, completion=long, greedy_completion=None)])
    (row,) = [row for row in rows_of(report(folder)) if row["source"] == 1]
    assert row["prompt"] == 'system: Be brief.\nuser: [{"type": "text", "text": "é"}]'
    assert row["text"].startswith("xxx")
    assert row["text"].endswith("yz")
    assert "2 characters left out" in row["text"]
    assert row["greedy"] is None


def test_a_long_run_is_sampled_and_its_page_stays_below_six_megabytes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    rng = np.random.default_rng(0)

    def prose_of(length: int) -> str:
        return rng.integers(ord("a"), ord("z") + 1, length, dtype=np.uint8).tobytes().decode() + "<&é"

    records = [
        sampled(s, p, prompt=f"{p} " + prose_of(300), completion=prose_of(2500), reward=float(rng.normal()))
        for s in range(1, 41)
        for p in range(40 * s, 40 * s + 40)
    ]
    for row, (reward, greedy) in {7: (90.0, 90.0), 900: (-90.0, -90.0), 1200: (0.5, -80.0)}.items():
        records[row] |= {"reward": reward, "greedy_reward": greedy}
    write_lines(folder / "completions.jsonl", records)
    lines = [
        held_out(step, prompt, prompt=f"{prompt} " + prose_of(100), completion=prose_of(2500))
        for step in range(0, 50, 2)
        for prompt in range(80)
    ]
    write_lines(folder / "eval_completions.jsonl", lines)
    text = page(read_runs([str(folder)]))
    assert 5_600_000 < len(text.encode()) < 6_000_000
    parsed = Parsed(text)
    rows = rows_of(parsed)
    training = [row for row in rows if row["source"] == 1]
    assert {90, -90, 0.5} <= {row["reward"] for row in training}
    evaluated = [row for row in rows if row["source"] == 0]
    prompts = {row["index"] for row in evaluated}
    assert {79, 0} <= prompts  # The best and the worst at the last step.
    assert all(len([row for row in evaluated if row["index"] == prompt]) == 25 for prompt in prompts)
    assert f"{len(evaluated):,} of 2,000 of evaluations and {len(training):,} of 1,600 of training" in parsed.text
    # An even sample: every fifth of the run has about as many as the others.
    fifths = np.histogram([row["step"] for row in training], bins=5, range=(1, 41))[0]
    assert fifths.min() > 0.5 * fifths.mean()


# Hostile texts --------------------------------------------------------------------------------------------------------


def hostile_run(folder: Path) -> Path:
    run = write_run(folder, **{HOSTILE: HOSTILE, "method": HOSTILE, "alarms": HOSTILE})
    write_lines(run / "metrics.jsonl", [metrics_of(s, **{f"rewards/{HOSTILE}/mean": 1.0}) for s in (1, 2, 3, 4)])
    texts = {"prompt": HOSTILE, "completion": HOSTILE + "!", "greedy_completion": HOSTILE + "?"}
    write_lines(run / "completions.jsonl", [sampled(1, 0, **texts)])
    write_lines(run / "eval_completions.jsonl", [held_out(s, 0, **texts) for s in (0, 2, 4)])
    alarm = {"step": 2, "event": "alarm", "metric": "kl", "message": HOSTILE}
    write_lines(run / "alarms.jsonl", [alarm, {**alarm, "step": HOSTILE, "metric": HOSTILE}])
    start = {
        "step": HOSTILE,
        "command": HOSTILE + "\nrm -rf ~",
        "versions": {HOSTILE: HOSTILE},
        "hardware": {"gpus": [HOSTILE]},
    }
    start |= {"date": "2026\nrm -rf /", "directory": [HOSTILE], "commit": HOSTILE, "num_processes": HOSTILE}
    (run / "provenance.json").write_text(json.dumps({"starts": [start, start]}), encoding="utf-8")
    return run


@pytest.mark.parametrize("together", [False, True])
def test_no_text_of_a_run_becomes_markup_or_is_unseen(tmp_path: Path, together: bool) -> None:
    name = "x<img src=x onerror=alert(3)>\u202e&amp;"
    folders = [hostile_run(tmp_path / name), *([write_run(tmp_path / "plain")] if together else [])]
    text = page(read_runs([str(folder) for folder in folders]))
    parsed = Parsed(text)
    harmless = report(write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    assert {tag for tag, _ in parsed.elements} <= {tag for tag, _ in harmless.elements} | {"ul", "li"}
    assert not {"img", "form"} & {tag for tag, _ in harmless.elements}
    assert [attributes for tag, attributes in parsed.elements if tag == "script"] == [
        {"type": "application/json", "id": "data"},
        {},
    ]
    assert parsed.scripts[1] == (files("remax.report") / "page.js").read_text(encoding="utf-8")
    assert not [key for _, attributes in parsed.elements for key in attributes if key.startswith("on")]
    addresses = [a for _, attributes in parsed.elements for k, a in attributes.items() if k in ("src", "href")]
    assert all(address is not None and address.startswith("#") for address in addresses)
    row = next(row for row in rows_of(parsed) if row["source"] == 1)
    assert (row["prompt"], row["text"], row["greedy"]) == (SEEN, SEEN + "!", SEEN + "?")
    seen = " ".join(SEEN.split())
    for place in ("alarm", "setting", "command"):
        assert seen in " ".join(parsed.text.split()), place
    assert "\nrm -rf" not in parsed.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\U000e0000-\U000e007f]", text)
    label = parsed.data["runs"][0]
    assert label.startswith("x<img")
    assert "\u202e" not in json.dumps(parsed.data, ensure_ascii=False)


def test_embedded_json_means_the_same_and_ends_no_script() -> None:
    content = {"a": HOSTILE, HOSTILE: [1, None, "\u2029", "\ud800"]}
    text = embedded_json(content)
    assert json.loads(text) == content
    assert not set("<>&\u2028\u2029\ud800\x00") & set(text)


def test_the_content_security_policy_is_that_of_the_script(tmp_path: Path, undrawn: None) -> None:
    parsed = report(write_run(tmp_path / "run"))
    (policy,) = [a["content"] for tag, a in parsed.elements if tag == "meta" and a.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "script-src 'sha256-" in policy
    assert "unsafe" not in policy.split("script-src")[1]


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
        f"remax train --config {folder / 'config.yaml'} --output_dir NEW",
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
    assert "In 2 steps, on held-out prompts, the learned reward" in parsed.text
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

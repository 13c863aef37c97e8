"""The texts of a run on the page of `remax report`: every one, or a sample of very many, and none of them as markup."""

# ruff: noqa: F811

import json
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from remax.markup import embedded_json
from remax.report.completions import LONGEST_TEXT
from remax.report.page import page
from remax.report.reading import read_runs
from report_pages import Parsed, report, rows_of, undrawn  # noqa: F401
from report_runs import held_out, metrics_of, sampled, write_lines, write_run

MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&lt;b&gt;&amp;<!--"
UNSEEN = "a\x00b\x1b[31m\u202ec\u2028d\u200be\U000e0041f"
HOSTILE = MARKUP + UNSEEN
SEEN = MARKUP + "a\ufffdb\ufffd[31m\ufffdc\ufffdd\ufffde\ufffdf"

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

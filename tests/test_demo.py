"""The demo at reduced size: the whole pipeline end to end, and that the hidden reader likes the result much better."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from remax.cli import main


def run(out: Path, **sizes: int) -> dict[str, Any]:
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    assert main(["demo", "--output_dir", str(out), *flags]) == 0
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


def test_the_demo_makes_stories_kinder(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "demo"
    results = run(
        out, num_stories=2000, sft_steps=300, num_pairs=800, reward_steps=40, max_steps=30, num_eval_prompts=96
    )
    before, after = results["before"], results["after"]
    assert after["means"]["gold score"] > before["means"]["gold score"] + 1, "of a scale from -3 to 3"
    assert after["intervals"]["gold score"][0] > before["intervals"]["gold score"][1], "the intervals do not touch"
    assert after["means"]["learned reward"] > before["means"]["learned reward"] + 0.5
    assert results["reward_model"]["eval/accuracy"] > 0.55
    assert abs(before["means"]["KL"]) < 1e-3
    assert 0.5 < after["means"]["KL"] < 40
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    judged = [json.loads(line)["eval/gold"] for line in (out / "remax" / "eval.jsonl").read_text().splitlines()]
    assert (judged[0], judged[-1]) == pytest.approx((before["means"]["gold score"], after["means"]["gold score"]))
    assert len(judged) == 6, "before, four times in training, and after it"
    assert "gold" in (out / "remax" / "report.html").read_text()
    shown = capsys.readouterr().out
    for part in ("gold score", "kind stories", "learned reward", "KL", "length", "The same openings", "remax chat"):
        assert part in shown
    tokenizer = AutoTokenizer.from_pretrained(out / "remax" / "model")
    model = AutoModelForCausalLM.from_pretrained(out / "remax" / "model")
    assert model.config.vocab_size == len(tokenizer)

    assert main(["demo", "--output_dir", str(out)]) == 2
    assert "it is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_at_full_size(tmp_path: Path) -> None:
    results = run(tmp_path / "demo")
    assert results["after"]["means"]["gold score"] > results["before"]["means"]["gold score"] + 1.5
    assert results["after"]["means"]["kind stories"] > 0.6
    assert results["reward_model"]["eval/accuracy"] > 0.65

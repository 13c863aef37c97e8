"""Whole commands on data of every shape: exit code 0 or 2, one sentence, and no output that is half there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from fuzzing import check_sentence, fuzz
from remax.cli import main
from test_cli import world  # noqa: F401
from test_fuzz_data import damage, tables, write

FINISHED = {"train": "model", "sft": "model", "reward": "model", "dpo": "model", "evaluate": "evaluation.json"}
"""What a command leaves last."""


def test_commands_on_data_of_every_shape(
    world: Path,  # noqa: F811
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    common = ["--model", str(world / "policy"), "--output_dir", str(out)]
    trained = [*common, "--max_steps", "1", "--batch_size", "1", "--report_to", "none"]
    rewards = ["--reward_funcs", f"{world / 'rewards.py'}:vowels", "--max_completion_length", "2"]
    flags = {
        "train": [*trained, *rewards, "--train_dataset"],
        "sft": [*trained, "--train_dataset"],
        "reward": [*trained, "--train_dataset"],
        "dpo": [*trained, "--train_dataset"],
        "evaluate": [*common, *rewards, "--eval_dataset"],
    }

    def check(case: tuple[Any, ...]) -> None:
        command, rows, form, kind, place = case
        path = write(tmp_path / "rows", rows, form)
        if kind:
            path.write_bytes(damage(path.read_bytes(), kind, place, b"\x00\xff"))
        code = main([command, *flags[command], str(path)])
        error = capsys.readouterr().err
        if code == 0:
            assert (out / FINISHED[command]).exists()
        else:
            assert code == 2, (code, error)
            check_sentence([line for line in error.splitlines() if line.startswith("remax: ")][-1])
            assert not out.exists(), [entry.name for entry in out.rglob("*")]
        shutil.rmtree(out, ignore_errors=True)
        assert {entry.stem for entry in tmp_path.iterdir()} <= {"rows"}

    good = st.sampled_from(
        [[{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2, [{"prompt": "a", "completion": "b"}], [{"text": "abc"}]]
    )
    strategy = st.tuples(
        st.sampled_from(sorted(FINISHED)),
        st.one_of(tables, tables, good),
        st.sampled_from(["jsonl", "json", "csv", "parquet"]),
        st.sampled_from([None, None, "truncated", "flipped", "garbage inside", "BOM", "twice"]),
        st.floats(0, 1),
    )
    fuzz("whole commands", strategy, check)
    assert json.loads((world / "prompts.jsonl").read_text().splitlines()[0]), "the inputs are as they were"

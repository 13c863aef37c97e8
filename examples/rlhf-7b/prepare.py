"""Splits pairs of answers 2:4:4 over the three stages: `python prepare.py FOLDER [SOURCE]`.

Makes sft.jsonl (prompt, completion), reward.jsonl (prompt, chosen, rejected) and rl.jsonl (prompt), and the same with
_test from the held-out pairs. SOURCE is a folder with train.jsonl and test.jsonl, or the name of a dataset on the
Hugging Face hub with the columns prompt, chosen and rejected; by default Dahoas/rm-static.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

from datasets import load_dataset

SHARES = {"sft": 2, "reward": 4, "rl": 4}


def main(folder: str, source: str = "Dahoas/rm-static") -> None:
    for split, suffix in (("train", ""), ("test", "_test")):
        pairs = _load(source, split)
        random.Random(0).shuffle(pairs)
        start = total = 0
        for stage, share in SHARES.items():
            total += share
            end = len(pairs) * total // sum(SHARES.values())
            _write(Path(folder) / f"{stage}{suffix}.jsonl", [_row(stage, pair) for pair in pairs[start:end]])
            start = end


def _row(stage: str, pair: dict[str, str]) -> dict[str, str]:
    """Returns a pair as a stage wants it."""
    if stage == "sft":
        return {"prompt": pair["prompt"], "completion": pair["chosen"]}
    names = ("prompt", "chosen", "rejected") if stage == "reward" else ("prompt",)
    return {name: pair[name] for name in names}


def _load(source: str, split: str) -> list[dict[str, Any]]:
    file = Path(source) / f"{split}.jsonl"
    if file.is_file():
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return list(load_dataset(source, split=split))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

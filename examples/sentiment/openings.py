"""Writes story openings as prompts: `python openings.py FOLDER` makes train.jsonl (256) and test.jsonl (128)."""

import itertools
import json
import random
import sys
from pathlib import Path

NAMES = ["Lily", "Tom", "Ben", "Sue", "Max", "Anna", "Tim", "Mia", "Sam", "Jane", "Jack", "Lucy"]
THINGS = ["dog", "cat", "ball", "tree", "car", "bird", "cake", "hat", "boat", "book", "doll", "frog"]
PATTERNS = [
    "Once upon a time, there was a little child named {name} who had a {thing}.",
    "One day, {name} saw a big {thing}.",
    "{name} wanted a new {thing}.",
    "{name} lost the {thing} in the park.",
    "It was raining, and {name} played with the {thing} at home.",
    "{name} and the {thing} went to the beach.",
]


def main(folder: Path) -> None:
    openings = [
        pattern.format(name=name, thing=thing) for pattern, name, thing in itertools.product(PATTERNS, NAMES, THINGS)
    ]
    random.Random(0).shuffle(openings)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in {"train": openings[:256], "test": openings[256:384]}.items():
        lines = (json.dumps({"prompt": opening}) + "\n" for opening in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

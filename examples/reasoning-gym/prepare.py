"""Generates puzzles: `python prepare.py FOLDER [NUM_TRAIN] [NUM_TEST] [SEED]` makes train.jsonl and test.jsonl.

Another seed gives other puzzles, without end. Needs reasoning-gym.
"""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import reasoning_gym
except ImportError:
    sys.exit('reasoning-gym is not installed: no puzzle can be made; run pip install "remax-rlhf[reasoning]".')

TASKS = ["chain_sum", "gcd", "leg_counting", "letter_counting", "number_sorting", "simple_equations"]
"""Of `reasoning_gym.factory.DATASETS`, which has about a hundred. The reward reads an entry back from JSON: a task
whose checker wants what JSON cannot hold needs another one."""


def main(folder: Path, num_train: int = 19200, num_test: int = 256, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [reasoning_gym.composite.DatasetSpec(name=name, weight=1, config={}) for name in TASKS]
    # Puzzles are made as they are asked for: the size is only a bound.
    puzzles = distinct(reasoning_gym.create_dataset("composite", size=2**31, seed=seed, datasets=tasks))
    for split, size in (("test", num_test), ("train", num_train)):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for entry in itertools.islice(puzzles, size):
                prompt = [{"role": "user", "content": entry["question"]}]
                # As a text: a column of objects would get the union of all their keys.
                file.write(json.dumps({"prompt": prompt, "entry": json.dumps(entry)}) + "\n")


def distinct(puzzles: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields every puzzle once: small ones, as 4 + 3, come again."""
    seen = set()
    for entry in puzzles:
        if entry["question"] not in seen:
            seen.add(entry["question"])
            yield entry


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

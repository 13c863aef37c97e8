"""Which completions the page holds, for it cannot hold those of a long run; and how they are written into it."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from remax.compare.records import number
from remax.report.reading import Completions, Floats, Record, Run
from remax.untrusted import printable

HELD_OUT, TRAINING = 0, 1
SHARE_OF_HELD_OUT = 0.6
"""Of a run's room: those show the same prompts across steps."""
NUM_EXTREMES = 25
"""Best, worst and most telling completions that are taken before all others."""
MOST_OF_PROMPT = 40
"""Completions of one prompt that are taken together."""
LONGEST_TEXT = 6_000
"""Characters; longer texts are cut in their middle."""
ROW_BYTES = 72
"""What a row takes beside its texts."""
MOST_MISFITS = 20
"""After so many groups that found no room, none is tried any more."""
COLUMNS = (
    *("run", "source", "step", "prompt", "index", "text", "greedy", "reward", "greedyReward", "gold", "length"),
    "truncated",
)


@dataclass
class Shelf:
    """The chosen completions, column by column, and their texts, each of which is kept once."""

    room: int
    """Bytes that are left."""
    texts: dict[str, int] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in COLUMNS})

    def add(self, run: int, source: int, records: Sequence[Record]) -> bool:
        """Takes all of these records; none and False if they do not fit."""
        own = [[_text(r.get(name)) for name in ("prompt", "completion", "greedy_completion")] for r in records]
        new = {text for texts in own for text in texts if text is not None and text not in self.texts}
        needed = ROW_BYTES * len(records) + sum(_bytes(text) for text in new)
        if needed > self.room:
            return False
        self.room -= needed
        for record, texts in zip(records, own, strict=True):
            values = record.get("values")
            row = _row(record, values if isinstance(values, dict) else {})
            places = [None if text is None else self.texts.setdefault(text, len(self.texts)) for text in texts]
            row |= {"run": run, "source": source, **dict(zip(("prompt", "text", "greedy"), places, strict=True))}
            for name, column in self.columns.items():
                column.append(row[name])
        return True

    def content(self) -> dict[str, Any]:
        """Returns what the page embeds."""
        return {"texts": list(self.texts), "rows": self.columns}


@dataclass(frozen=True)
class Kept:
    """How many completions of a run the page holds, of how many."""

    held_out: tuple[int, int]
    training: tuple[int, int]


def choose(runs: Sequence[Run], room: int) -> tuple[Shelf, list[Kept]]:
    """Returns the completions that fit into so many bytes: all of a run, or its extremes and an even sample.

    What is chosen are prompts, each with its completions over the steps, so that they can be compared; those of the
    evaluations first, and in all runs the same ones as far as possible. Every run gets the same room.
    """
    shelf = Shelf(0)
    kept = []
    for index, run in enumerate(runs):
        own = room // (len(runs) - index)
        for_held_out = max(int(SHARE_OF_HELD_OUT * own), own - _num_bytes(run.completions))
        shelf.room = for_held_out
        held_out = _fill(shelf, index, HELD_OUT, run.held_out, _held_out_groups(run.held_out))
        shelf.room += own - for_held_out
        training = _fill(shelf, index, TRAINING, run.completions, _training_groups(run.completions))
        room -= own - shelf.room
        kept.append(Kept((held_out, len(run.held_out)), (training, len(run.completions))))
    return shelf, kept


def _num_bytes(completions: Completions) -> int:
    return completions.path.stat().st_size if len(completions) else 0


def _fill(shelf: Shelf, run: int, source: int, completions: Completions, groups: Iterable[Sequence[int]]) -> int:
    """Puts groups of rows on the shelf until it is full, and returns how many rows it took."""
    taken: set[int] = set()
    misfits = 0
    for group in groups:
        rows = [row for row in group if row not in taken]
        if not rows:
            continue
        if shelf.add(run, source, list(completions.read(rows))):
            taken.update(rows)
        elif (misfits := misfits + 1) == MOST_MISFITS:
            break
    return len(taken)


def _held_out_groups(completions: Completions) -> Iterator[Sequence[int]]:
    """Yields prompts: those that end best and worst and that changed most, then the others; last what is left."""
    if not len(completions):
        return
    steps, prompts, rewards = (completions.column(name) for name in ("step", "prompt_index", "reward"))
    rows_of = _rows_by_prompt(prompts)
    at_end, at_start = steps == steps.max(), steps == steps.min()
    ends, starts = (dict(zip(prompts[at].tolist(), rewards[at].tolist(), strict=True)) for at in (at_end, at_start))
    end = np.array([ends.get(prompt, np.nan) for prompt in rows_of])
    change = np.abs(end - np.array([starts.get(prompt, np.nan) for prompt in rows_of]))
    groups = list(rows_of.values())
    for place in dict.fromkeys([*_largest(end), *_largest(-end), *_largest(change), *_shuffled(len(groups))]):
        yield _spread(groups[place])
    yield from ([row] for row in _shuffled(len(completions)))


def _training_groups(completions: Completions) -> Iterator[Sequence[int]]:
    """Yields the rows of the highest and lowest rewards and the largest gaps, then prompts; last what is left."""
    reward = completions.column("reward")
    gap = np.abs(reward - completions.column("greedy_reward"))
    yield from ([row] for row in (*_largest(reward), *_largest(-reward), *_largest(gap)))
    groups = list(_rows_by_prompt(completions.column("prompt_index")).values())
    yield from (_spread(groups[place]) for place in _shuffled(len(groups)))
    yield from ([row] for row in _shuffled(len(completions)))


def _rows_by_prompt(prompts: Floats) -> dict[float, list[int]]:
    rows_of: dict[float, list[int]] = {}
    for row, prompt in enumerate(prompts.tolist()):
        rows_of.setdefault(prompt, []).append(row)
    return rows_of


def _spread(rows: Sequence[int]) -> list[int]:
    """Returns some of the rows from the first to the last."""
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), MOST_OF_PROMPT)).round().astype(int)
    return [rows[place] for place in chosen]


def _largest(values: Floats) -> list[int]:
    """Returns the places of the largest values; those that are unknown come last."""
    order: list[int] = np.argsort(np.where(np.isfinite(values), -values, np.inf), kind="stable").tolist()
    return order[:NUM_EXTREMES]


def _shuffled(number_of: int) -> list[int]:
    """Returns all places in an order that is the same every time and of which every beginning is an even sample."""
    order: list[int] = np.random.default_rng(0).permutation(number_of).tolist()
    return order


def _row(record: Record, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "step": _short(record.get("step")),
        "index": _short(record.get("prompt_index")),
        "reward": _short(values.get("reward", record.get("reward"))),
        "greedyReward": _short(values.get("reward/greedy", record.get("greedy_reward"))),
        "gold": _short(values.get("gold")),
        "length": _short(record.get("length")),
        "truncated": int(record.get("truncated") is True),
    }


def _short(value: Any) -> float | None:
    figure = number(value)
    if np.isnan(figure):
        return None
    short = float(f"{figure:.5g}") if abs(figure) < 1e5 else figure
    return int(short) if short.is_integer() else short


def _text(value: Any) -> str | None:
    """Returns a prompt or a completion as one printable text; a conversation with who says what."""
    if value is None:
        return None
    text = printable(value if isinstance(value, str) else "\n".join(_turns(value)))
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[\N{HORIZONTAL ELLIPSIS} {len(text) - 2 * half:,} characters left out]\n{text[-half:]}"


def _turns(value: Any) -> Iterator[str]:
    for turn in value if isinstance(value, list) else [value]:
        if isinstance(turn, dict) and "role" in turn:
            content = turn.get("content")
            yield f"{turn['role']}: {content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)}"
        else:
            yield json.dumps(turn, ensure_ascii=False)


def _bytes(text: str) -> int:
    """Returns what a text takes in the page: `<`, `>` and `&` become six bytes there."""
    return len(json.dumps(text, ensure_ascii=False).encode()) + 5 * sum(text.count(c) for c in "<>&") + 1

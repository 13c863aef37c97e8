"""A step's rollout and rewards, each process doing some of the prompts, and the whole of it known to all."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from remax.errors import UserError
from remax.interfaces import Completion, Prompt, RewardFunction, Rollout
from remax.processes import Processes
from remax.rewards import ProgrammedReward, Scores, score


def roll_out_together(processes: Processes, prompts: Sequence[Prompt], draw: Callable[[], Rollout]) -> Rollout:
    """Returns the whole rollout of these prompts, of which draw gives this process' part."""
    if processes.num == 1:
        return draw()

    def place(completion: Completion) -> tuple[int, Completion]:
        return places[id(completion.prompt)], replace(completion, prompt=NOWHERE)

    def work() -> tuple[list[tuple[int, Completion]], list[tuple[int, Completion]]]:
        own = draw()
        return [place(c) for c in own.samples], [place(c) for c in own.greedy]

    places = {id(prompt): place for place, prompt in enumerate(prompts)}
    parts = processes.each(work)  # in the order of the prompts, as `Processes.part` has it
    samples, greedy = ([replace(c, prompt=prompts[i]) for part in parts for i, c in part[kind]] for kind in (0, 1))
    return Rollout(samples, greedy)


NOWHERE = Prompt(-1, "", [])
"""Stands for a prompt that every process has: only its place is sent."""


class Scored(NamedTuple):
    """What reward functions gave for some rows."""

    scores: Scores
    columns: dict[str, list[Any]]
    """What they logged with log_extra, one value per row."""
    metrics: dict[str, float]
    """What they logged with log_metric."""
    failures: list[str]
    """Of every function that failed, why."""


def score_together(
    processes: Processes, functions: Sequence[RewardFunction], weights: Sequence[float], rows: Sequence[Completion]
) -> Scored:
    """Returns what the functions give for these rows; each process asks them about the rows of some of the prompts.

    Rows of one prompt stay together, since a function may compare them. What functions logged as metrics is the mean
    over the rows.

    Raises:
        UserError: a function cannot be used.
    """
    if processes.num == 1:
        return _scored(functions, weights, rows)
    own = _own_rows(processes, rows)
    parts = processes.each(lambda: (own, _scored(functions, weights, [rows[row] for row in own])))
    order = [row for places, _ in parts for row in places]
    back = sorted(range(len(rows)), key=order.__getitem__)

    def joined(lists: Sequence[Sequence[Any] | None], fill: Any) -> list[Any]:
        pieces = zip(parts, lists, strict=True)
        values = [value for (places, _), own in pieces for value in (own if own is not None else [fill] * len(places))]
        return [values[i] for i in back]

    scored = [part for _, part in parts]
    names = dict.fromkeys(name for s in scored for name in s.scores.by_function)
    columns = dict.fromkeys(name for s in scored for name in s.columns)
    scores = Scores(
        joined([s.scores.total for s in scored], None),
        {name: joined([s.scores.by_function.get(name) for s in scored], None) for name in names},
        {name: sum(s.scores.num_failed.get(name, 0) for s in scored) for name in names},
    )
    return Scored(
        scores,
        {name: joined([s.columns.get(name) for s in scored], None) for name in columns},
        _mean_metrics([(len(places), s.metrics) for places, s in parts]),
        list(dict.fromkeys(reason for s in scored for reason in s.failures)),
    )


def _own_rows(processes: Processes, rows: Sequence[Completion]) -> list[int]:
    prompts = list(dict.fromkeys(id(row.prompt) for row in rows))
    own = set(processes.part(prompts))
    return [number for number, row in enumerate(rows) if id(row.prompt) in own]


def _scored(functions: Sequence[RewardFunction], weights: Sequence[float], rows: Sequence[Completion]) -> Scored:
    programmed = [function for function in functions if isinstance(function, ProgrammedReward)]
    for function in programmed:
        function.last_failure = ""
    scores = score(functions, weights, rows)
    columns = {name: values for f in programmed for name, values in f.pop_extra().items()}
    for name, values in columns.items():
        if len(values) != len(rows):
            raise UserError(
                f"log_extra of column {name} got {len(values)} values: there are {len(rows)} completions, so they "
                "cannot be told apart; log one value per completion."
            )
    metrics = {name: value for f in programmed for name, value in f.pop_metrics().items()}
    return Scored(scores, columns, metrics, [f.last_failure for f in programmed if f.last_failure])


def _mean_metrics(parts: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Returns the mean of every metric over the rows of those parts that logged it."""
    names = dict.fromkeys(name for _, metrics in parts for name in metrics)
    means = {}
    for name in names:
        logged = [(number, metrics[name]) for number, metrics in parts if name in metrics]
        means[name] = sum(number * value for number, value in logged) / sum(number for number, _ in logged)
    return means

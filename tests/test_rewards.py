"""Reward functions of every kind, and how several rewards become one."""

import asyncio
import functools
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from remax.errors import UserError
from remax.interfaces import Completion
from remax.rewards import (
    CallableReward,
    load_reward_function,
    resolve_weights,
    score,
    unique_names,
)
from scored_texts import completion
from toy_tokenizers import EOS, say

NAN = math.nan


def same(first: Sequence[float | None], second: Sequence[float | None]) -> bool:
    """Equality where NaN equals NaN."""
    return [repr(x) for x in first] == [repr(x) for x in second]


# Programmed rewards ---------------------------------------------------------------------------------------------------


def two() -> list[Completion]:
    return [completion("p0", "a", answer="x", prompt="no"), completion("p1", "bb", answer="y", prompt="no")]


def test_function_gets_what_trl_gives_it() -> None:
    seen: dict[str, Any] = {}

    def f(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.5, 1]

    reward = CallableReward(f)
    reward.trainer_state = "state"
    assert same(reward(two()), [0.5, 1.0])
    assert reward.name == "f"
    seen.pop("log_extra")
    seen.pop("log_metric")
    assert seen == {
        "prompts": ["p0", "p1"],
        "completions": ["a", "bb"],
        "completion_ids": [[9, EOS], [9, EOS]],
        "answer": ["x", "y"],
        "trainer_state": "state",
    }


def test_conversational_completion_is_a_message() -> None:
    prompt = say("hi")
    seen = {}

    def f(prompts: Any, completions: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions)
        return [1.0]

    CallableReward(f)([completion(prompt, "yo")])
    assert seen == {"prompts": [prompt], "completions": [[{"role": "assistant", "content": "yo"}]]}


def test_function_without_kwargs_gets_what_it_names() -> None:
    def f(completions: Any, answer: Any, log_metric: Any) -> list[float]:
        log_metric("length", len(completions[0]))
        return [float(len(c)) for c in completions]

    reward = CallableReward(f)
    assert reward(two()) == [1.0, 2.0]
    assert reward.pop_metrics() == {"length": 1.0}


def test_logged_metrics_are_averaged_and_extra_columns_kept_until_collected() -> None:
    def f(completions: Any, log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        log_metric("share", len(completions) / 2)
        log_extra("first", [c[0] for c in completions])
        return [0.0] * len(completions)

    reward = CallableReward(f)
    reward(two())
    reward(two()[:1])
    assert reward.pop_metrics() == {"share": 0.75}
    assert reward.pop_metrics() == {}
    assert reward.pop_extra() == {"first": ["a", "b", "a"]}
    assert reward.pop_extra() == {}


async def slow(completions: Any, **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]


def test_async_function_runs_also_where_a_loop_is_running() -> None:
    reward = CallableReward(functools.partial(slow, unused=1))
    assert reward.name == "slow"
    assert reward(two()) == [1.0, 2.0]

    async def notebook() -> list[float | None]:
        return reward(two())

    assert asyncio.run(notebook()) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([None, NAN], [None, NAN]),
        ([True, False], [1.0, 0.0]),
        ((1, 2.5), [1.0, 2.5]),
        (np.array([1, 2]), [1.0, 2.0]),
        (torch.tensor([0.5, 1.5]), [0.5, 1.5]),
        ([np.float32(0.5), np.bool_(True)], [0.5, 1.0]),
        ([torch.tensor(0.5), torch.tensor(2)], [0.5, 2.0]),
        ([math.inf, np.array(3)], [math.inf, 3.0]),
    ],
)
def test_numbers_of_all_kinds_are_taken(returned: Any, expected: list[float | None]) -> None:
    rewards = CallableReward(lambda **_: returned)(two())
    assert same(rewards, expected)
    assert all(value is None or type(value) is float for value in rewards)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (1.0, r"it returned a float \(1.0\)"),
        (None, "it returned a NoneType"),
        ("ab", r"it returned a str \('ab'\)"),
        ({"a": 1, "b": 2}, "it returned a dict"),
        ((x for x in (1.0, 2.0)), "it returned a generator"),
        ([1.0], "it returned 1 rewards"),
        ([1.0, 2.0, 3.0], "it returned 3 rewards"),
        (torch.ones(2, 2), r"one reward is a list \(\[1.0, 1.0\]\)"),
        (["1.0", "2.0"], r"one reward is a str \('1.0'\)"),
        ([1.0, [2.0]], "one reward is a list"),
        ([1j, 2.0], "one reward is a complex"),
    ],
)
def test_anything_else_is_refused(returned: Any, said: str) -> None:
    expected = "return a list of 2 numbers or None, one per completion"
    with pytest.raises(UserError, match=rf"^--reward_funcs has mine: {said}.*; {expected}\.$"):
        CallableReward(lambda **_: returned, name="mine")(two())


def test_function_that_needs_a_column_that_is_not_there_is_refused() -> None:
    def f(completions: Any, solution: Any) -> list[float]:
        return [0.0, 0.0]

    with pytest.raises(
        UserError, match=r"has f\(completions.*missing a required argument: 'solution'\).*\(answer, prompt"
    ):
        CallableReward(f)(two())


def test_function_that_raises_gives_nan_and_is_warned_of_once_per_error() -> None:
    def f(completions: Any) -> list[float]:
        if len(completions) == 1:
            raise KeyError("one")
        raise ValueError(f"no number in {completions[0]}")

    reward = CallableReward(f)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert same(reward(two()), [NAN, NAN])
        assert same(reward([*two(), *two()]), [NAN] * 4)
        assert same(reward(two()[:1]), [NAN])
    assert reward.num_failures == 7
    assert len(caught) == 2
    assert str(caught[0].message).startswith("f raised ValueError: no number in a (test_rewards.py, line ")


def test_async_function_that_raises_gives_nan() -> None:
    async def f(completions: Any) -> list[float]:
        raise TimeoutError("the judge is silent")

    with pytest.warns(UserWarning, match="f raised TimeoutError: the judge is silent"):
        assert same(CallableReward(f)(two()), [NAN, NAN])


def test_user_error_of_a_function_passes() -> None:
    def f(completions: Any) -> list[float]:
        raise UserError("set something else.")

    with pytest.raises(UserError, match="set something else"):
        CallableReward(f)(two())


# Loading by name ------------------------------------------------------------------------------------------------------


CODE = """
import neighbour_of_rewards
limit = 3
class Judge: pass
def length(completions, **kwargs):
    return [float(neighbour_of_rewards.size(c)) for c in completions]
def lower(completions, **kwargs):
    return [0.0 for c in completions]
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path, modules = list(sys.path), set(sys.modules)
    (tmp_path / "my_rewards.py").write_text(CODE)
    (tmp_path / "neighbour_of_rewards.py").write_text("size = len\n")
    yield tmp_path / "my_rewards.py"
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_function_is_loaded_from_a_file(file: Path) -> None:
    reward = load_reward_function(f"{file}:length")
    assert reward.name == "length"
    assert reward(two()) == [1.0, 2.0]


def test_function_is_loaded_from_a_module(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert load_reward_function("my_rewards:length")(two()) == [1.0, 2.0]
    assert load_reward_function("remax.rewards:unique_names").name == "unique_names"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{file}", "that names no function"),
        ("{file}:", "that names no function"),
        ("no_such.py:f", "there is no file no_such.py; set path/to/file.py:function"),
        ("{file}:lenght", "has no function lenght; did you mean length"),
        ("{file}:quality", "has no function quality; it has length, lower"),
        ("{file}:limit", r"limit is a int \(3\), not a function"),
        ("{file}:Judge", "Judge is a class, not a function"),
        ("no.such.module:f", r"cannot be imported \(ModuleNotFoundError: No module named 'no'\)"),
        ("{folder}/lacking.py:f", "lacking.py imports nobody_has_it, which is not installed; install what has it, or"),
        ("{folder}/part.py:f", r"cannot be imported \(ModuleNotFoundError: No module named 'json.x', line 1\)"),
        ("{folder}/broken.py:f", r"broken.py cannot be imported \(.*, line 2\); correct it"),
        ("{folder}/raising.py:f", r"raising.py cannot be imported \(ZeroDivisionError: division by zero, line 3\)"),
    ],
)
def test_function_that_cannot_be_loaded(spec: str, said: str, file: Path) -> None:
    (file.parent / "broken.py").write_text("x = 1\ndef f(:\n")
    (file.parent / "lacking.py").write_text("import nobody_has_it.inside\n")
    (file.parent / "part.py").write_text("import json.x\n")
    (file.parent / "raising.py").write_text("\n\nx = 1 / 0\n")
    with pytest.raises(UserError, match=rf"^--reward_funcs has .*{said}"):
        load_reward_function(spec.format(file=file, folder=file.parent))


# Several rewards ------------------------------------------------------------------------------------------------------


class Fixed:
    def __init__(self, name: str, rewards: list[float | None]) -> None:
        self.name, self.rewards = name, rewards

    def __call__(self, completions: Sequence[Completion]) -> list[float | None]:
        return self.rewards


def test_rewards_are_weighted_and_summed_over_the_functions_that_apply() -> None:
    first = Fixed("f", [1.0, 1.0, None, None, 1.0, NAN, None])
    second = Fixed("f", [10.0, None, 10.0, None, math.inf, 10.0, -math.inf])
    scores = score([first, second], [2.0, 0.5], two() * 3 + two()[:1])
    assert same(scores.total, [7.0, 2.0, 5.0, NAN, NAN, NAN, NAN])
    assert list(scores.by_function) == ["f", "f_2"]
    assert same(scores.by_function["f"], [1.0, 1.0, NAN, NAN, 1.0, NAN, NAN])
    assert same(scores.by_function["f_2"], [10.0, NAN, 10.0, NAN, NAN, 10.0, NAN])


def test_failing_function_leaves_no_sample_to_the_other_rewards() -> None:
    def broken(completions: Any) -> list[float]:
        raise ValueError("broken")

    with pytest.warns(UserWarning, match="broken raised"):
        scores = score([Fixed("f", [1.0, 2.0]), CallableReward(broken)], [1.0, 1.0], two())
    assert same(scores.total, [NAN, NAN])


def test_names_are_made_unique() -> None:
    functions = [Fixed(name, []) for name in ("f", "g", "f", "f_2", "f")]
    assert unique_names(functions) == ["f", "g", "f_2", "f_2_2", "f_3"]


def test_weights_are_one_by_default_and_one_for_each_reward() -> None:
    assert resolve_weights([], 2) == [1.0, 1.0]
    assert resolve_weights([0.5, 2], 2) == [0.5, 2]
    with pytest.raises(UserError, match=r"^--reward_weights has 1 numbers: there are 2 rewards; set one for each"):
        resolve_weights([1.0], 2)

"""What processes share and agree on, without any: pure arithmetic, and errors as they come to the others."""

from contextlib import nullcontext
from typing import Any

import pytest

from remax.assembly import check_sharding
from remax.batching import split_by_tokens
from remax.config import ReMaxConfig
from remax.errors import GuardStop, UserError
from remax.processes import Processes, ProcessFailed


@pytest.mark.parametrize("num", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 15])
def test_parts_are_consecutive_and_of_even_size(length: int, num: int) -> None:
    parts = [list(Processes(index, num).part(range(length))) for index in range(num)]
    assert [item for part in parts for item in part] == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("num", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 7, 15])
def test_what_is_dealt_counts_once_and_all_get_the_same_number(length: int, num: int) -> None:
    hands = [Processes(index, num).dealt(range(length)) for index in range(num)]
    assert sorted(item for hand in hands for item, counts in hand if counts) == list(range(length))
    assert len({len(hand) for hand in hands}) == 1
    assert all(item == length - 1 for hand in hands for item, counts in hand if not counts)


def test_of_nothing_nothing_is_dealt() -> None:
    assert Processes(1, 2).dealt([]) == []


def test_groups_are_small_enough_for_all_processes() -> None:
    assert len(split_by_tokens([1024] * 64, 16384)) == 4
    assert len(split_by_tokens([1024] * 64, 16384, 8)) == 8
    assert len(split_by_tokens([1024] * 64, 2048, 8)) == 32, "the limit still holds"
    assert split_by_tokens([10, 1, 1, 1], 100, 4) == [[0], [1, 2, 3]], "no group is smaller than the longest row"
    assert split_by_tokens([], 100, 4) == []


class Told(Processes):
    """The first of two processes; the other one fails."""

    def __init__(self, failure: Exception) -> None:
        super().__init__(0, 2)
        self.failure = failure

    def gather(self, own):
        return [own, (None, (type(self.failure), str(self.failure)))]


@pytest.mark.parametrize("kind", [UserError, GuardStop])
def test_what_stops_one_process_stops_all_with_the_same_words(kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^something is wrong$") as raised:
        Told(kind("something is wrong")).each(lambda: 1)
    assert raised.value.known_to_all  # type: ignore[attr-defined]


def test_another_failure_is_told_with_the_number_of_its_process() -> None:
    with pytest.raises(ProcessFailed, match=r"process 1 failed \(ZeroDivisionError: by nothing\)"):
        Told(ZeroDivisionError("by nothing")).each(lambda: 1)


def test_the_own_failure_is_raised_as_it_was() -> None:
    class Failing(Processes):
        def gather(self, own):
            return [own, (1, None)]

    with pytest.raises(ZeroDivisionError):
        Failing(0, 2).each(lambda: 1 // 0)


def test_one_process_needs_nobody_else() -> None:
    alone = Processes()
    assert alone.each(lambda: 1) == [1]
    assert alone.on_main(lambda: 2) == 2
    assert alone.together(lambda: 3) == 3
    assert alone.gather(4) == [4]
    assert alone.sum(0.5) == 0.5
    with pytest.raises(ZeroDivisionError):
        alone.together(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optim": "adamw_torch_8bit"}, "--optim is adamw_torch_8bit: "),
        ({"optim": "adafactor"}, "--optim is adafactor: "),
        ({"rollout_engine": "paged"}, "--rollout_engine is paged: "),
        ({"kl_mode": "loss", "kl_estimator": "exact"}, "--kl_estimator is exact: "),
        ({"optim": "adamw_torch_fused"}, None),
    ],
)
def test_what_needs_whole_weights_is_refused_where_they_are_sharded(settings: dict[str, Any], said: str | None) -> None:
    with nullcontext() if said is None else pytest.raises(UserError, match=f"^{said}each process would need all"):
        check_sharding(ReMaxConfig(**settings))

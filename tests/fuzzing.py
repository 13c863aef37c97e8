"""How the fuzz tests run: the same cases every time, counted, none of them longer than a few seconds."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from remax.errors import UserError
from remax.untrusted import printable

CASES = {
    "dataset files": 300,
    "damaged dataset files": 200,
    "rows in memory": 150,
    "settings in Python": 700,
    "contradictory settings": 250,
    "flags": 80,
    "configuration files": 80,
    "whole commands": 25,
    "untrusted text": 200,
    "damaged checkpoints": 200,
    "replies of a reward server": 150,
    "requests to a reward server": 200,
    "bytes to a reward server": 40,
}
"""How many cases each test tries; `test_fuzz_config` holds their sum."""
SECONDS_PER_CASE = 20


def fuzz(name: str, strategy: SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Checks CASES[name] values of the strategy, the same ones at every run, and that it were so many."""
    num_cases = 0

    @settings(
        max_examples=CASES[name],
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def case(value: Any) -> None:
        nonlocal num_cases
        num_cases += 1
        with no_longer_than(SECONDS_PER_CASE):
            check(value)

    case()
    assert num_cases >= CASES[name], f"only {num_cases} cases: the strategy has no more"


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Fails if the block takes longer: nothing may hang."""

    def fail(*_: Any) -> None:
        raise AssertionError(f"it hangs: more than {seconds} s")

    former = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def outcome(call: Callable[[], Any]) -> Any:
    """Returns what a call returns, or None if it refuses in one sentence; any other exception passes."""
    try:
        return call()
    except UserError as error:
        check_sentence(str(error))
        return None


def check_sentence(message: str) -> None:
    """Asserts that a message is one sentence that a terminal can show."""
    assert message.strip(), "an empty message"
    assert len(message) < 700, f"{len(message)} characters: {message[:200]!r}"
    assert len(message.splitlines()) == 1, repr(message)
    assert printable(message) == message, repr(message)
    assert message.endswith("."), repr(message)
    assert "Traceback" not in message

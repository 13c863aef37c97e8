"""Who judges the pairs of `remax winrate`: rewards, or a language model behind an endpoint that fails in many ways."""

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from judging import HOSTILE, Reply, fake_endpoint, longer, pair, write
from remax.cli import main
from remax.errors import UserError
from remax.winrate.command import summary
from remax.winrate.endpoint import KEY_VARIABLE, Endpoint
from remax.winrate.judges import UNANSWERED_IN_A_ROW, EndpointJudge, RewardJudge, Verdicts, verdict
from remax.winrate.outputs import Pair


class Scorer:
    name = "scorer"

    def __init__(self, rewards: list[float | None]) -> None:
        self.rewards = rewards

    def __call__(self, completions: Any) -> list[float | None]:
        return [self.rewards.pop(0) for _ in completions]


def test_rewards_judge_and_missing_ones_do_not_count() -> None:
    pairs = [pair("p", str(k), "x") for k in range(4)]
    judge = RewardJudge([Scorer([1.0, 2.0, 3.0, math.nan, 0.5, 2.0, 9.0, 1.0])], [1.0])
    judged = judge(pairs)
    assert [v.score for v in judged.verdicts] == [1.0, 0.5, 0.0, None]
    assert judged.counts == {"missing_rewards": 1}
    assert judged.verdicts[2].details == {"reward_a": 3.0, "reward_b": 9.0}
    negative = RewardJudge([Scorer([1.0, 2.0])], [-1.0])(pairs[:1])
    assert negative.verdicts[0].score == 1.0, "weights may turn a reward round"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("FIRST", 1.0),
        ("  SECOND\n", 0.0),
        ("The first is wrong.\n\nTIE", 0.5),
        ("first", None),
        ("FIRST.", None),
        ("FIRST SECOND", None),
        ("FIRST\nbecause it is longer", None),
        ("[[A]]", None),
        ("", None),
        (" \n ", None),
    ],
)
def test_verdicts_are_read_strictly(answer: str, score: float | None) -> None:
    assert verdict(answer) == score


def ask(reply: Reply, pairs: list[Pair], **settings: Any) -> tuple[Verdicts, list[Any]]:
    with fake_endpoint(reply) as (url, requests):
        endpoint = Endpoint(url, "judge", timeout_seconds=5, sleep=lambda _: None, **settings)
        return EndpointJudge(endpoint, concurrency=3)(pairs), requests


def test_every_pair_is_asked_in_both_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-key")
    pairs = [pair("p", "aaa", "b"), pair("q", "a", "bbb"), pair("r", "a", "b"), pair("s", "same", "same")]
    judged, requests = ask(longer, pairs)
    assert [v.score for v in judged.verdicts] == [1.0, 0.0, 0.5, 0.5]
    assert [v.positions for v in judged.verdicts] == [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), None]
    assert judged.counts == {"malformed_answers": 0, "unanswered": 0}
    asked = sorted(json.loads(body["messages"][1]["content"])["first"] for _, _, body in requests)
    assert asked == sorted(["aaa", "b", "a", "bbb", "a", "b"]), "identical outputs are not asked about"
    for path, headers, body in requests:
        assert path == "/v1/chat/completions"
        assert headers["authorization"] == "Bearer sk-key"
        assert (body["model"], body["temperature"]) == ("judge", 0)
        assert body["messages"][0]["role"] == "system"


def test_a_judge_that_loves_the_first_place_decides_nothing() -> None:
    pairs = [pair("p", f"a{k}", f"b{k}") for k in range(6)]
    judged, _ = ask(lambda *_: "FIRST", pairs)
    assert [v.score for v in judged.verdicts] == [0.5] * 6
    result = summary(pairs, judged, 0)
    assert result["win_rate"]["mean"] == 0.5
    assert result["position"] == {"first_rate": 1.0, "agreement": 0.0}


def test_one_order_undecided_is_three_quarters() -> None:
    judged, _ = ask(lambda asked, _: "FIRST" if asked["first"] == "a" else "TIE", [pair("p", "a", "b")])
    assert judged.verdicts[0].score == 0.75
    assert judged.verdicts[0].details == {"a_first": "FIRST", "b_first": "TIE"}


def test_malformed_answers_are_counted_and_their_pairs_left_out() -> None:
    def reply(asked: dict[str, Any], _: Any) -> str:
        return "I like the \x1b[31mfirst" if asked["prompt"] == "q" and asked["first"] == "b" else "FIRST"

    judged, requests = ask(reply, [pair("p", "a", "b"), pair("q", "a", "b")])
    assert [v.score for v in judged.verdicts] == [0.5, None]
    assert judged.counts == {"malformed_answers": 1, "unanswered": 0}
    assert "I like the" in judged.example
    assert "\x1b" not in judged.example
    assert len(requests) == 4, "at temperature 0 the same question has the same answer"


def test_hostile_texts_reach_the_judge_as_they_are() -> None:
    pairs = [pair(text, text, "b") for text in HOSTILE]
    seen: list[tuple[str, str, str]] = []

    def reply(asked: dict[str, Any], _: Any) -> str:
        assert set(asked) == {"prompt", "first", "second"}
        seen.append((asked["prompt"], asked["first"], asked["second"]))
        return "TIE"

    ask(reply, pairs)
    assert sorted(seen) == sorted([(t, t, "b") for t in HOSTILE] + [(t, "b", t) for t in HOSTILE])


def test_failed_attempts_are_repeated_and_a_servers_wish_respected() -> None:
    answers: list[Any] = [
        (500, {"error": {"message": "busy"}}, {}),
        (429, {}, {"Retry-After": "7"}),
        (200, b"garbage", {}),
        "FIRST",
    ]
    waits: list[float] = []
    with fake_endpoint(lambda *_: answers.pop(0)) as (url, _):
        endpoint = Endpoint(url, "j", timeout_seconds=5, sleep=waits.append, jitter=lambda: 0.0)
        assert endpoint.ask("s", "{}") == "FIRST"
    assert waits == [1.0, 7.0, 4.0]


def test_what_would_fail_again_is_not_repeated() -> None:
    with fake_endpoint(lambda *_: (400, {"error": {"message": "too long"}}, {})) as (url, requests):
        endpoint = Endpoint(url, "j", timeout_seconds=5, sleep=lambda _: None)
        assert endpoint.ask("s", "{}") is None
        assert "400 (too long)" in endpoint.last_failure
    assert len(requests) == 1
    for strange in ({"choices": []}, {"choices": [{"message": "x"}]}, [], {"error": {"message": "x"}}):
        with fake_endpoint(lambda *_, strange=strange: (200, strange, {})) as (url, requests):
            assert Endpoint(url, "j", timeout_seconds=5, sleep=lambda _: None).ask("s", "{}") is None
        assert len(requests) == 6
    with fake_endpoint(lambda *_: (200, {"choices": [{"message": {"content": None}}]}, {})) as (url, _):
        assert Endpoint(url, "j", timeout_seconds=5).ask("s", "{}") == "", "a refusal is an answer, and no verdict"


def test_a_refused_key_stops_and_is_never_shown(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    a, b = (write(tmp_path / f"{n}.json", [{"instruction": "x", "output": n, "generator": n}]) for n in "ab")
    denied = (401, {"error": {"message": "Incorrect key sk-secret"}}, {})
    with fake_endpoint(lambda *_: denied) as (url, _):
        assert main(["winrate", a, b, "--judge_url", url, "--judge_model", "j"]) == 2
    error = capsys.readouterr().err
    assert "answered 401 (Incorrect key ***)" in error
    assert KEY_VARIABLE in error
    assert "sk-secret" not in error
    monkeypatch.setenv(KEY_VARIABLE, "sk\nsecret")
    with pytest.raises(UserError, match="characters that no key can have"):
        Endpoint("http://127.0.0.1:1", "j", timeout_seconds=1)


def test_an_endpoint_that_is_not_there_is_found_at_the_start() -> None:
    waits: list[float] = []
    endpoint = Endpoint("http://127.0.0.1:1/v1", "j", timeout_seconds=5, sleep=waits.append)
    with pytest.raises(UserError, match=r"does not answer.*start the endpoint"):
        endpoint.check()
    assert len(waits) == 2


def test_a_slow_answer_is_given_up() -> None:
    def slow(*_: Any) -> str:
        time.sleep(0.6)
        return "FIRST"

    with fake_endpoint(slow) as (url, _):
        endpoint = Endpoint(url, "j", timeout_seconds=0.1, sleep=lambda _: endpoint.stop())
        assert endpoint.ask("s", "{}") is None
    assert "did not answer in 0.1 s" in endpoint.last_failure


def test_a_question_that_is_waited_for_can_be_ended() -> None:
    """Ctrl-C must not wait for answers."""
    released = threading.Event()
    with fake_endpoint(lambda *_: "FIRST" if released.wait(20) else "TIE") as (url, requests):
        endpoint = Endpoint(url, "j", timeout_seconds=10)

        def stop_once_asked() -> None:
            while not requests:
                time.sleep(0.01)
            endpoint.stop()

        threading.Thread(target=stop_once_asked).start()
        assert endpoint.ask("s", "{}") is None
        assert "does not answer" in endpoint.last_failure, "it did not wait for the limit"
        released.set()


def test_a_refusal_in_the_middle_ends_all_questions() -> None:
    pairs = [pair("p", f"a{k}", "b") for k in range(40)]
    answers = iter(["FIRST"] * 10)

    def reply(*_: Any) -> Any:
        return next(answers, (403, {"error": "quota"}, {}))

    with pytest.raises(UserError, match=r"answered 403 \(quota\)"):
        ask(reply, pairs)


def test_a_dead_endpoint_is_not_asked_for_ever() -> None:
    pairs = [pair("p", f"a{k}", "b") for k in range(40)]
    judged, requests = ask(lambda *_: (400, {}, {}), pairs)
    assert judged.counts["unanswered"] == 80
    assert UNANSWERED_IN_A_ROW <= len(requests) <= UNANSWERED_IN_A_ROW + 2
    with pytest.raises(UserError, match="answered 400"):
        summary(pairs, judged, 0)

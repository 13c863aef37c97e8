"""A reward server that misbehaves in every way costs some completions their reward, and never a run its life."""

import json
import math
import random
import socket
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raw_server import Answer, Client, completion, drips, endless, endless_chunks, reply, rewards, serving, sleeps, two
from remax.cli import main
from remax.config import EvaluateInputs, LabInputs, TrainInputs
from remax.credentials import read_credential
from remax.errors import GuardStop, UserError
from remax.rewards import score
from remax.rewards.named import named_rewards
from remax.rewards.remote import NUM_ATTEMPTS, TOKEN_VARIABLE, RemoteReward
from toy_training import make_trainer, read

# The protocol ---------------------------------------------------------------------------------------------------------


def test_request_and_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMAX_REWARD_TOKEN", "s3cret")
    with serving(rewards(0.5, -2)) as server:
        assert Client(server.url + "/some/where/").reward(two()) == [0.5, -2.0]
    line, headers, body = server.requests[0]
    assert line == "POST /some/where/score HTTP/1.1"
    assert headers["content-type"] == "application/json"
    assert headers["authorization"] == "Bearer s3cret"
    assert json.loads(body) == {
        "version": 1,
        "prompts": ["p0", "p1"],
        "completions": ["a", "bb"],
        "completion_ids": [[9, 1], [9, 1]],
        "finished": [True, False],
        "columns": {"answer": ["x", "y"]},
    }


def test_conversations_odd_texts_and_numbers_that_are_not_finite_are_sent() -> None:
    prompt = [{"role": "user", "content": "hi \ud800 \x00"}]
    with serving(rewards(1)) as server:
        Client(server.url).reward([completion(prompt, "yo \U0001f600", weight=math.nan)])
    request = json.loads(server.requests[0][2])
    assert request["prompts"] == [prompt]
    assert request["completions"] == [[{"role": "assistant", "content": "yo \U0001f600"}]]
    assert request["columns"] == {"weight": [None]}


def test_null_is_a_missing_reward_and_leaves_nothing_to_the_others() -> None:
    with serving(rewards(None, 1e300)) as server:
        scores = score([Client(server.url).reward, lambda_reward()], [1.0, 1.0], two())
    assert repr(scores.total) == "[nan, 1e+300]"
    assert scores.num_failed == {"reward_url": 1, "constant": 0}


def lambda_reward() -> Any:
    def constant(completions: Any) -> list[float | None]:
        return [1.0] * len(completions)

    constant.name = "constant"  # type: ignore[attr-defined]
    return constant


def test_a_column_that_json_cannot_hold_is_named() -> None:
    with pytest.raises(UserError, match=r"the dataset's columns \(picture\) cannot be sent as JSON .*; remove them"):
        Client("http://127.0.0.1:9").reward([completion("p", "a", answer="x", picture=b"\x00")])


def test_health_is_asked_at_the_start() -> None:
    with serving(reply({"status": "ok", "version": 1})) as server:
        Client(server.url).reward.wait_until_ready()
    assert server.requests[0][0] == "GET /health HTTP/1.1"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (reply({"status": "ok", "version": 2}), "is no reward server of version 1"),
        (reply({}, "404 Not Found"), "answered 404"),
        (reply({"error": "no\x1b[31m way"}, "401 Unauthorized"), "answered 401: it does not take the token"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_at_the_start(answer: bytes, said: str) -> None:
    with serving(answer) as server:
        client = Client(server.url)
        with pytest.raises(UserError, match=rf"^--reward_url is http://127.0.0.1:\d+: it {said}.*; start a server"):
            client.reward.wait_until_ready()
    assert client.waits == []


def test_a_server_that_is_down_at_the_start_is_a_mistake() -> None:
    with serving(b"") as server:
        pass
    client = Client(server.url)
    with pytest.raises(UserError, match=r"it does not answer \(ConnectionRefusedError: .*; start a server there, such"):
        client.reward.wait_until_ready()
    assert client.waits == [1.0, 2.0]


# Faults ---------------------------------------------------------------------------------------------------------------


GARBAGE: dict[str, tuple[Answer, str]] = {
    "500": (reply({"error": "out of\nmemory"}, "500 Oops"), r"answered 500 \(out of memory\)"),
    "503 without JSON": (reply(b"<html>", "503 Busy"), "answered 503;"),
    "429": (reply({}, "429 Slow Down"), "answered 429;"),
    "no HTTP": (b"\x16\x03\x01 garbage\r\n\r\n", "does not answer .BadStatusLine"),
    "nothing": (b"", "does not answer .RemoteDisconnected"),
    "cut off": (reply({"version": 1, "rewards": [1, 2]})[:-3], "sent what is no JSON"),
    "no JSON": (reply(b"{\x1b]0;x"), r"sent what is no JSON \(\{"),
    "no UTF-8": (reply(b'{"version": 1, "rewards": "\xff"}'), "sent what is no JSON"),
    "deep JSON": (reply(b"[" * 60000), "sent what is no JSON"),
    "NaN": (reply(b'{"version": 1, "rewards": [NaN, 1]}'), "sent what is no JSON"),
    "a list": (reply([1.0, 2.0]), "sent JSON that is no object"),
    "no rewards": (reply({"version": 1}), "sent an object with version; it has version 1 and rewards"),
    "other version": (reply({"version": 2, "rewards": [1, 2]}), "it has version 1 and rewards"),
    "more keys": (reply({"version": 1, "rewards": [1, 2], "x": 1}), "sent an object with version, rewards, x"),
    "no list": (reply({"version": 1, "rewards": {"0": 1, "1": 2}}), "sent rewards that are no list"),
    "too few": (rewards(1), "sent 1 rewards for 2 completions"),
    "too many": (rewards(1, 2, 3), "sent 3 rewards for 2 completions"),
    "text": (rewards("1", 2), 'sent "1" as a reward'),
    "bool": (rewards(True, 2), "sent true as a reward"),
    "list of lists": (rewards([1], 2), r"sent \[1\] as a reward"),
    "infinite": (reply(b'{"version": 1, "rewards": [1e999, 1]}'), "sent a reward that is not finite"),
    "beyond floats": (reply(b'{"version": 1, "rewards": [1%s, 1]}' % (b"0" * 400)), "sent a reward that is not finite"),
    "huge, and says so": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n[",
        "sent a reply of 99999999999 bytes; 65664 are",
    ),
    "endless": (endless, "sent a reply of more than the 65664 bytes"),
    "endless chunks": (endless_chunks, "sent a reply of more than the 65664 bytes"),
    "endless error": (
        lambda s: (s.sendall(b"HTTP/1.1 500 No\r\n\r\n"), [s.sendall(b"x" * 9999) for _ in range(10**6)])[0],
        "sent a reply of more than the 65536 bytes",
    ),
    "endless header": (
        lambda s: (s.sendall(b"HTTP/1.1 200 OK\r\nX: "), [s.sendall(b"x" * 9999) for _ in range(10**6)])[0],
        "does not answer .LineTooLong",
    ),
}


@pytest.mark.parametrize("fault", GARBAGE)
def test_a_bad_answer_is_asked_for_again_and_then_masked_and_counted(fault: str) -> None:
    answer, said = GARBAGE[fault]
    with serving(answer) as server:
        client = Client(server.url)
        with pytest.warns(UserWarning, match=rf"^reward_url \(http://127.0.0.1:\d+\) .*{said}") as caught:
            assert repr(client.reward(two())) == "[nan, nan]"
    assert len(server.requests) == NUM_ATTEMPTS
    assert client.waits == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert client.reward.num_failures == 2
    message = str(caught[0].message)
    assert "\x1b" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (reply({"error": "prompts is no list"}, "400 Bad Request"), r"answered 400 \(prompts is no list\)"),
        (reply({}, "401 Unauthorized"), "does not take the token of REMAX_REWARD_TOKEN"),
        (reply({}, "413 Too Long"), "answered 413"),
        (reply({}, "302 Found", "Location: http://127.0.0.1:1/x"), "a redirect to http://127.0.0.1:1/x, which is not"),
        (
            reply({}, "307 Moved", "Location: http://user:pw@elsewhere/"),
            r"a redirect to http://\*\*\*@elsewhere/, which",
        ),
    ],
)
def test_what_would_be_answered_the_same_again_is_not_asked_again(answer: bytes, said: str) -> None:
    with serving(answer) as server:
        client = Client(server.url)
        with pytest.warns(UserWarning, match=said):
            assert repr(client.reward(two())) == "[nan, nan]"
    assert (len(server.requests), client.waits) == (1, [])


def test_no_redirect_is_followed() -> None:
    with serving(rewards(1, 2)) as other, serving(reply({}, "307 Moved", f"Location: {other.url}/score")) as server:
        with pytest.warns(UserWarning, match="redirect"):
            Client(server.url).reward(two())
        assert other.requests == []


@pytest.mark.parametrize(
    "slow",
    [
        sleeps,
        drips(b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n"),
        drips(b"HTTP/1.1 200 OK\r\n\r\n"),
        drips(b"HTTP/1.1 200 OK\r\nX: "),
        drips(b""),
    ],
)
def test_a_slow_server_is_left_after_the_timeout_even_if_it_drips(slow: Callable[[socket.socket], None]) -> None:
    free = threading.Event()
    left: list[float] = []

    def answer(connection: socket.socket) -> None:
        try:
            slow(connection)
        finally:
            free.set()

    with serving(answer, rewards(1, 2)) as server:
        reward = RemoteReward(
            server.url, timeout_seconds=0.15, sleep=lambda _: (left.append(time.perf_counter()), free.wait(5))
        )
        started = time.perf_counter()
        assert reward(two()) == [1.0, 2.0]
    assert left[0] - started < 0.8


def test_a_server_that_never_answers_is_told_of() -> None:
    with serving(sleeps) as server:
        client = Client(server.url, timeout_seconds=0.1)
        with pytest.warns(UserWarning, match="did not answer in 0.1 s; its completions have no reward"):
            assert repr(client.reward(two())) == "[nan, nan]"


def test_a_server_that_recovers_gives_its_rewards() -> None:
    bad = reply({}, "500 Oops")
    with serving(bad, b"", rewards(1), rewards(1, 2)) as server, warnings.catch_warnings():
        warnings.simplefilter("error")
        client = Client(server.url, jitter=0.5)
        assert client.reward(two()) == [1.0, 2.0]
    assert client.waits == [0.75, 1.5, 3.0]
    assert client.reward.num_failures == 0


def test_waits_leave_the_random_numbers_of_the_run_alone() -> None:
    with serving(reply({}, "500 Oops"), rewards(1, 2)) as server:
        random.seed(0)
        before = random.getstate()
        waits: list[float] = []
        RemoteReward(server.url, timeout_seconds=5.0, sleep=waits.append)(two())
        assert random.getstate() == before
        assert 0.5 < waits[0] <= 1.0


def test_each_kind_of_fault_is_told_once() -> None:
    with serving(reply({}, "400 Bad Request")) as server, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        client = Client(server.url)
        client.reward(two())
        client.reward(two())
    assert len(caught) == 1
    assert client.reward.num_failures == 4


# Addresses and tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("127.0.0.1:8000", "is 127.0.0.1:8000: that is no address of a server; set one such as"),
        ("ftp://host", "that is no address"),
        ("http://", "that is no address"),
        ("http://host:99999", "cannot be read as an address"),
        ("http://host:0", "that is no address"),
        ("http://[::1", "cannot be read as an address"),
        ("http://host/a b", "that is no address"),
        ("http://host/a\r\nX: y", "that is no address"),
        ("http://höst", "that is no address"),
        ("http://user:hunter2@host", "has a user or password in it .*; leave them out, and set the environment"),
        ("http://hunter2@host", "has a user or password in it"),
        ("http://host/?key=hunter2", "has a part behind"),
        ("http://host/#hunter2", "has a part behind"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(url: str, said: str, tmp_path: Path) -> None:
    for inputs in (
        lambda: TrainInputs(model="m", train_dataset="d", reward_url=url),
        lambda: EvaluateInputs(model="m", eval_dataset="d", reward_url=url),
        lambda: LabInputs(model="m", train_dataset="d", reward_url=url),
        lambda: RemoteReward(url, timeout_seconds=1.0),
    ):
        with pytest.raises(UserError, match=f"^--reward_url .*{said}") as caught:
            inputs()
        assert "hunter2" not in str(caught.value)


def test_rewards_come_in_the_order_of_their_weights(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def f(completions): return [0.0] * len(completions)\n")
    inputs = TrainInputs(
        model="m", train_dataset="d", reward_model="r", reward_funcs=[f"{tmp_path}/f.py:f"], reward_url="http://h:1"
    )
    first, second, third = named_rewards(inputs, 5.0)
    assert (first, second.name, third.name) == ("r", "f", "reward_url")
    assert (second.timeout_seconds, third.timeout_seconds) == (5.0, 5.0)
    second.close()


@pytest.mark.parametrize("token", ["a b", "a\r\nX: y", "é"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(token: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("REMAX_REWARD_TOKEN", token)
    with pytest.raises(UserError, match=r"^the environment variable REMAX_REWARD_TOKEN has characters") as caught:
        RemoteReward("http://127.0.0.1:9", timeout_seconds=1.0)
    assert token not in str(caught.value)
    monkeypatch.setenv("REMAX_REWARD_TOKEN", "")
    assert read_credential(TOKEN_VARIABLE) is None


# Runs -----------------------------------------------------------------------------------------------------------------


HEALTH = reply({"status": "ok", "version": 1})


def test_a_run_whose_server_dies_stops_with_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = reply({"error": "no memory"}, "500 Oops")
    with serving(HEALTH, rewards(*range(8)), broken) as server:
        client = Client(server.url)
        trainer = make_trainer(tmp_path / "out", client.reward, max_steps=3)
        with (
            pytest.warns(UserWarning, match="answered 500"),
            pytest.raises(
                GuardStop, match=r"^8 of the step's 8 .*\(reward_url \(http://.*\) answered 500 \(no memory\)\)"
            ),
        ):
            trainer.train()
    metrics = read(tmp_path / "out" / "metrics.jsonl")
    assert [step["rewards/reward_url/missing_fraction"] for step in metrics] == [0.0]


def test_the_command_line_reports_a_server_that_is_not_there(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("remax.rewards.remote.FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("REMAX_REWARD_TOKEN", "s3cret")
    with serving(b"") as server:
        pass
    flags = ["--model", "nowhere", "--train_dataset", "nowhere.jsonl", "--output_dir", str(tmp_path / "out")]
    assert main(["train", *flags, "--reward_url", server.url]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"remax: --reward_url is {server.url}: it does not answer")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_token_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMAX_REWARD_TOKEN", "s3cret")
    with serving(HEALTH, rewards(*range(8)), rewards(*range(8))) as server:
        make_trainer(tmp_path / "out", Client(server.url).reward).train()
        assert all(headers["authorization"] == "Bearer s3cret" for _, headers, _ in server.requests)
    assert len(server.requests) == 3
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"s3cret" not in path.read_bytes(), path
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["reward_timeout_seconds"] == 300.0

"""Reward servers that answer anything and clients that ask anything: no reward or a refusal, no crash, no hang."""

import contextlib
import http.client
import json
import math
import socket
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import strategies as st

from fuzzing import check_sentence, fuzz
from raw_server import reply, serving, two
from remax.rewards.remote import RemoteReward
from remax.rewards.server import Refusal, RewardServer, parse_request
from remax.untrusted import printable

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just(10**400)
    | st.just("\x1b[2J"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
numbers = st.none() | st.integers(-9, 9) | st.floats(-1, 1)
right = st.fixed_dictionaries({"version": st.just(1), "rewards": st.lists(numbers, min_size=2, max_size=2)})
nearly = st.fixed_dictionaries(
    {
        "version": st.sampled_from([1, 1, 1, 1.0, True, "1", 2, None]),
        "rewards": st.lists(numbers | json_values, max_size=3),
    },
    optional={"more": json_values},
)
STATUS = ["200 OK"] * 4 + ["500 x", "404 x", "301 x", "204 x", "999 x", "200", "abc", "100 Continue", "429 \x1b[2J"]
HEADERS = [
    [],
    [],
    [],
    ["Content-Length: 3"],
    ["Content-Length: -1"],
    ["Content-Length: x"],
    ["Transfer-Encoding: chunked"],
]


def wrong_or_values(body: bytes) -> list[float]:
    """What a reply with this body gives, told without the client's code: NaN for both if anything is wrong."""
    nothing = [math.nan, math.nan]
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return nothing
    if not isinstance(content, dict) or sorted(content) != ["rewards", "version"] or content["version"] != 1:
        return nothing
    values = content["rewards"]
    if not isinstance(values, list) or len(values) != 2:
        return nothing
    if any(isinstance(v, bool) or not isinstance(v, int | float | None) for v in values):
        return nothing
    if any(v is not None and not abs(v) <= 1.7e308 for v in values):
        return nothing
    return [math.nan if v is None else float(v) for v in values]


def test_replies_of_every_shape() -> None:
    bodies = st.one_of(right.map(json.dumps), nearly.map(json.dumps), json_values.map(json.dumps)).map(str.encode)
    raw = st.binary(max_size=30) | st.sampled_from([b"[" * 50_000, b"1" * 5000, b"\xff\xfe{}", b"x" * 200_000, b""])

    def check(case: tuple[bytes, str, list[str], float]) -> None:
        body, status, headers, place = case
        whole = reply(body, status, *headers)
        with serving(whole[: int(place * len(whole))] if place < 1 else whole) as server:
            reward = RemoteReward(server.url, timeout_seconds=5.0, sleep=lambda _: None)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                values = reward(two())
        assert len(values) == 2
        for warning in told:
            check_sentence(str(warning.message))
        plain = status == "200 OK" and not headers and place == 1
        assert values == pytest.approx(wrong_or_values(body) if plain else values, nan_ok=True)
        assert all(isinstance(value, float) and not math.isinf(value) for value in values)
        assert plain or len(told) or not any(map(math.isnan, values)) or None in json.loads(body)["rewards"]

    places = st.sampled_from([1.0, 1.0, 1.0]) | st.floats(0, 1)
    fuzz(
        "replies of a reward server",
        st.tuples(bodies | raw, st.sampled_from(STATUS), st.sampled_from(HEADERS), places),
        check,
    )


texts = st.text(max_size=4) | st.lists(
    st.fixed_dictionaries({"role": st.text(max_size=3), "content": st.text(max_size=3)})
)
requests = st.fixed_dictionaries(
    {
        "version": st.sampled_from([1, 1, 1, 1, True, None, 2]),
        "prompts": st.lists(texts | json_values, max_size=2),
        "completions": st.lists(texts | json_values, max_size=2),
    },
    optional={
        "completion_ids": st.lists(st.lists(st.integers() | json_values, max_size=2), max_size=2) | json_values,
        "finished": st.lists(st.booleans() | json_values, max_size=2) | json_values,
        "columns": st.dictionaries(st.text(max_size=3), st.lists(json_values, max_size=2), max_size=2) | json_values,
        "\x1b[2J": json_values,
    },
)
request_bodies = st.one_of(
    requests.map(json.dumps).map(str.encode), json_values.map(json.dumps).map(str.encode), st.binary(max_size=20),
    st.sampled_from([b"[" * 50_000, b'{"version": NaN}', b'{"version": ' + b"1" * 5000 + b"}"]),
)  # fmt: skip


def check_refusal(refusal: Refusal) -> None:
    message = str(refusal)
    assert refusal.status == 400
    assert message == printable(message)
    assert len(message.splitlines()) == 1


def test_requests_of_every_shape() -> None:
    def check(body: bytes) -> None:
        try:
            completions = parse_request(body)
        except Refusal as refusal:
            check_refusal(refusal)
            return
        assert len(completions) == len(json.loads(body)["prompts"])
        for completion in completions:
            assert isinstance(completion.text, str)
            assert isinstance(completion.content, str | list)

    fuzz("requests to a reward server", request_bodies, check)


REQUEST_HEADERS = [
    *(b"Content-Type: application/json", b"Content-Length: 5", b"Content-Length: 99999999999", b"Content-Length: -1"),
    *(b"Content-Length: 1e3", b"Transfer-Encoding: chunked", b"Authorization: Bearer \xff", b"\x1b[2J: x"),
    b"x" * 70_000,
]


@contextlib.contextmanager
def served() -> Iterator[RewardServer]:
    server = RewardServer(lambda rows: [1.0] * len(rows), "127.0.0.1", 0, seconds_to_send=0.2)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def test_bytes_of_every_kind_leave_the_server_alive(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REMAX_REWARD_TOKEN", raising=False)
    lines = st.sampled_from(
        [b"POST /score HTTP/1.1", b"POST /score", b"GET /health HTTP/1.1", b"GET ../../etc/passwd HTTP/1.0"]
    )
    headers = st.lists(st.sampled_from(REQUEST_HEADERS), max_size=3)

    def check(case: tuple[bytes, list[bytes], bytes]) -> None:
        line, heads, body = case
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=5) as connection:
            connection.sendall(b"\r\n".join([line, *heads, b"", body]))
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(100_000)
            assert b"Traceback" not in answer
            assert not answer or answer.startswith(b"HTTP/1.") or b'"error"' in answer
        client = http.client.HTTPConnection(*address, timeout=5)
        client.request("GET", "/health")
        assert json.loads(client.getresponse().read()) == {"status": "ok", "version": 1}
        client.close()

    with served() as server:
        address = server.server_address[:2]
        fuzz("bytes to a reward server", st.tuples(lines | st.binary(max_size=20), headers, request_bodies), check)
    logged = capfd.readouterr().err
    assert printable(logged) == logged
    assert "Traceback" not in logged

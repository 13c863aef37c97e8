"""Rewards from a server over HTTP, by the protocol of docs/reward-server.md."""

import contextlib
import http.client
import json
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from remax.config.inputs import check_reward_url
from remax.credentials import read_credential
from remax.errors import UserError
from remax.interfaces import Completion
from remax.rewards.programmed import ProgrammedReward
from remax.untrusted import shown

Answer = TypeVar("Answer")
PROTOCOL_VERSION = 1
TOKEN_VARIABLE = "REMAX_REWARD_TOKEN"
"""The environment variable that holds the token: a flag would be seen by others and written to config.yaml."""
NUM_ATTEMPTS = 6
"""How often a call is tried; with the waits between, a server has half a minute to come back."""
NUM_ATTEMPTS_AT_START = 3
SECONDS_TO_CONNECT = 10.0
SECONDS_FOR_HEALTH = 10.0
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0
REPLY_BYTES = 65536
REPLY_BYTES_PER_COMPLETION = 64
"""A reply may be REPLY_BYTES long, and so much more for every completion."""
WORTH_RETRYING = (408, 425, 429)
"""Of the 4xx; the others would be answered the same again."""


class RemoteReward(ProgrammedReward):
    """Asks a reward server. What it does not score, after some attempts, gets NaN, which leaves it out of the loss.

    A call is tried again after waits that double, from a second up to LONGEST_WAIT_SECONDS, each shortened by a random
    part of up to a half, so that many trainings do not return to a server at the same moment. Neither redirects nor
    proxies are followed. The token of the environment variable REMAX_REWARD_TOKEN is sent as a bearer token.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float,
        sleep: Callable[[float], object] = time.sleep,
        jitter: Callable[[], float] | None = None,
    ) -> None:
        """url: where /score and /health are. timeout_seconds: of one attempt, 0 for no limit.

        sleep and jitter (numbers in [0, 1)) are for tests.

        Raises:
            UserError: the address or the token cannot be used.
        """
        super().__init__("reward_url", timeout_seconds)
        check_reward_url(url)
        self.url = url.rstrip("/")
        self._sleep = sleep
        self._jitter = jitter or random.Random().random  # Never the global generator: a run's own numbers come from it.
        read_credential(TOKEN_VARIABLE)

    def wait_until_ready(self) -> None:
        """Returns when the server has said that it speaks this protocol.

        Raises:
            UserError: it has not.
        """
        try:
            self._insist(self._check_health, NUM_ATTEMPTS_AT_START)
        except _NoAnswer as error:
            raise UserError(
                f"--reward_url is {self.url}: it {error}, so nothing can be scored; start a server there, such as "
                "`remax serve-reward`, or correct the address."
            ) from None

    def __call__(self, completions: Sequence[Completion]) -> list[float | None]:
        """Returns one reward per completion, in order; NaN where the server gives none.

        Raises:
            UserError: a column of the dataset cannot be sent as JSON.
        """
        body, number = self._packed(completions), len(completions)
        limit = REPLY_BYTES + REPLY_BYTES_PER_COMPLETION * number
        try:
            return self._insist(
                lambda: _rewards(self._exchange("POST", "/score", body, self.timeout_seconds, limit), number),
                NUM_ATTEMPTS,
            )
        except _NoAnswer as error:
            return self._missing(number, f"({self.url}) {error}", error.kind)

    def _insist(self, attempt: Callable[[], Answer], num_attempts: int) -> Answer:
        wait = FIRST_WAIT_SECONDS
        for number in range(1, num_attempts + 1):
            try:
                return attempt()
            except _NoAnswer as error:
                if number == num_attempts or not error.retry:
                    raise
            self._sleep(wait * (1 - self._jitter() / 2))
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        raise AssertionError("unreachable")

    def _check_health(self) -> None:
        reply = self._exchange("GET", "/health", None, SECONDS_FOR_HEALTH, REPLY_BYTES)
        if reply.get("status") != "ok" or reply.get("version") != PROTOCOL_VERSION:
            raise _NoAnswer(f"is no reward server of version {PROTOCOL_VERSION} (/health says {shown(reply)})", False)

    def _packed(self, completions: Sequence[Completion]) -> bytes:
        columns = completions[0].prompt.columns if completions else {}
        request = {
            "version": PROTOCOL_VERSION,
            "prompts": [c.prompt.content for c in completions],
            "completions": [c.content for c in completions],
            "completion_ids": [c.token_ids for c in completions],
            "finished": [not c.truncated for c in completions],
            "columns": {name: [_finite(c.prompt.columns[name]) for c in completions] for name in columns},
        }
        try:
            return json.dumps(request, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            wrong = [name for name, values in request["columns"].items() if not _is_json(values)]  # type: ignore[attr-defined]
            raise UserError(
                f"--reward_url is {self.url}: the dataset's columns ({', '.join(wrong)}) cannot be sent as JSON "
                f"({shown(error)}); remove them from the dataset."
            ) from error

    def _exchange(self, method: str, path: str, body: bytes | None, seconds: float, limit: int) -> dict[str, Any]:
        """Returns what the server replies to one request, an object; reads at most so many bytes.

        Raises:
            _NoAnswer: it replies something else, not in time, or not at all.
        """
        address = urlsplit(self.url)
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connect_seconds = min(SECONDS_TO_CONNECT, seconds or SECONDS_TO_CONNECT)
        connection = kind(str(address.hostname), address.port, timeout=connect_seconds)
        expired = threading.Event()
        try:
            connection.connect()
            connection.sock.settimeout(None)
            with shut_after(connection.sock, seconds, expired):
                # A server may refuse a long request unread: it has answered, although sending breaks.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.request(method, address.path + path, body, _headers())
                response = connection.getresponse()
                text = _body(response, limit if response.status == 200 else REPLY_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if expired.is_set() or isinstance(error, TimeoutError):
                seconds = seconds if expired.is_set() else connect_seconds
                raise _NoAnswer(f"did not answer in {seconds:g} s", True, "timeout") from None
            raise _NoAnswer(f"does not answer ({type(error).__name__}: {shown(error)})", True) from None
        finally:
            connection.close()
        if expired.is_set():
            raise _NoAnswer(f"did not answer in {seconds:g} s", True, "timeout")
        return _object(response, text)


def _finite(value: Any) -> Any:
    """JSON has no word for what is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


class _NoAnswer(Exception):
    """An attempt failed; the message says what the server did."""

    def __init__(self, reason: str, retry: bool, kind: object = None) -> None:
        super().__init__(reason)
        self.retry = retry
        self.kind = kind or reason


def _headers() -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "remax"}
    token = read_credential(TOKEN_VARIABLE)
    return headers | {"Authorization": f"Bearer {token}"} if token else headers


def _body(response: http.client.HTTPResponse, limit: int) -> bytes:
    """Returns the body of a response, unless that is too long: then the rest of it is not read."""
    if (response.length or 0) > limit:
        raise _NoAnswer(f"sent a reply of {response.length} bytes; {limit} are expected at most", True, "size")
    body = response.read(limit + 1)
    if len(body) > limit:
        raise _NoAnswer(f"sent a reply of more than the {limit} bytes that are expected at most", True, "size")
    return body


def _object(response: http.client.HTTPResponse, text: bytes) -> dict[str, Any]:
    """Returns the JSON object of a response with status 200."""
    status = response.status
    if status == 401 or (status == 403 and not _reason(text)):
        raise _NoAnswer(f"answered {status}: it does not take the token of {TOKEN_VARIABLE}", False)
    if 300 <= status < 400:
        target = shown(response.headers.get("Location"))
        raise _NoAnswer(f"answered {status}, a redirect to {target}, which is not followed", False)
    if status != 200:
        retry = status >= 500 or status in WORTH_RETRYING
        raise _NoAnswer(f"answered {status} {_reason(text)}".strip(), retry, status)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise _NoAnswer(
            f"sent what is no JSON ({shown(text[:200].decode(errors='replace'), 60)})", True, "garbage"
        ) from None
    if not isinstance(value, dict):
        raise _NoAnswer("sent JSON that is no object", True)
    return value


def _reason(text: bytes) -> str:
    """Returns what an error's body says, if it is the kind that our server sends."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return ""
    return f"({shown(error)})" if isinstance(error, str) else ""


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _rewards(reply: dict[str, Any], number: int) -> list[float | None]:
    """Returns the rewards of a reply, NaN for null.

    Raises:
        _NoAnswer: they are not one number or null for each completion.
    """
    if reply.get("version") != PROTOCOL_VERSION or reply.keys() != {"version", "rewards"}:
        keys = shown(", ".join(map(str, reply)))
        raise _NoAnswer(
            f"sent an object with {keys or 'nothing'}; it has version {PROTOCOL_VERSION} and rewards", True, "keys"
        )
    rewards = reply["rewards"]
    if not isinstance(rewards, list):
        raise _NoAnswer("sent rewards that are no list", True)
    if len(rewards) != number:
        raise _NoAnswer(f"sent {len(rewards)} rewards for {number} completions", True, "length")
    return [_number(reward) for reward in rewards]


def _number(reward: Any) -> float:
    if reward is None:
        return math.nan
    if isinstance(reward, bool) or not isinstance(reward, int | float):
        raise _NoAnswer(f"sent {shown(json.dumps(reward), 60)} as a reward", True, "type")
    try:
        value = float(reward)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise _NoAnswer(f"sent a reward that is not finite ({shown(reward, 60)})", True, "type")
    return value


@contextlib.contextmanager
def shut_after(connected: socket.socket, seconds: float, expired: threading.Event | None = None) -> Iterator[None]:
    """Shuts a connection after so many seconds, unless they are 0: whoever reads or writes there gets an error.

    A timeout of the socket itself would count anew with every byte that the other side lets drip.
    """

    def expire() -> None:
        if expired is not None:
            expired.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connected, socket.SHUT_RDWR)

    if not seconds:
        yield
        return
    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

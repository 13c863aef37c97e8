"""A client of OpenAI's chat completions, which vLLM, llama.cpp, Ollama and most providers speak too."""

import contextlib
import http.client
import json
import random
import socket
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from remax.credentials import read_credential
from remax.errors import UserError
from remax.rewards.remote import (
    FIRST_WAIT_SECONDS,
    LONGEST_WAIT_SECONDS,
    NUM_ATTEMPTS,
    NUM_ATTEMPTS_AT_START,
    SECONDS_TO_CONNECT,
    WORTH_RETRYING,
    shut_after,
)
from remax.untrusted import shown

KEY_VARIABLE = "REMAX_JUDGE_KEY"
"""The environment variable that holds the key: a flag would be seen by others and written to config.yaml. It is not
OPENAI_API_KEY, which would then be sent to whatever address is set."""
REPLY_BYTES = 1 << 20
CANNOT_BE_USED = (401, 403, 404)
"""What would be answered to every question."""
SERVERS_WISH_SECONDS = 120.0
"""The longest wait that a server may ask for with Retry-After."""


class _NoAnswer(Exception):
    def __init__(self, reason: str, *, retry: bool, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.retry, self.wait = retry, wait


class Endpoint:
    """Asks one question at a time, in any number of threads, at temperature 0.

    An attempt that fails is repeated as in remax.rewards.remote: after waits that double, each shortened by a random
    part; a server's Retry-After is respected. Neither redirects nor proxies are followed. The key of the environment
    variable REMAX_JUDGE_KEY is sent as a bearer token, and never shown.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout_seconds: float,
        sleep: Callable[[float], object] | None = None,
        jitter: Callable[[], float] | None = None,
    ) -> None:
        """url: what /chat/completions is put behind. timeout_seconds: of one attempt.

        sleep and jitter (numbers in [0, 1)) are for tests.

        Raises:
            UserError: the key cannot be used.
        """
        self.url, self.model, self.timeout_seconds = url.rstrip("/"), model, timeout_seconds
        self.last_failure = ""
        """Why the latest question without an answer has none."""
        self._stopped = threading.Event()
        self._connections: set[http.client.HTTPConnection] = set()
        self._sleep = sleep or self._stopped.wait
        self._jitter = jitter or random.Random().random
        self._key = read_credential(KEY_VARIABLE)

    def check(self) -> None:
        """Returns when the endpoint has answered a question, whatever it says.

        Raises:
            UserError: it has not.
        """
        try:
            self._insist("You are asked whether you can be reached.", "Answer with OK.", NUM_ATTEMPTS_AT_START)
        except _NoAnswer as error:
            raise UserError(
                f"--judge_url is {self.url}: it {error}, so nothing can be judged; start the endpoint, or correct the "
                "address."
            ) from None

    def ask(self, system: str, user: str) -> str | None:
        """Returns the answer of the model; None if there is none, after some attempts.

        Raises:
            UserError: the endpoint does not take the key, or has no such address or model.
        """
        try:
            return self._insist(system, user, NUM_ATTEMPTS)
        except _NoAnswer as error:
            self.last_failure = f"{self.url} {error}"
            return None

    def _insist(self, system: str, user: str, num_attempts: int) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        wait = FIRST_WAIT_SECONDS
        for number in range(1, num_attempts + 1):
            try:
                return self._attempt(body)
            except _NoAnswer as error:
                if not error.retry or number == num_attempts or self._stopped.is_set():
                    raise
                self._sleep(max(wait * (1 - self._jitter() / 2), error.wait))
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """Ends all questions, those that are waited for and those that wait for their next attempt."""
        self._stopped.set()
        for connection in list(self._connections):
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _attempt(self, body: bytes) -> str:
        address = urlsplit(self.url)
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(address.hostname), address.port, timeout=min(SECONDS_TO_CONNECT, self.timeout_seconds))
        expired = threading.Event()
        try:
            connection.connect()
            self._connections.add(connection)
            connection.sock.settimeout(None)
            with shut_after(connection.sock, self.timeout_seconds, expired):
                connection.request("POST", f"{address.path}/chat/completions", body, self._headers())
                response = connection.getresponse()
                text = response.read(REPLY_BYTES + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if expired.is_set():
                raise _NoAnswer(f"did not answer in {self.timeout_seconds:g} s", retry=True) from None
            raise _NoAnswer(f"does not answer ({type(error).__name__}: {shown(error)})", retry=True) from None
        finally:
            self._connections.discard(connection)
            connection.close()
        if expired.is_set():
            raise _NoAnswer(f"did not answer in {self.timeout_seconds:g} s", retry=True)
        if response.status != 200:
            raise self._refusal(response, text)
        return _content(text)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "remax"}
        return headers | {"Authorization": f"Bearer {self._key}"} if self._key else headers

    def _refusal(self, response: http.client.HTTPResponse, text: bytes) -> _NoAnswer:
        status, reason = response.status, _reason(text)
        if self._key:  # A server may repeat what it was sent.
            reason = reason.replace(self._key, "***")
        said = f"answered {status}{f' ({shown(reason)})' if reason else ''}"
        if status in CANNOT_BE_USED:
            advice = (
                "correct the address, or --judge_model"
                if status == 404
                else f"correct the key in the environment variable {KEY_VARIABLE}"
                if self._key
                else f"set its key in the environment variable {KEY_VARIABLE}"
            )
            raise UserError(f"--judge_url is {self.url}: it {said}, so nothing can be judged; {advice}.")
        if 300 <= status < 400:
            said = f"answered {status}, a redirect to {shown(response.headers.get('Location'))}, which is not followed"
        retry = status >= 500 or status in WORTH_RETRYING
        return _NoAnswer(said, retry=retry, wait=_seconds(response.headers.get("Retry-After")))


def _content(text: bytes) -> str:
    """Returns what the model says in a reply; nothing if it says nothing, which is no verdict."""
    if len(text) > REPLY_BYTES:
        raise _NoAnswer(f"sent a reply of more than {REPLY_BYTES} bytes", retry=False)
    try:
        message = json.loads(text)["choices"][0]["message"]
        content = message.get("content")
    except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
        seen = shown(text[:200].decode(errors="replace"), 60)
        raise _NoAnswer(f"sent what is no chat completion ({seen})", retry=True) from None
    return content if isinstance(content, str) else ""


def _reason(text: bytes) -> str:
    """Returns what an error's body says, in the forms that are in use."""
    try:
        body: Any = json.loads(text[:REPLY_BYTES])
        error = body.get("error", body.get("detail", body.get("message")))
        reason = error.get("message") if isinstance(error, dict) else error
    except (ValueError, RecursionError, AttributeError):
        return ""
    return reason if isinstance(reason, str) else ""


def _seconds(value: str | None) -> float:
    """Returns the seconds of a Retry-After; 0 where there is none, or a date."""
    try:
        seconds = float(value or 0)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), SERVERS_WISH_SECONDS) if seconds == seconds else 0.0

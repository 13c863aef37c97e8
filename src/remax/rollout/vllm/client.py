"""vLLM on a server: `remax serve-vllm`, asked over HTTP."""

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from safetensors.torch import save
from torch import Tensor

from remax.config.vllm import KEY_VARIABLE
from remax.credentials import read_credential
from remax.errors import GuardStop, UserError
from remax.rollout.vllm.engine import Drawn, Request, Weights
from remax.untrusted import shown

Answer = TypeVar("Answer")
PROTOCOL_VERSION = 1
SECONDS_TO_CONNECT = 10.0
SECONDS_FOR_HEALTH = 10.0
SECONDS_BETWEEN_LOOKS = 10.0
"""How often a server is looked after while it works on an answer."""
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0
PART_BYTES = 2**30
"""Weights are sent in parts of about this size; so much of them is in memory twice."""
KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
"""While an answer is waited for, nothing in between shall forget the connection, nor its end be missed: probes after
30 s, six of them."""
WORTH_RETRYING = (502, 503, 504)
JSON, TENSORS = "application/json", "application/octet-stream"


class RemoteVLLM:
    """Asks a server. What fails is tried again until timeout_seconds have passed since it failed first.

    The waits double, from a second up to LONGEST_WAIT_SECONDS, each shortened by a random part of up to a half. Neither
    redirects nor proxies are followed. The key of the environment variable VLLM_API_KEY is sent as a bearer token.

    An answer may take as long as it needs: rows may be many and long. The server is looked after meanwhile, and is
    given up if for timeout_seconds it does not say how it is, or says that vLLM does not get on.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] | None = None,
    ) -> None:
        """sleep, clock (seconds) and jitter (numbers in [0, 1)) are for tests.

        Raises:
            UserError: the key cannot be used.
        """
        self.url, self.timeout_seconds = url, timeout_seconds
        self.name = f"the vLLM server at {url}"
        self._sleep, self._clock = sleep, clock
        self._jitter = jitter or random.Random().random  # Never the global generator: a run's own numbers come from it.
        read_credential(KEY_VARIABLE)

    def check(self, model: dict[str, Any], *, longest: int) -> str:
        """Returns the type that the server computes in, having made sure that it has the same model.

        model: see describe_model; nothing is compared with an empty one. longest: prompt and completion, in tokens.

        Raises:
            UserError: it does not answer, is no such server, or has another model or a shorter context.
        """
        try:
            health = self._insist(self._health)
        except _NoAnswer as error:
            raise UserError(
                f"--vllm_mode is server: {self.name} {error}, so nothing can be drawn; start one there with "
                "`remax serve-vllm MODEL`, or correct --vllm_server_base_url."
            ) from None
        theirs = health.get("model")
        theirs = theirs if isinstance(theirs, dict) else {}
        for name in [*model, *theirs] if model else []:
            if model.get(name) != theirs.get(name):
                raise UserError(
                    f"--model has {name} {shown(model.get(name), 40)}: the model of {self.name} has "
                    f"{shown(theirs.get(name), 40)}, so no weights could be sent; start the server with the same model."
                )
        if int(health.get("max_model_length", 0)) < longest:
            raise UserError(
                f"--max_prompt_length and --max_completion_length add up to {longest} tokens: {self.name} takes "
                f"{health.get('max_model_length')}; start it with --vllm_max_model_length {longest}, or set less."
            )
        return str(health.get("dtype"))

    def holds(self) -> str:
        """Returns the stamp of the weights that the server holds.

        Raises:
            GuardStop: it does not answer.
        """
        return str(self._ask(self._health)["holds"])

    def load(self, weights: Weights, stamp: str) -> None:
        """Sends all the weights, some at a time.

        Raises:
            GuardStop: the server does not answer, or does not take them.
        """
        dtype = getattr(torch, str(self._ask(self._health).get("dtype")), None)
        number = 0
        for number, tensors in enumerate(_parts(weights, dtype), start=1):
            body, path = save(tensors), f"/weights/{stamp}/{number}"
            self._ask(lambda path=path, body=body: self._exchange("PUT", path, body, TENSORS))  # type: ignore[misc]
        self._ask(lambda: self._exchange("POST", "/load", json.dumps({"stamp": stamp, "parts": number}).encode()))

    def draw(self, request: Request) -> list[Drawn]:
        """Returns one result per row, in order.

        Raises:
            GuardStop: the server holds other weights than the request wants, or does not answer.
        """
        sampling = request.sampling
        body = json.dumps(
            {
                "version": PROTOCOL_VERSION,
                "stamp": request.stamp,
                "prompts": request.prompts,
                "rows": request.rows,
                "max_completion_length": sampling.max_completion_length,
                "eos_token_ids": sampling.eos_token_ids,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
        ).encode()
        rows = self._ask(lambda: _rows(self._exchange("POST", "/draw", body), len(request.rows)))
        return [Drawn(ids, logprobs) for ids, logprobs in rows]

    def rest(self) -> None:
        """Does nothing: a server has its own memory."""

    def close(self) -> None:
        """Does nothing: a server is there for others as well."""

    def _ask(self, attempt: Callable[[], Answer]) -> Answer:
        try:
            return self._insist(attempt)
        except _NoAnswer as error:
            raise GuardStop(
                f"{self.name} {error}; see to that, start it again if it has ended, and go on with --resume auto."
            ) from None

    def _insist(self, attempt: Callable[[], Answer]) -> Answer:
        until, wait = None, FIRST_WAIT_SECONDS
        while True:
            try:
                return attempt()
            except _NoAnswer as error:
                if not error.retry:
                    raise
                if until is None:  # Only now: the attempt may have been a draw of an hour.
                    until = self._clock() + self.timeout_seconds
                    print(f"Waiting for {self.name}: it {error}.", flush=True)
                left = until - self._clock()
                if left <= 0:
                    raise _NoAnswer(f"{error}, for {self.timeout_seconds:g} s", False) from None
            self._sleep(min(wait * (1 - self._jitter() / 2), left))
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _health(self) -> dict[str, Any]:
        reply = self._exchange("GET", "/health", seconds=SECONDS_FOR_HEALTH)
        known = "holds" in reply and isinstance(reply.get("busy_seconds", 0), int | float)
        if reply.get("version") != PROTOCOL_VERSION or not known:
            raise _NoAnswer(
                f"is no `remax serve-vllm` of protocol version {PROTOCOL_VERSION} (/health says {shown(reply)})", False
            )
        return reply

    def _exchange(
        self, method: str, path: str, body: bytes | None = None, kind: str = JSON, seconds: float | None = None
    ) -> dict[str, Any]:
        """Returns the JSON object that the server replies; seconds: what a silence may last, by default see `_watched`.

        Raises:
            _NoAnswer: it replies something else, or not at all.
        """
        address = urlsplit(self.url)
        make = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = make(str(address.hostname), address.port, timeout=SECONDS_TO_CONNECT)
        headers = {"Content-Type": kind, "Accept": JSON, "User-Agent": "remax"}
        if key := read_credential(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.connect()
            connection.sock.settimeout(seconds)
            _keep_alive(connection.sock)
            with self._watched(connection.sock) if seconds is None else contextlib.nullcontext():
                connection.request(method, address.path + path, body, headers)
                response = connection.getresponse()
                text = response.read()
        except TimeoutError:
            raise _NoAnswer("does not answer in time", True) from None
        except (OSError, http.client.HTTPException) as error:
            raise _NoAnswer(f"does not answer ({type(error).__name__}: {shown(error)})", True) from None
        finally:
            connection.close()
        return _object(response, text)

    @contextlib.contextmanager
    def _watched(self, connected: socket.socket) -> Iterator[None]:
        """Breaks a connection if, while its answer is waited for, the server hangs: see the class.

        Raises:
            _NoAnswer: it did.
        """
        over, hangs = threading.Event(), []

        def watch() -> None:
            silent_since = None
            while not over.wait(SECONDS_BETWEEN_LOOKS):
                began, limit, reason = self._clock(), self.timeout_seconds, ""
                try:
                    if self._health().get("busy_seconds", 0) >= limit:
                        reason = f"has been at one step, or at taking weights, for {limit:g} s (--vllm_server_timeout)"
                    silent_since = None
                except _NoAnswer as error:
                    silent_since = began if silent_since is None else silent_since
                    if self._clock() - silent_since >= limit:
                        reason = f"{error}, for {limit:g} s"
                if reason and not over.is_set():
                    hangs.append(reason)
                    with contextlib.suppress(OSError):  # It has just ended by itself.
                        # Not the method of a TLS connection, which would leave its reader without one.
                        socket.socket.shutdown(connected, socket.SHUT_RDWR)
                    return

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        except (OSError, http.client.HTTPException):
            if hangs:
                raise _NoAnswer(hangs[0], False) from None
            raise
        finally:
            over.set()


class _NoAnswer(Exception):
    """An attempt failed; the message says what the server did."""

    def __init__(self, reason: str, retry: bool) -> None:
        super().__init__(reason)
        self.retry = retry


def _keep_alive(connected: socket.socket) -> None:
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _object(response: http.client.HTTPResponse, text: bytes) -> dict[str, Any]:
    """Returns the JSON object of a response with status 200."""
    status = response.status
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    reason = content.get("error") if isinstance(content, dict) else None
    if status == 401:
        raise _NoAnswer(f"does not take the key of the environment variable {KEY_VARIABLE}", False)
    if status == 409:
        raise _NoAnswer(f"holds other weights than the policy ({shown(reason)})", False)
    if status != 200:
        raise _NoAnswer(f"answered {status} ({shown(reason, 200)})", status in WORTH_RETRYING)
    if not isinstance(content, dict):
        raise _NoAnswer("sent what is no JSON object", False)
    return content


def _rows(reply: dict[str, Any], number: int) -> list[tuple[list[int], list[float]]]:
    """Returns tokens and log-probabilities of a reply.

    Raises:
        _NoAnswer: they are not as many as asked for.
    """
    rows = reply.get("rows")
    if (
        not isinstance(rows, list)
        or len(rows) != number
        or not all(len(r) == 2 and len(r[0]) == len(r[1]) for r in rows)
    ):
        raise _NoAnswer(f"did not send {number} rows of tokens and log-probabilities", False)
    return [(ids, logprobs) for ids, logprobs in rows]


def _parts(weights: Weights, dtype: torch.dtype | None) -> Iterator[dict[str, Tensor]]:
    """Yields the weights in parts of about PART_BYTES, in the type that the server computes in."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        # A copy, since names may share a tensor, which the format does not allow.
        own = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True).contiguous()
        part[name], size = own, size + own.nbytes
        if size >= PART_BYTES:
            yield part
            part, size = {}, 0
    if part:
        yield part

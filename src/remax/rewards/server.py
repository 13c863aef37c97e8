"""The reference server of the protocol in docs/reward-server.md: `remax serve-reward`."""

import contextlib
import json
import math
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from remax.credentials import read_credential
from remax.errors import UserError
from remax.interfaces import Completion, Message, Prompt, RewardFunction
from remax.rewards import ProgrammedReward, score
from remax.rewards.remote import PROTOCOL_VERSION, TOKEN_VARIABLE, shut_after
from remax.serving import JSON, GuardedHandler, GuardedServer, Refusal, ended_by_signals
from remax.untrusted import printable, shown

MAX_REQUEST_BYTES = 64 * 2**20
SECONDS_TO_SEND = 60.0
"""How long a client may take for its request, or to take the reply."""
MAX_CONNECTIONS = 64
"""How many clients may be served or waiting at once; more are told to come back."""

Scorer = Callable[[Sequence[Completion]], Sequence[float]]
"""Returns one reward per completion, NaN where there is none."""


def scorer(functions: Sequence[RewardFunction], weights: Sequence[float]) -> Scorer:
    """Returns what gives the weighted sum of these rewards. What functions log has no place on a server."""

    def total(completions: Sequence[Completion]) -> list[float]:
        totals = score(functions, weights, completions).total
        for function in functions:
            if isinstance(function, ProgrammedReward):
                function.pop_metrics()
                function.pop_extra()
        return totals

    return total


class RewardServer(GuardedServer):
    """Scores what clients send, one request after the other.

    server_address tells where it listens, serve_forever serves, shutdown (from another thread) ends that.
    """

    def __init__(
        self,
        score: Scorer,
        host: str,
        port: int,
        *,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        seconds_to_send: float = SECONDS_TO_SEND,
    ) -> None:
        """Listens, at port 0 on a free one. Clients must send the token of REMAX_REWARD_TOKEN, if that is set.

        Raises:
            UserError: it cannot listen there, or another machine could ask without a token.
        """
        self.score = score
        self.max_request_bytes = max_request_bytes
        self.seconds_to_send = seconds_to_send
        self.scoring = threading.Lock()
        self.free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(_Handler, host, port, secret=read_credential(TOKEN_VARIABLE), variable=TOKEN_VARIABLE)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serves a client in a thread, unless there are too many."""
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            with contextlib.suppress(OSError):
                request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves a client."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()


def serve(server: RewardServer) -> None:
    """Serves until Ctrl-C or SIGTERM. To be called in the main thread."""

    def stop() -> None:
        threading.Thread(target=server.shutdown, daemon=True).start()

    try:
        with ended_by_signals(stop):
            print(f"Rewards are served at {server.url}; set --reward_url {server.url}. Ctrl-C ends it.", flush=True)
            server.serve_forever(poll_interval=0.1)
    finally:
        server.server_close()
    print("The server has ended.", flush=True)


class _Handler(GuardedHandler):
    """One request of one client."""

    server: RewardServer

    def setup(self) -> None:
        super().setup()
        self.receiving = contextlib.ExitStack()
        self.receiving.enter_context(shut_after(self.connection, self.server.seconds_to_send))

    def finish(self) -> None:
        self.receiving.close()
        super().finish()

    def do_GET(self) -> None:
        self.answer(self._health)

    def do_POST(self) -> None:
        self.answer(self._rewards)

    def _health(self) -> dict[str, Any]:
        if self.path != "/health":
            raise Refusal(404, "there are only GET /health and POST /score")
        return {"status": "ok", "version": PROTOCOL_VERSION}

    def _rewards(self) -> dict[str, Any]:
        if self.path != "/score":
            raise Refusal(404, "there are only GET /health and POST /score")
        return {"version": PROTOCOL_VERSION, "rewards": self._score(parse_request(self._body()))}

    def _body(self) -> bytes:
        length = self.content_length(JSON, self.server.max_request_bytes)
        body = self.rfile.read(length)
        self.receiving.close()
        if len(body) < length:
            raise Refusal(408, "the request did not arrive in time and in full")
        return body

    def _score(self, completions: Sequence[Completion]) -> list[float | None]:
        try:
            with self.server.scoring:
                rewards = self.server.score(completions)
        except UserError as error:
            raise Refusal(500, str(error)) from None
        except Exception:
            print(printable(traceback.format_exc()), file=sys.stderr)
            raise Refusal(500, "scoring failed; the server's log says why") from None
        return [reward if math.isfinite(reward) else None for reward in rewards]

    def reply(self, status: int, content: dict[str, Any]) -> None:
        """Replies with JSON, in time."""
        self.receiving.close()
        with shut_after(self.connection, self.server.seconds_to_send):
            super().reply(status, content)


def parse_request(body: bytes) -> list[Completion]:
    """Returns the completions of a request, as reward models and functions take them.

    Raises:
        Refusal: it is not what the protocol says.
    """
    try:
        request = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is no JSON") from None
    if not isinstance(request, dict):
        raise Refusal(400, "the body is no JSON object")
    if type(request.get("version")) is not int or request["version"] != PROTOCOL_VERSION:
        raise Refusal(400, f"the version is {shown(request.get('version'), 30)}; this server speaks {PROTOCOL_VERSION}")
    known = ("version", "prompts", "completions", "completion_ids", "finished", "columns")
    for name in request:
        if name not in known:
            raise Refusal(400, f"{shown(name, 60)} is none of {', '.join(known)}")
    prompts = request.get("prompts")
    if not isinstance(prompts, list):
        raise Refusal(400, "prompts is no list")
    number = len(prompts)
    completions = _list(request, "completions", number)
    token_ids = _list(request, "completion_ids", number, default=[])
    finished = _list(request, "finished", number, default=True)
    columns = request.get("columns", {})
    if not isinstance(columns, dict):
        raise Refusal(400, "columns is no object")
    columns = {name: _list(columns, name, number) for name in columns}
    rows = []
    for row in range(number):
        if not isinstance(finished[row], bool):
            raise Refusal(400, f"finished[{row}] is neither true nor false")
        ids = token_ids[row]
        if not (isinstance(ids, list) and all(type(token) is int for token in ids)):
            raise Refusal(400, f"completion_ids[{row}] is no list of whole numbers")
        content = _prompt(prompts[row], row)
        prompt = Prompt(row, content, [], {name: values[row] for name, values in columns.items()})
        text = _text(completions[row], row, conversational=not isinstance(content, str))
        rows.append(Completion(prompt, 0, ids, [], not finished[row], text))
    return rows


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _list(content: dict[str, Any], name: str, number: int, *, default: Any = None) -> list[Any]:
    if name not in content and default is not None:
        return [default] * number
    values = content.get(name)
    if not isinstance(values, list) or len(values) != number:
        raise Refusal(400, f"{shown(name, 60)} is no list of {number}, one for each prompt")
    return values


def _prompt(content: Any, row: int) -> str | list[Message]:
    if isinstance(content, str):
        return content
    if not (isinstance(content, list) and content and all(_is_message(message) for message in content)):
        raise Refusal(400, f"prompts[{row}] is neither a text nor a list of messages with role and content")
    return content


def _text(content: Any, row: int, *, conversational: bool) -> str:
    """Returns the text of a completion that is one, or one message of the assistant."""
    if not conversational and isinstance(content, str):
        return content
    if conversational and isinstance(content, list) and len(content) == 1 and _is_message(content[0]):
        return str(content[0]["content"])
    what = "one message with role and content" if conversational else "a text"
    raise Refusal(400, f"completions[{row}] is not {what}, as its prompt wants")


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )

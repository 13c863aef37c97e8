"""A server that answers with the very bytes it is told to, for the tests of remote rewards."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from remax.interfaces import Completion, Prompt
from remax.rewards.remote import RemoteReward

Answer = bytes | Callable[[socket.socket], None]


def completion(prompt: Any, text: str, /, *, truncated: bool = False, **columns: Any) -> Completion:
    return Completion(Prompt(0, prompt, [7, 8], columns), 0, [9, 1], [-1.0, -1.0], truncated, text)


def two() -> list[Completion]:
    return [completion("p0", "a", answer="x"), completion("p1", "bb", answer="y", truncated=True)]


def reply(body: Any, status: str = "200 OK", *headers: str) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content


def rewards(*values: Any) -> bytes:
    return reply({"version": 1, "rewards": values})


class Server:
    """Answers with what it is given, one connection after the other; the last answer stays."""

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.ended = threading.Event()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                try:
                    self.requests.append(self.read(connection))
                    answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                    connection.sendall(answer) if isinstance(answer, bytes) else answer(connection)
                except OSError:
                    continue  # the client has gone

    def read(self, connection: socket.socket) -> tuple[str, dict[str, str], bytes]:
        file = connection.makefile("rb")
        line = file.readline().decode().strip()
        headers = {}
        while header := file.readline().decode().strip():
            name, _, value = header.partition(": ")
            headers[name.lower()] = value
        return line, headers, file.read(int(headers.get("content-length", 0)))


@contextmanager
def serving(*answers: Answer) -> Iterator[Server]:
    server = Server(list(answers))
    try:
        yield server
    finally:
        server.socket.close()


class Client:
    """A reward whose waits are recorded instead of waited."""

    def __init__(self, url: str, timeout_seconds: float = 5.0, jitter: float = 0.0) -> None:
        self.waits: list[float] = []
        self.reward = RemoteReward(url, timeout_seconds=timeout_seconds, sleep=self.waits.append, jitter=lambda: jitter)


def sleeps(connection: socket.socket) -> None:
    time.sleep(1.0)


def drips(head: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(50):
            time.sleep(0.02)
            connection.sendall(b" ")

    return answer


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n[")
    while True:
        connection.sendall(b"0," * 10000)


def endless_chunks(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")

"""What the servers of rewards and of vLLM have in common: whom they answer, what they refuse, and how they end."""

import contextlib
import hmac
import ipaddress
import json
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from remax.errors import UserError
from remax.untrusted import printable, shown

JSON = "application/json"


class Refusal(Exception):
    """A request is answered with an error; the message is its reason, in one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class GuardedServer(ThreadingHTTPServer):
    """Answers this machine, and others only if they send a secret; each request in a thread of its own."""

    daemon_threads = True

    def __init__(
        self,
        handler: type["GuardedHandler"],
        host: str,
        port: int,
        *,
        secret: str | None,
        variable: str,
        danger: str = "use the server",
    ) -> None:
        """Listens, at port 0 on a free one.

        Args:
            secret: what clients have to send, if it is not None.
            variable: the environment variable that it was read from.
            danger: what everybody could do without it.

        Raises:
            UserError: it cannot listen there, or another machine could ask without a secret.
        """
        self.secret = secret
        if secret is None and not is_loopback(host):
            raise UserError(
                f"--host is {shown(host)}: everybody who reaches this machine could {danger}; set the environment "
                f"variable {variable} here and where the training runs, or --host 127.0.0.1."
            )
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), handler)
        except (OSError, OverflowError, TypeError, ValueError) as error:
            raise UserError(
                f"--host is {shown(host)} and --port {port}: the server cannot listen there ({shown(error)}); set "
                "others."
            ) from None

    @property
    def url(self) -> str:
        """Where clients find it."""
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}" if self.address_family == socket.AF_INET6 else f"http://{host!s}:{port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says in a line what broke a connection: most often the client left."""
        print(f"A connection broke ({shown(sys.exc_info()[1])}).", file=sys.stderr, flush=True)


class GuardedHandler(BaseHTTPRequestHandler):
    """One request of one client; answers, and refusals, are JSON."""

    server: GuardedServer
    server_version, sys_version = "remax", ""
    credential_name = "token"

    def answer(self, find: Callable[[], dict[str, Any]]) -> None:
        """Replies with what `find` returns to a client that may ask, or with what goes wrong."""
        try:
            self._check_client()
            self.reply(200, find())
        except Refusal as refusal:
            self.send_error(refusal.status, str(refusal))
        except OSError:
            raise  # The client is gone, or the disk is full; handle_error says so.
        except Exception as error:
            print(printable(traceback.format_exc()), file=sys.stderr)
            self.send_error(500, f"{type(error).__name__}: {error}")

    def _check_client(self) -> None:
        secret, name = self.server.secret, self.credential_name
        # A web page whose own name was made to lead to 127.0.0.1 (DNS rebinding) has no secret, and sends that name.
        if secret is None and not all(map(names_loopback, self.headers.get_all("Host", []))):
            raise Refusal(403, f"the Host header is neither localhost nor a loopback address, and there is no {name}")
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if secret is not None and not hmac.compare_digest(given, f"Bearer {secret}".encode()):
            raise Refusal(401, f"the {name} is missing or wrong")

    def content_length(self, kind: str, at_most: int) -> int:
        """Returns how many bytes of a type follow.

        Raises:
            Refusal: they are of another type, too many, or not counted.
        """
        # A web page may send other types to 127.0.0.1 without asking the browser's user.
        if self.headers.get_content_type() != kind:
            raise Refusal(415, f"the Content-Type is not {kind}")
        length = self.headers.get("Content-Length")
        if length is None:
            raise Refusal(411, "there is no Content-Length")
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            raise Refusal(400, "the Content-Length is no number")
        if int(length) > at_most:
            raise Refusal(413, f"the request is longer than {at_most} bytes")
        return int(length)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Replies with an error, as JSON."""
        reason = shown(message or self.responses.get(code, ("error",))[0], 400)
        print(f"Refused a request with {code}: {reason}.", file=sys.stderr, flush=True)
        self.reply(code, {"error": reason})

    def reply(self, status: int, content: dict[str, Any]) -> None:
        """Replies with JSON, and ends the connection."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", JSON)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing of requests that are served."""


def is_loopback(host: str) -> bool:
    """Whether a name or address is of this machine for itself alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names_loopback(host: str) -> bool:
    """Whether a Host header, with or without a port, is a name of this machine for itself."""
    try:
        return is_loopback(urlsplit(f"//{host.strip()}").hostname or "")
    except ValueError:
        return False


@contextlib.contextmanager
def ended_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM end what is served, by a call of `stop`. To be used in the main thread."""
    former = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)

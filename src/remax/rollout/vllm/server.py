"""vLLM behind HTTP for trainings with --vllm_mode server: `remax serve-vllm`.

    GET  /health                  which model, how long, and the stamp of the weights it holds
    PUT  /weights/{stamp}/{part}  a part of new weights, as a safetensors file
    POST /load                    takes the parts; rows that are being drawn are finished first
    POST /draw                    rows of token ids in, token ids and log-probabilities out

A stamp names the weights of one run at one version. Rows are drawn with the weights that they ask for, or not at all.
"""

import contextlib
import hmac
import ipaddress
import json
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from remax.config.vllm import KEY_VARIABLE, ServeVLLMConfig, read_key
from remax.errors import UserError
from remax.interfaces import Sampling
from remax.rollout.vllm.client import JSON, PROTOCOL_VERSION, TENSORS
from remax.rollout.vllm.drawing import Drawing, OtherWeights
from remax.rollout.vllm.engine import Request, describe_model
from remax.rollout.vllm.local import LocalVLLM, make_llm
from remax.untrusted import printable, shown

STAMP = re.compile(r"[0-9a-f]{8,64}-[0-9]{1,18}")
WEIGHTS = re.compile(rf"/weights/({STAMP.pattern})/([1-9][0-9]{{0,5}})")
MAX_REQUEST_BYTES = 256 * 2**20
"""Of JSON; weights are limited by the disk."""
PIECE_BYTES = 2**20
SECONDS_OF_SILENCE = 60.0
"""How long a client may send or take nothing."""


class Refusal(Exception):
    """A request is answered with an error; the message is its reason, in one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def run_server(model: str, args: ServeVLLMConfig) -> None:
    """Serves a model until Ctrl-C or SIGTERM. To be called in the main thread.

    Raises:
        UserError: the server cannot listen, or vLLM cannot run the model or broke.
    """
    # It listens before the imports that take seconds: a port that is taken is found early, and clients may wait.
    server = VLLMServer(args.host, args.port)
    try:
        llm = make_llm(
            model, args, dtype=args.dtype, flag=f"--model is {model}", max_model_len=args.vllm_max_model_length
        )
        server.serve(llm)
    finally:
        server.close()


class VLLMServer(ThreadingHTTPServer):
    """Listens from the start; answers when it is given a model, with `serve`."""

    daemon_threads = True
    drawing: Drawing
    health: dict[str, Any]

    def __init__(self, host: str, port: int) -> None:
        """Listens, at port 0 on a free one. Clients must send the key of VLLM_API_KEY, if that is set.

        Raises:
            UserError: it cannot listen there, or another machine could ask without a key.
        """
        self.key = read_key()
        if self.key is None and not _is_loopback(host):
            raise UserError(
                f"--host is {shown(host)}: everybody who reaches this machine could use the server and replace its "
                f"weights; set the environment variable {KEY_VARIABLE} here and where the training runs, or --host "
                "127.0.0.1."
            )
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--host is {shown(host)} and --port {port}: the server cannot listen there ({shown(error)}); set "
                "others."
            ) from None
        self.folder = Path(tempfile.mkdtemp(prefix="remax-vllm-"))
        """Where weights arrive."""

    @property
    def url(self) -> str:
        """Where clients find it."""
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}" if self.address_family == socket.AF_INET6 else f"http://{host!s}:{port}"

    def begin(self, llm: Any) -> Drawing:
        """Answers from now on, in threads of its own; returns what has to draw, by `run`."""
        config = llm.model_config
        self.drawing = Drawing(LocalVLLM(llm))
        self.health = {
            "model": describe_model(config.hf_config),
            "max_model_length": config.max_model_len,
            "dtype": str(config.dtype).removeprefix("torch."),
        }
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        return self.drawing

    def serve(self, llm: Any) -> None:
        """Serves until Ctrl-C or SIGTERM, drawing in this thread, which has to be the main one.

        Raises:
            UserError: vLLM broke.
        """
        drawing = self.begin(llm)
        former = {n: signal.signal(n, lambda *_: drawing.stop()) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            print(f"vLLM serves at {self.url}; set --rollout_engine vllm --vllm_mode server ", end="")
            print(f"--vllm_server_base_url {self.url}. Ctrl-C ends it.", flush=True)
            drawing.run()
        except Exception as error:
            print(printable(traceback.format_exc()), file=sys.stderr)
            raise UserError(f"vLLM broke ({shown(error, 200)}): the server has ended; start it again.") from error
        finally:
            self.shutdown()
            for number, handler in former.items():
                signal.signal(number, handler)
        print("The server has ended.", flush=True)

    def close(self) -> None:
        """Stops listening, and removes the weights that arrived."""
        self.server_close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says in a line what broke a connection: most often the client left."""
        print(f"A connection broke ({shown(sys.exc_info()[1])}).", file=sys.stderr, flush=True)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _names_loopback(host: str) -> bool:
    """Whether a Host header, with or without a port, is a name of this machine for itself."""
    try:
        return _is_loopback(urlsplit(f"//{host.strip()}").hostname or "")
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    """One request of one client."""

    server: VLLMServer
    server_version, sys_version = "remax", ""
    timeout = SECONDS_OF_SILENCE

    def do_GET(self) -> None:
        with self._refusals():
            self._check_client()
            if self.path != "/health":
                raise Refusal(404, "there is no such address")
            self._reply(200, {"version": PROTOCOL_VERSION, "holds": self.server.drawing.holds, **self.server.health})

    def do_PUT(self) -> None:
        with self._refusals():
            self._check_client()
            match = WEIGHTS.fullmatch(self.path)
            if match is None:
                raise Refusal(404, "there is no such address")
            length = self._length(TENSORS)
            path = self.server.folder / match[1] / f"{int(match[2]):06}.safetensors"
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                while length > 0:
                    piece = self.rfile.read(min(length, PIECE_BYTES))
                    if not piece:
                        raise Refusal(400, "the weights did not arrive in full")
                    _write(file, piece)
                    length -= len(piece)
            self._reply(200, {})

    def do_POST(self) -> None:
        with self._refusals():
            self._check_client()
            if self.path not in ("/draw", "/load"):
                raise Refusal(404, "there is no such address")
            content = self._content()
            self._reply(200, self._draw(content) if self.path == "/draw" else self._load(content))

    def _draw(self, content: dict[str, Any]) -> dict[str, Any]:
        request = parse_request(content)
        try:
            return {"rows": self.server.drawing.draw(request)}
        except OtherWeights as error:
            raise Refusal(409, str(error)) from None
        except ValueError as error:
            raise Refusal(400, str(error)) from None

    def _load(self, content: dict[str, Any]) -> dict[str, Any]:
        stamp, parts = content.get("stamp"), content.get("parts")
        if not isinstance(stamp, str) or not STAMP.fullmatch(stamp) or type(parts) is not int:
            raise Refusal(400, "there are no stamp and number of parts")
        folder = self.server.folder / stamp
        if self.server.drawing.holds == stamp:  # The answer to a former attempt was lost.
            return {"holds": stamp}
        if sorted(path.name for path in folder.glob("*")) != [f"{n:06}.safetensors" for n in range(1, parts + 1)]:
            raise Refusal(409, "it was restarted while weights were sent")
        try:
            self.server.drawing.load(str(folder), stamp)
        except UserError as error:
            raise Refusal(400, str(error)) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return {"holds": stamp}

    def _check_client(self) -> None:
        key = self.server.key
        # A web page whose own name was made to lead to 127.0.0.1 (DNS rebinding) has no key, and sends that name.
        if key is None and not all(map(_names_loopback, self.headers.get_all("Host", []))):
            raise Refusal(403, "the Host header is neither localhost nor a loopback address, and there is no key")
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if key is not None and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise Refusal(401, "the key is missing or wrong")

    def _length(self, kind: str) -> int:
        # A web page may send other types to 127.0.0.1 without asking the browser's user.
        if self.headers.get_content_type() != kind:
            raise Refusal(415, f"the Content-Type is not {kind}")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 16):
            raise Refusal(411, "the Content-Length is no number")
        return int(length)

    def _content(self) -> dict[str, Any]:
        length = self._length(JSON)
        if length > MAX_REQUEST_BYTES:
            raise Refusal(413, f"the request is longer than {MAX_REQUEST_BYTES} bytes")
        try:
            content = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError):
            raise Refusal(400, "the body is no JSON") from None
        if not isinstance(content, dict):
            raise Refusal(400, "the body is no JSON object")
        return content

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except Refusal as refusal:
            self.send_error(refusal.status, str(refusal))
        except OSError:
            raise  # The client is gone, or the disk is full; handle_error says so.
        except Exception as error:
            print(printable(traceback.format_exc()), file=sys.stderr)
            self.send_error(500, f"{type(error).__name__}: {error}")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Replies with an error, as JSON."""
        reason = shown(message or self.responses.get(code, ("error",))[0], 400)
        print(f"Refused a request with {code}: {reason}.", file=sys.stderr, flush=True)
        self._reply(code, {"error": reason})

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", JSON)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing of requests that are served."""


def _write(file: BinaryIO, piece: bytes) -> None:
    try:
        file.write(piece)
    except OSError as error:
        raise Refusal(507, f"weights cannot be stored: {error}") from None


def parse_request(content: dict[str, Any]) -> Request:
    """Returns what a client wants to be drawn.

    Raises:
        Refusal: it is not what the protocol says.
    """
    if content.get("version") != PROTOCOL_VERSION:
        raise Refusal(400, f"the version is {shown(content.get('version'), 30)}; this server speaks {PROTOCOL_VERSION}")
    try:
        prompts, rows = content["prompts"], [tuple(row) for row in content["rows"]]
        numbers = [token for prompt in prompts for token in prompt] + [number for number, _ in rows]
        numbers += [seed for _, seed in rows if seed is not None] + content["eos_token_ids"]
        if not all(type(number) is int and number >= 0 for number in numbers) or not all(prompts):
            raise ValueError
        if any(number >= len(prompts) for number, _ in rows):
            raise ValueError
        sampling = Sampling(
            max_completion_length=int(content["max_completion_length"]),
            eos_token_ids=tuple(content["eos_token_ids"]),
            temperature=float(content["temperature"]),
            top_p=float(content["top_p"]),
            top_k=int(content["top_k"]),
        )
        return Request(prompts, rows, sampling, str(content["stamp"]))
    except (KeyError, TypeError, ValueError):
        raise Refusal(400, "the prompts, rows or sampling settings are not what the protocol says") from None

"""vLLM behind HTTP for trainings with --vllm_mode server: `remax serve-vllm`.

    GET  /health                  which model, how long, and the stamp of the weights it holds
    PUT  /weights/{stamp}/{part}  a part of new weights, as a safetensors file
    POST /load                    takes the parts; rows that are being drawn are finished first
    POST /draw                    rows of token ids in, token ids and log-probabilities out

A stamp names the weights of one run at one version. Rows are drawn with the weights that they ask for, or not at all.
"""

import json
import re
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from remax.config.vllm import KEY_VARIABLE, ServeVLLMConfig
from remax.credentials import read_credential
from remax.errors import UserError
from remax.interfaces import Sampling
from remax.rollout.vllm.client import PROTOCOL_VERSION, TENSORS
from remax.rollout.vllm.drawing import Drawing, OtherWeights
from remax.rollout.vllm.engine import Request, describe_model
from remax.rollout.vllm.local import LocalVLLM, make_llm
from remax.serving import JSON, GuardedHandler, GuardedServer, Refusal, ended_by_signals
from remax.untrusted import printable, shown

STAMP = re.compile(r"[0-9a-f]{8,64}-[0-9]{1,18}")
WEIGHTS = re.compile(rf"/weights/({STAMP.pattern})/([1-9][0-9]{{0,5}})")
MAX_REQUEST_BYTES = 256 * 2**20
"""Of JSON."""
MAX_WEIGHT_BYTES = 2**50
"""Of a part of the weights: the disk is the limit."""
PIECE_BYTES = 2**20
SECONDS_OF_SILENCE = 60.0
"""How long a client may send or take nothing."""


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


class VLLMServer(GuardedServer):
    """Listens from the start; answers when it is given a model, with `serve`."""

    drawing: Drawing
    health: dict[str, Any]

    def __init__(self, host: str, port: int) -> None:
        """Listens, at port 0 on a free one. Clients must send the key of VLLM_API_KEY, if that is set.

        Raises:
            UserError: it cannot listen there, or another machine could ask without a key.
        """
        danger = "use the server and replace its weights"
        super().__init__(
            _Handler, host, port, secret=read_credential(KEY_VARIABLE), variable=KEY_VARIABLE, danger=danger
        )
        self.folder = Path(tempfile.mkdtemp(prefix="remax-vllm-"))
        """Where weights arrive."""
        self.pushing = threading.Lock()
        """Held by whoever loads weights or removes some: none are removed while they are loaded, nor loaded twice."""

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
        try:
            with ended_by_signals(drawing.stop):
                print(f"vLLM serves at {self.url}; set --rollout_engine vllm --vllm_mode server ", end="")
                print(f"--vllm_server_base_url {self.url}. Ctrl-C ends it.", flush=True)
                drawing.run()
        except Exception as error:
            print(printable(traceback.format_exc()), file=sys.stderr)
            raise UserError(f"vLLM broke ({shown(error, 200)}): the server has ended; start it again.") from error
        finally:
            self.shutdown()
        print("The server has ended.", flush=True)

    def close(self) -> None:
        """Stops listening, and removes the weights that arrived."""
        self.server_close()
        shutil.rmtree(self.folder, ignore_errors=True)


class _Handler(GuardedHandler):
    """One request of one client."""

    server: VLLMServer
    credential_name = "key"
    timeout = SECONDS_OF_SILENCE

    def do_GET(self) -> None:
        self.answer(self._health)

    def do_PUT(self) -> None:
        self.answer(self._take_weights)

    def do_POST(self) -> None:
        self.answer(lambda: self._method()(self._content()))

    def _method(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        methods = {"/draw": self._draw, "/load": self._load}
        if self.path not in methods:
            raise Refusal(404, "there is no such address")
        return methods[self.path]

    def _health(self) -> dict[str, Any]:
        if self.path != "/health":
            raise Refusal(404, "there is no such address")
        drawing = self.server.drawing
        state = {"holds": drawing.holds, "busy_seconds": round(drawing.busy_seconds, 3)}
        return {"version": PROTOCOL_VERSION, **state, **self.server.health}

    def _take_weights(self) -> dict[str, Any]:
        match = WEIGHTS.fullmatch(self.path)
        if match is None:
            raise Refusal(404, "there is no such address")
        length = self.content_length(TENSORS, MAX_WEIGHT_BYTES)
        folder, part = self.server.folder / match[1], int(match[2])
        if part == 1:
            self._make_room(folder)
        folder.mkdir(exist_ok=True)
        # Elsewhere until it is whole: the same part may be on its way twice, if an answer was lost.
        with tempfile.TemporaryDirectory(dir=folder) as arriving:
            path = Path(arriving) / f"{part:06}.safetensors"
            with path.open("wb") as file:
                while length > 0:
                    piece = self.rfile.read(min(length, PIECE_BYTES))
                    if not piece:
                        raise Refusal(400, "the weights did not arrive in full")
                    _write(file, piece)
                    length -= len(piece)
            path.replace(folder / path.name)
        return {}

    def _make_room(self, folder: Path) -> None:
        """Removes what has arrived of other pushes: they were broken off."""
        with self.server.pushing:
            for other in self.server.folder.iterdir():
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)

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
        with self.server.pushing:
            self._load_once(self.server.folder / stamp, stamp, parts)
        return {"holds": stamp}

    def _load_once(self, folder: Path, stamp: str, parts: int) -> None:
        """Loads the weights of a folder and removes it, unless they are loaded already."""
        if self.server.drawing.holds == stamp:  # The answer to a former attempt was lost.
            return
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if names != [f"{number:06}.safetensors" for number in range(1, parts + 1)]:
            raise Refusal(409, "it was restarted while weights were sent, or got those of another training")
        try:
            self.server.drawing.load(str(folder), stamp)
        except UserError as error:
            raise Refusal(400, str(error)) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _content(self) -> dict[str, Any]:
        length = self.content_length(JSON, MAX_REQUEST_BYTES)
        try:
            content = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError):
            raise Refusal(400, "the body is no JSON") from None
        if not isinstance(content, dict):
            raise Refusal(400, "the body is no JSON object")
        return content


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

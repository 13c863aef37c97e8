"""vLLM, beside a training and behind a server, for their tests."""

import threading
from typing import Any

import pytest
import torch

from engine_conformance import SAMPLING, make_prompts
from remax.config import VLLMOptions
from remax.rollout.vllm.client import RemoteVLLM
from remax.rollout.vllm.engine import VLLMEngine
from remax.rollout.vllm.local import colocate
from remax.rollout.vllm.server import VLLMServer
from tiny_models import tiny_model

RUN = "0123456789abcdef"


def colocated(model: Any, **settings: Any) -> Any:
    args = VLLMOptions(**settings)
    return colocate(model, args, dtype="float32", max_length=64, device=torch.device("cpu"), num_processes=1)


def draw(engine: VLLMEngine, **settings: Any) -> Any:
    settings = {"num_samples": 2, "greedy": True, "seed": 0, "step": 0, **settings}
    return engine.generate(make_prompts(), SAMPLING, **settings)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


class Served:
    """A server in this process, which can be ended and started again at the same port."""

    def __init__(self, model: Any) -> None:
        self.model, self.port = model, 0
        self.start()

    def start(self) -> None:
        self.server = VLLMServer("127.0.0.1", self.port)
        self.port = self.server.server_address[1]
        self.llm = colocated(self.model).llm
        self.drawing = self.server.begin(self.llm)
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        try:
            self.drawing.run()
        except RuntimeError as error:
            self.broke = str(error)

    def end(self) -> None:
        self.server.shutdown()
        self.drawing.stop()
        self.server.close()

    def engine(self, *, run: str = RUN, sends: bool = True, **settings: Any) -> VLLMEngine:
        return VLLMEngine(self.remote(**settings), vocab_size=97, run_id=run, sends=sends)

    def remote(self, **settings: Any) -> RemoteVLLM:
        """A client whose time passes only as it waits, and in `self.waits`."""
        self.waits: list[float] = []
        passing = {"sleep": self.waits.append, "clock": lambda: sum(self.waits)}
        settings = {"timeout_seconds": 4.0, "jitter": lambda: 0.0, **passing, **settings}
        return RemoteVLLM(self.server.url, **settings)

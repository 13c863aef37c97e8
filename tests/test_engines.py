"""The suite that every rollout engine must pass, on the CPU; continuous batching runs there too.

vLLM itself is tested in tests/with_vllm; here a stand-in takes its calls, in this process and behind the real server.
"""

import threading
from typing import Any

import pytest
import torch

from remax.config import VLLMOptions
from remax.interfaces import EngineWithWeights, RolloutEngine
from remax.rollout.embedded import EmbeddedEngine
from remax.rollout.gathered import GatheredEngine
from remax.rollout.paged import PagedEngine
from remax.rollout.vllm.client import RemoteVLLM
from remax.rollout.vllm.engine import VLLMEngine
from remax.rollout.vllm.local import colocate
from remax.rollout.vllm.server import VLLMServer

pytest.register_assert_rewrite("engine_conformance")

from engine_conformance import ConformanceWithWeights, EngineConformance  # noqa: E402
from fake_vllm import fake_vllm  # noqa: E402, F401


class TestEmbedded(EngineConformance):
    def make(self, model: Any, max_rows: int = 0) -> RolloutEngine:
        return EmbeddedEngine(model, pad_token_id=0, max_rows=max_rows)


class TestPaged(EngineConformance):
    @pytest.fixture(autouse=True)
    def _without_trying_out(self, monkeypatch):
        """It would double the time; tests/test_paged.py tests it."""
        monkeypatch.setattr(PagedEngine, "_try_out", lambda self: None)

    def make(self, model: Any, max_rows: int = 0) -> RolloutEngine:
        return PagedEngine(model, max_rows=max_rows)


class TestGathered(ConformanceWithWeights):
    def make_bare(self, model: Any) -> EngineWithWeights:
        def embedded(own: Any) -> RolloutEngine:
            return EmbeddedEngine(own, pad_token_id=0)

        return GatheredEngine(model, embedded, torch.device("cpu"), half=False)


def _colocated(model: Any) -> Any:
    return colocate(model, VLLMOptions(), dtype="float32", max_length=64, device=torch.device("cpu"), num_processes=1)


@pytest.mark.usefixtures("fake_vllm")
class TestColocatedVLLM(ConformanceWithWeights):
    def make_bare(self, model: Any) -> EngineWithWeights:
        return VLLMEngine(_colocated(model), vocab_size=97, run_id="0123456789abcdef", sends=True)


class TestServedVLLM(ConformanceWithWeights):
    @pytest.fixture(autouse=True)
    def _servers(self, fake_vllm):  # noqa: F811
        self.servers: list[VLLMServer] = []
        yield
        for server in self.servers:
            server.shutdown()
            server.drawing.stop()
            server.close()

    def make_bare(self, model: Any) -> EngineWithWeights:
        self.servers.append(VLLMServer("127.0.0.1", 0))
        drawing = self.servers[-1].begin(_colocated(model).llm)
        threading.Thread(target=drawing.run, daemon=True).start()
        remote = RemoteVLLM(self.servers[-1].url, timeout_seconds=1.0)
        return VLLMEngine(remote, vocab_size=97, run_id="0123456789abcdef", sends=True)

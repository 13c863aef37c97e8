"""The suite that every rollout engine must pass, on the CPU; continuous batching runs there too."""

from typing import Any

import pytest

from remax.interfaces import RolloutEngine
from remax.rollout.embedded import EmbeddedEngine
from remax.rollout.paged import PagedEngine

pytest.register_assert_rewrite("engine_conformance")

from engine_conformance import EngineConformance  # noqa: E402


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

"""Stands in for the package vllm where it is not installed: the same calls, on a transformers model.

It does what an engine of ours could get wrong unnoticed: what it computed with former weights stays in use until its
prefix cache is reset, and asleep it has neither weights nor answers.
"""

import copy
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from remax.interfaces import Sampling
from remax.logprobs import warp_logits


@dataclass
class SamplingParams:
    """Those that ours are made of; the defaults are vLLM's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    detokenize: bool = True
    logprobs: int | None = None
    output_kind: str = "cumulative"


@dataclass
class _Row:
    prompt: list[int]
    params: SamplingParams
    generator: torch.Generator
    token_ids: list[int]
    logprobs: list[dict[int, Any]]

    @property
    def finished(self) -> bool:
        ends = self.token_ids[-1:] and self.token_ids[-1] in self.params.stop_token_ids
        return bool(ends) or len(self.token_ids) >= self.params.max_tokens


class LLMEngine:
    """What an LLM draws with, token by token."""

    def __init__(self, config: Any, max_model_len: int) -> None:
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.cached = self.model
        """What is drawn from: the weights of the last reset."""
        self.max_model_len = max_model_len
        self.asleep: set[str] = set()
        self.rows: dict[str, _Row] = {}
        self.num_rows_at_once = 0
        self.engine_core = self
        self.ended = False

    def shutdown(self) -> None:
        self.ended = True

    def add_request(self, name: str, prompt: dict[str, list[int]], params: SamplingParams) -> str:
        # Without a tokenizer, vLLM does not mind tokens that do not exist.
        ids = [token % self.model.config.get_text_config().vocab_size for token in prompt["prompt_token_ids"]]
        if len(ids) >= self.max_model_len:
            raise ValueError(f"The prompt (length {len(ids)}) is longer than {self.max_model_len}")
        assert params.ignore_eos
        assert params.logprobs == 0
        generator = torch.Generator().manual_seed(params.seed or 0)
        self.rows[name] = _Row(ids, params, generator, [], [])
        return f"{name}-suffix"

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            self.rows.pop(name, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.rows)

    @torch.no_grad()
    def step(self) -> list[Any]:
        assert not self.asleep
        rows = list(self.rows.values())
        self.num_rows_at_once = max(self.num_rows_at_once, len(rows))
        sequences = [row.prompt + row.token_ids for row in rows]
        width = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
        logits = self.cached(input_ids=ids, attention_mask=mask).logits.float()
        for row, sequence, own in zip(rows, sequences, logits, strict=True):
            self._extend(row, own[len(sequence) - 1])
        finished = {name: row for name, row in self.rows.items() if row.finished}
        for name in finished:
            del self.rows[name]
        return [
            SimpleNamespace(
                request_id=name, finished=True, outputs=[SimpleNamespace(token_ids=r.token_ids, logprobs=r.logprobs)]
            )
            for name, r in finished.items()
        ]

    def _extend(self, row: _Row, logits: torch.Tensor) -> None:
        params = row.params
        greedy = params.temperature == 0
        warped = Sampling(1, (), temperature=1.0 if greedy else params.temperature)
        if not greedy:
            warped = Sampling(1, (), temperature=params.temperature, top_p=params.top_p, top_k=params.top_k)
        logprobs = warp_logits(logits[None], warped).log_softmax(-1)[0]
        race = torch.empty_like(logprobs).exponential_(generator=row.generator)
        token = int(logits.argmax() if greedy else (logprobs.exp() / race).argmax())
        row.token_ids.append(token)
        row.logprobs.append({token: SimpleNamespace(logprob=logprobs[token].item())})


class LLM:
    """As vllm.LLM."""

    made: ClassVar[list["LLM"]] = []
    """All of them, for tests to look at."""
    takes_weights = True

    def __init__(self, model: str, **settings: Any) -> None:
        torch.manual_seed(0)  # As vLLM does.
        self.settings, self.calls = settings, []
        config = AutoConfig.from_pretrained(model)
        if getattr(config, "model_type", "") == "bloom":
            raise ValueError("Model architectures ['BloomForCausalLM'] are not supported for now.")
        length = settings.get("max_model_len") or config.max_position_embeddings
        dtype = getattr(torch, settings["dtype"])
        self.model_config = SimpleNamespace(hf_config=config, max_model_len=length, dtype=dtype)
        self.llm_engine = LLMEngine(config, length)
        LLM.made.append(self)

    def generate(self, prompts: list[Any], params: list[SamplingParams], use_tqdm: bool = True) -> list[Any]:
        assert not use_tqdm
        assert not torch.is_autocast_enabled("cpu")
        self.calls.append("generate")
        torch.rand(7)  # vLLM draws noise for all rows from the global generator before it takes their own.
        for number, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            self.llm_engine.add_request(str(number), prompt, own)
        outputs: dict[str, Any] = {}
        while self.llm_engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in self.llm_engine.step()}
        return [outputs[str(number)] for number in range(len(prompts))]

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[None]:
        self.calls.append(method)
        assert "weights" not in self.llm_engine.asleep
        weights = args[0]
        if method == "remax_load_files":
            paths = sorted(Path(weights).glob("*.safetensors"))
            weights = (item for path in paths for item in load_file(path).items())
        engine = self.llm_engine
        engine.cached = copy.deepcopy(engine.model)
        known = engine.model.state_dict()
        for name, tensor in weights:
            if LLM.takes_weights:
                known[name].copy_(tensor)
        return [None]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        self.llm_engine.cached = self.llm_engine.model
        return True

    def sleep(self, level: int = 1) -> None:
        assert self.settings.get("enable_sleep_mode")
        self.calls.append(f"sleep {level}")
        self.llm_engine.asleep = {"weights", "kv_cache"}
        for tensor in self.llm_engine.model.state_dict().values():
            tensor.fill_(torch.nan)

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake_up {' '.join(tags)}")
        self.llm_engine.asleep -= set(tags)


@pytest.fixture
def fake_vllm(monkeypatch):
    """Makes `import vllm` import this; returns its LLM."""
    package, params = types.ModuleType("vllm"), types.ModuleType("vllm.sampling_params")
    package.LLM, package.SamplingParams = LLM, SamplingParams
    params.RequestOutputKind = SimpleNamespace(FINAL_ONLY="final")
    package.__spec__ = types.SimpleNamespace(name="vllm")
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    monkeypatch.setattr(LLM, "made", [])
    monkeypatch.setattr(LLM, "takes_weights", True)
    for name in ("ENABLE_V1_MULTIPROCESSING", "LOGGING_LEVEL", "CPU_KVCACHE_SPACE", "CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(f"VLLM_{name}", "kept")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return LLM

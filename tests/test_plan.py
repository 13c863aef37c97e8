"""`remax plan`: bytes against real tensors, and peaks against runs."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from planning import GIB, LLAMA_2_7B, P7, STEP, plan_of, settings, write_seven
from remax import models
from remax.compare.measure import LiveTensors, Transients, num_bytes
from remax.interfaces import Sampling
from remax.optimisers import make_optimizer
from remax.plan import formulas
from remax.plan.after import describe_peaks
from remax.plan.networks import count_network, measure_networks, networks_of, networks_of_configs
from remax.plan.phases import HEAP_LIMIT, Device, Moment, Workload, moments, predict
from remax.plan.ratios import llama, llama_networks
from remax.plan.sharding import Split
from remax.rollout.draw import choose
from remax.trainer import ReMaxTrainer
from tiny_models import tiny_model
from toy_tokenizers import BOS, EOS, PAD, toy_tokenizer


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of Llama-2-7B and nothing else."""
    return write_seven(tmp_path_factory.mktemp("llama-2-7b"))


# Static bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt", "gemma2"])
def test_networks_without_weights_count_like_real_ones(architecture: str, use_peft: bool) -> None:
    args = settings(use_peft=use_peft)
    real = tiny_model(architecture)
    config = real.config
    built = networks_of_configs(config, None, args)
    assert {p.device.type for network in built.values() for p in network.parameters()} <= {"meta", "cpu"}
    policy = models.add_adapter(real, args) if use_peft else real
    assert count_network("policy", built["policy"], args) == count_network("policy", policy, args)
    assert list(built) == (["policy"] if use_peft else ["policy", "reference"])


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adafactor", "adamw_torch_8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_gradients_and_states_are_exact(optim: Any, dtype: Any) -> None:
    args = settings(optim=optim, dtype=dtype)
    model = tiny_model("llama", hidden_size=64, vocab_size=128, intermediate_size=96).to(getattr(torch, dtype))
    own = count_network("policy", model, args)
    assert num_bytes(model.parameters()) == formulas.weight_bytes("policy", own, args)
    if optim == "adamw_torch_8bit":
        pytest.importorskip("torchao")
        from torchao.optim import AdamW8bit

        optimizer: Any = AdamW8bit(model.parameters())
        tensors = []
        for p in model.parameters():  # As its step makes them; the step itself would be compiled.
            for state in (optimizer._new_buffer(p, True), optimizer._new_buffer(p, False)):
                tensors += [state.codes, state.scale, state.qmap] if hasattr(state, "codes") else [state]
            tensors.append(torch.zeros(()))
        assert any(tensor.dtype == torch.uint8 for tensor in tensors)
        assert any(tensor.dtype == getattr(torch, dtype) for tensor in tensors)  # Norms are too small for 8 bits.
    else:
        optimizer = make_optimizer(model, args)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        assert num_bytes(p.grad for p in model.parameters()) == formulas.total(formulas.gradients(own, args))
        optimizer.step()
        tensors = [s for state in optimizer.state.values() for s in state.values() if isinstance(s, torch.Tensor)]
    # Addresses of empty or equal storages aside, each tensor counts.
    measured = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert measured == formulas.state_bytes(own, args)


def test_a_published_model_is_counted_from_its_config_alone(seven: Path) -> None:
    plan = plan_of(seven, device_memory="80GB", args={"method": "ppo"})
    body = P7 - 32000 * 4096
    expected = {"policy": P7, "reference": P7, "reward": body + 4096, "value": body + 4096 + 1}
    assert plan.parameters == expected
    update = plan.peaks["update"]
    assert update.weights == 4 * sum(expected.values())
    by_tensor = 4 * (32 * 9 + 3) + 4 * (32 * 9 + 2 + 2)
    assert update.optimiser == 8 * (expected["policy"] + expected["value"]) + by_tensor


@pytest.mark.parametrize("method", ["remax", "ppo"])
def test_shapes_by_count_are_those_that_are_built(method: Any) -> None:
    args = settings(method=method)
    config = LlamaConfig(**{name: value for name, value in LLAMA_2_7B.items() if name != "model_type"})
    built = measure_networks(networks_of_configs(config, config, args), args)
    counted = llama_networks("7B", args)
    assert list(built) == list(counted)
    for name, network in counted.items():
        assert network.widths == built[name].widths
        theirs, ours = vars(built[name].counts), vars(network.counts)
        assert sorted(ours.pop("trained_tensors"), key=str) == sorted(theirs.pop("trained_tensors"), key=str), name
        assert ours == theirs, name


# Phases ---------------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
"""58 million parameters, with a vocabulary of 32000."""


def save_pair(folder: Path, sizes: dict[str, int], vocabulary: int) -> None:
    special = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": BOS}
    config = LlamaConfig(**sizes, **special, vocab_size=vocabulary, max_position_embeddings=256, num_labels=1)
    for name, model_class in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder / name)
        toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(folder / name)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_pair(folder, SMALL, 4000)
    return folder


class Silent:
    """A view that shows nothing."""

    def start(self, max_steps: int, step: int = 0) -> None: ...
    def update(self, metrics: Any, sample: Any) -> None: ...
    def note(self, line: str) -> None: ...
    def stop(self) -> None: ...


def small_trainer(folder: Path, out: Path, **changes: Any) -> ReMaxTrainer:
    defaults = {"max_steps": 2, "batch_size": 16, "max_completion_length": 24, "output_dir": str(out)}
    return ReMaxTrainer(
        str(folder / "policy"),
        str(folder / "reward"),
        settings(**{**defaults, **changes}),
        train_dataset=Dataset.from_list([{"prompt": f"once upon a time {n:02}"} for n in range(16)]),
        view=Silent(),
    )


def networks_in(trainer: ReMaxTrainer) -> dict[str, Any]:
    value = trainer.method.critic.network if trainer.args.method == "ppo" else None  # type: ignore[attr-defined]
    return measure_networks(networks_of(trainer.parts, value), trainer.args)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"use_peft": True},
        {"use_peft": True, "bf16": True},
        {"dtype": "bfloat16"},
        {"micro_batch_tokens": 200},
        {"kl_mode": "loss"},
        {"temperature": 0.7, "top_p": 0.9},
        {"optim": "adamw_torch", "gradient_checkpointing": True},
        {"method": "ppo", "num_ppo_epochs": 1},
        {"method": "rloo", "num_generations": 2, "batch_size": 8},
    ],
    ids=str,
)
def test_the_tensors_of_every_phase_are_predicted(tmp_path: Path, small: Path, changes: dict[str, Any]) -> None:
    trainer = small_trainer(small, tmp_path, **changes)
    args, prompts = trainer.args, trainer.parts.prompts
    trainer.step(trainer.order.batch(1), 1)
    trainer.meter = live = Transients(trainer.accelerator.device)
    trainer.step(trainer.order.batch(1), 2)
    work = Workload(args.batch_size, max(len(prompt.token_ids) for prompt in prompts), 24)
    found = moments(networks_in(trainer), args, work, Split(), on_gpu=False)
    for phase in ("rollout", "reference", "update"):
        sizes = [formulas.total(m.own) + formulas.total(m.gradients) for m in found if m.phase == phase]
        if not sizes:
            assert phase == "reference"
            assert args.kl_mode == "loss"
            continue
        assert max(sizes) == pytest.approx(live.made[phase], rel=0.1 if args.gradient_checkpointing else 0.08), phase


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"dtype": "bfloat16"}], ids=str)
def test_what_a_token_takes_to_be_drawn(changes: dict[str, Any]) -> None:
    args, widths = settings(**changes), llama("125M", head=32000, trained=True).widths
    sampling = Sampling(max_completion_length=4, eos_token_ids=(EOS,))
    with torch.no_grad(), LiveTensors() as live:
        logits = torch.zeros(6, widths.vocabulary, dtype=torch.bfloat16 if changes else torch.float32)
        choose(logits, sampling, torch.zeros(3, dtype=torch.float64))
    assert formulas.total(formulas.choice(widths, 6, 3, args)) == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize(("changes", "size"), [({}, 4), ({"dtype": "bfloat16"}, 4), ({"bf16": True}, 2)], ids=str)
def test_reward_models_are_float32_but_for_bf16(changes: dict[str, Any], size: int) -> None:
    own = llama("7B", head=1, trained=False).counts
    assert formulas.weight_bytes("reward", own, settings(**changes)) == pytest.approx(size * own.parameters, rel=0.05)
    reference = llama("7B", head=32000, trained=False).counts
    half = 2 if changes else 4
    held = formulas.weight_bytes("reference", reference, settings(**changes))
    assert held == pytest.approx(half * reference.parameters, rel=0.05)


def test_what_is_offloaded_counts_in_its_phase_alone() -> None:
    args = settings(reward_placement="offload", reference_placement="offload")
    networks = llama_networks("125M", args)
    peaks = predict(networks, args, STEP, Device("cuda"))
    frozen = {name: formulas.weight_bytes(name, networks[name].counts, args) for name in ("reward", "reference")}
    policy = formulas.weight_bytes("policy", networks["policy"].counts, args)
    weights = {phase: peak.weights for phase, peak in peaks.items()}
    assert weights == {
        "rollout": policy,
        "reward": policy + frozen["reward"],
        "reference": policy + frozen["reference"],
        "update": policy,
    }
    without_model = {name: network for name, network in networks.items() if name != "reward"}
    beside_functions = predict(without_model, args, STEP, Device("cuda"))
    assert beside_functions["reward"].total == beside_functions["reference"].total > beside_functions["update"].weights
    on_cpu = predict(networks, args, STEP, Device("cpu"))
    assert on_cpu["rollout"].weights == on_cpu["update"].weights > policy


def test_on_a_cpu_small_tensors_stay_and_large_ones_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from remax.plan import phases
    from remax.plan.formulas import Block

    small, large = Block(10, 2**20), Block(1, HEAP_LIMIT)
    found = [Moment("rollout", "a", [small]), Moment("update", "b", [Block(1, 2**20), large])]
    monkeypatch.setattr(phases, "moments", lambda *_, **__: found)
    monkeypatch.setattr(phases, "FRAGMENTATION", 1.0)
    args = settings()
    networks = llama_networks("125M", args)
    peaks = predict(networks, args, STEP, Device("cpu", base=7))
    static = peaks["rollout"].weights + peaks["rollout"].optimiser
    assert peaks["rollout"].total == 7 + static + small.bytes
    assert peaks["update"].total == 7 + static + small.bytes + HEAP_LIMIT
    on_gpu = predict(networks, args, STEP, Device("cuda"))
    assert on_gpu["update"].own == 2**20 + HEAP_LIMIT


@pytest.mark.parametrize(("sharding", "weights", "states"), [("zero2", 2, 14), ("zero3", 0, 16), ("fsdp2", 0, 16)])
def test_sharding_splits_what_the_zero_paper_says(sharding: Any, weights: int, states: int) -> None:
    args, devices = settings(bf16=True, beta=0.0), 8
    own = llama("7B", head=32000, trained=True).counts
    split = Split(sharding, devices)
    held = split.weights("policy", own, args) + split.states(own, args) + formulas.total(split.gradients(own, args))
    assert held == pytest.approx(P7 * (weights + states / devices), rel=1e-5)
    frozen = llama("7B", head=32000, trained=False).counts
    whole_frozen = Split().weights("reference", frozen, args)
    assert split.weights("reference", frozen, args) == whole_frozen // (devices if sharding == "fsdp2" else 1)
    whole = Split()
    assert whole.weights("policy", own, args) == Split("ddp", devices).weights("policy", own, args) == 4 * P7


# A run of more than 50 million parameters -----------------------------------------------------------------------------

RUN = """
    import json, sys
    from datasets import Dataset
    from remax.plan.device import base_bytes
    from remax.config import ReMaxConfig
    from remax.trainer import ReMaxTrainer
    from remax.plan.after import predict_peaks
    import torch

    class Silent:
        def start(self, max_steps, step=0): ...
        def update(self, metrics, sample): ...
        def note(self, line): ...
        def stop(self): ...

    torch.set_num_threads(1)
    folder, out, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    shape = dict(batch_size=8, max_completion_length=24, max_steps=2)
    args = ReMaxConfig(report_to=["none"], output_dir=out, **shape, **changes)
    base = base_bytes(torch.device("cpu"))
    prompts = Dataset.from_list([{"prompt": "once upon a time there was a dog"}] * 8)
    trainer = ReMaxTrainer(folder + "/policy", folder + "/reward", args, train_dataset=prompts, view=Silent())
    for step in (1, 2):
        trainer.meter.clear()
        trainer.step(trainer.order.batch(step), step)
    value = trainer.method.critic.network if args.method == "ppo" else None
    predicted = predict_peaks(trainer.parts, args, base_bytes=base, value_model=value)
    peaks = {name: peak.total for name, peak in predicted.items()}
    print(json.dumps({"measured": trainer.meter.peak_bytes, "predicted": peaks}))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    save_pair(folder, WIDE, 32000)
    return folder


def check_run(folder: Path, out: Path, changes: dict[str, Any]) -> None:
    if sys.platform != "linux":
        pytest.skip("the model of the heap is that of glibc, and peaks by phase need /proc")
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(folder), str(out), json.dumps(changes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    measured, predicted = result["measured"], result["predicted"]
    assert max(predicted.values()) == pytest.approx(max(measured.values()), rel=0.1)
    for phase, value in predicted.items():
        assert value == pytest.approx(measured[phase], rel=0.2), phase


def test_the_peak_of_a_run_is_predicted_within_ten_percent(tmp_path: Path, wide: Path) -> None:
    check_run(wide, tmp_path, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"method": "ppo", "num_ppo_epochs": 1},
        {"bf16": True},
        {"use_peft": True},
        {"use_peft": True, "bf16": True},
        {"optim": "adamw_torch"},
        {"micro_batch_tokens": 200},
    ],
    ids=str,
)
def test_so_are_those_of_other_settings(tmp_path: Path, wide: Path, changes: dict[str, Any]) -> None:
    check_run(wide, tmp_path, changes)


def test_a_finished_run_is_told_both_peaks_and_never_fails(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = small_trainer(small, tmp_path)
    measured = {"rollout": 3.0 * GIB, "update": 4.0 * GIB}
    line = describe_peaks(trainer.parts, trainer.args, measured, base_bytes=2 * GIB)
    assert "measured 4.00 GiB (update), predicted 2." in line
    assert "rollout 3.00 GiB / 2." in line
    trainer.parts.policy.config = None
    line = describe_peaks(trainer.parts, trainer.args, measured, base_bytes=0)
    assert line == "Peak memory: measured 4.00 GiB (update); no prediction for this model (AttributeError)."
    assert describe_peaks(trainer.parts, trainer.args, {}, base_bytes=0)


def test_weights_packed_for_a_rollout_are_seen_by_the_instrument() -> None:
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch packs no weights")
    weight = torch.ones(64, 32)
    with LiveTensors() as live:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
        held = live.total
        del packed
    assert held == 64 * 32 * 4
    assert live.total == 0

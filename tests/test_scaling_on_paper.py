"""What moves over the network, by formula, against what two processes really send; and the tables of scaling.md."""

import json
import math
import pickle
import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import roofline, scaling_on_paper  # noqa: E402

from planning import P7, settings  # noqa: E402
from remax.cli import main  # noqa: E402
from remax.config import ReMaxConfig  # noqa: E402
from remax.interfaces import Completion  # noqa: E402
from remax.plan.network import FLOAT_BYTES, TENSOR_BYTES, Passes, Transfer, received, token_bytes, transfers  # noqa: E402
from remax.plan.networks import Counts, Network, TrainedTensor, Widths  # noqa: E402
from remax.plan.phases import Workload  # noqa: E402
from remax.plan.sharding import Split  # noqa: E402
from remax.sharing import NOWHERE  # noqa: E402

WIDTH, LAYERS, VOCABULARY = 128, 4, 500
LAYER = WIDTH * WIDTH
OUTSIDE = 2 * VOCABULARY * WIDTH
PARAMETERS = LAYERS * LAYER + OUTSIDE

# The script's network and step ----------------------------------------------------------------------------------------


def small(**changes: Any) -> Network:
    """Returns the network of the script in numbers."""
    shapes = [(VOCABULARY, WIDTH), *[(WIDTH, WIDTH)] * LAYERS, (VOCABULARY, WIDTH)]
    counts = Counts(
        parameters=PARAMETERS,
        trained_tensors=tuple(TrainedTensor(shape, False) for shape in shapes),
        castable=LAYERS * LAYER,
        linear=LAYERS * LAYER,
        trained_linear=LAYERS * LAYER,
        head=VOCABULARY * WIDTH,
        embedding=VOCABULARY * WIDTH,
    )
    return Network(replace(counts, **changes), Widths(LAYERS, WIDTH, WIDTH, WIDTH, WIDTH, VOCABULARY))


TWO_MICRO_BATCHES = Workload(prompts=2, prompt_length=8, completion_length=8)
"""On each of two devices, with a row in each micro-batch."""


def predicted(sharding: Any, **changes: Any) -> list[Transfer]:
    args = settings(beta=0.0, micro_batch_tokens=16, **changes)
    return transfers({"policy": small()}, args, TWO_MICRO_BATCHES, Split(sharding, 2))


def of(found: list[Transfer], *whats: str) -> int:
    return received([own for own in found if own.what in whats])


# Formulas -------------------------------------------------------------------------------------------------------------


def test_a_ring_brings_all_but_ones_own_part_and_twice_that_for_a_sum() -> None:
    def brought(collective: Any) -> int:
        return Transfer("update", "x", collective, size=800, times=3, devices=8).received

    assert brought("all-gather") == brought("reduce-scatter") == 3 * 700
    assert brought("all-reduce") == 2 * 3 * 700


def frozen() -> Network:
    return small(trained_tensors=(), trained_linear=0)


def moved(args: ReMaxConfig, sharding: Any, devices: int, **networks: Network) -> dict[str, tuple[int, int]]:
    """Returns sizes and times by what is moved."""
    work = Workload(prompts=4, prompt_length=8, completion_length=8)
    found = transfers({"policy": small(), **networks}, args, work, Split(sharding, devices))
    return {own.what: (own.size, own.times) for own in found}


def test_zero2_reduces_after_every_micro_batch_and_gathers_new_weights() -> None:
    found = moved(settings(beta=0.0, bf16=True, micro_batch_tokens=16), "zero2", 4)
    assert found["policy, gradients"] == (2 * PARAMETERS, 4)
    assert found["policy, new weights"] == (2 * PARAMETERS, 1)
    assert "policy, whole" not in found


def test_zero3_gathers_for_the_rollout_what_it_holds_in_bfloat16() -> None:
    found = moved(settings(beta=0.0, bf16=True, micro_batch_tokens=16), "zero3", 4)
    assert found["policy, whole"] == (2 * PARAMETERS, 1)
    assert found["policy, forward"] == found["policy, backward"] == found["policy, gradients"] == (2 * PARAMETERS, 4)


def test_frozen_models_are_gathered_for_their_passes() -> None:
    args = settings(bf16=True, micro_batch_tokens=32, reward_batch_size=3)
    found = moved(args, "fsdp2", 2, reference=frozen(), reward=frozen())
    assert found["reward, forward"] == (2 * PARAMETERS, 3)  # 4 sampled and 4 greedy rows.
    assert found["reference, forward"] == (2 * PARAMETERS, 2)  # 8 rows, 2 a micro-batch, on 2 devices.
    assert found["log-probabilities"] == (8 * (4 * 8 + TENSOR_BYTES), 1)
    for whole in ("ddp", "zero2", "zero3"):
        others = moved(args, whole, 2, reference=frozen(), reward=frozen())
        assert not {"reward, forward", "reference, forward"} & set(others)
    with_adapter = moved(replace(args, use_peft=True), "fsdp2", 2)
    assert with_adapter["policy, forward"] == (2 * PARAMETERS, 2)


def test_the_exact_kl_needs_the_reference_in_every_micro_batch() -> None:
    found = moved(settings(kl_mode="loss", micro_batch_tokens=16), "fsdp2", 2, reference=frozen())
    assert found["reference, forward"] == (4 * PARAMETERS, 4)
    assert "log-probabilities" not in found


def test_ppo_updates_two_networks_several_times() -> None:
    args = settings(method="ppo", num_ppo_epochs=3, num_mini_batches=2, micro_batch_tokens=16)
    found = moved(args, "fsdp2", 2, reference=frozen(), value=small())
    assert found["policy, forward"] == found["value, gradients"] == (4 * PARAMETERS, 2 * 6)
    assert found["value, values"] == (4 * PARAMETERS, 4)
    assert moved(args, "ddp", 2, value=small())["value, gradients"] == (4 * PARAMETERS, 6)


def test_an_adapter_alone_has_gradients_to_send() -> None:
    adapter = small(trained_tensors=(TrainedTensor((2, WIDTH), True),))
    args = settings(beta=0.0, dtype="bfloat16", use_peft=True)
    work = Workload(prompts=4, prompt_length=8, completion_length=8)
    (gradients,) = [t for t in transfers({"policy": adapter}, args, work, Split("ddp", 2)) if "gradients" in t.what]
    assert gradients.size == 4 * 2 * WIDTH


def test_one_device_has_nobody_to_talk_to() -> None:
    assert transfers({"policy": small()}, settings(), TWO_MICRO_BATCHES, Split()) == []


def test_micro_batches_of_the_whole_step_are_dealt_out() -> None:
    work = Workload(prompts=5, prompt_length=8, completion_length=8)
    passes = Passes.of(settings(micro_batch_tokens=3 * 16 + 1, reward_batch_size=4), work, 2)
    # 10 samples in groups of 3: 4 groups, 2 on each device. 5 sampled and 5 greedy rows of its own: 3 batches.
    assert passes == Passes(update=2, updates=1, scoring=2, reward=3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_whole_weights_of_a_rollout_take_what_the_engine_holds(tied: bool, bf16: bool) -> None:
    from remax.plan.networks import Widths, count_network
    from remax.rollout.gathered import GatheredEngine
    from tiny_models import tiny_model

    policy, args = tiny_model("llama", tie_word_embeddings=tied), settings(bf16=bf16)
    engine = GatheredEngine(policy, lambda model: model, policy.device, half=bf16)
    engine.take(policy.state_dict().items(), 1)
    held = {weight.data_ptr(): weight.numel() * weight.element_size() for weight in engine._model.parameters()}
    network = Network(count_network("policy", policy, args), Widths.of(policy))
    (block,) = Split("fsdp2", 2).whole(network, args)
    assert block.bytes == sum(held.values())
    assert Split("zero2", 2).whole(network, args) == []


# Least time -----------------------------------------------------------------------------------------------------------


def test_decoding_reads_weights_and_caches_or_multiplies() -> None:
    network, args = scaling_on_paper.networks_of("7B")["policy"], scaling_on_paper.settings(8)
    cluster = replace(roofline.INFINIBAND, flops=math.inf)
    work = Workload(prompts=1, prompt_length=3, completion_length=2)
    multiplied = 2 * (P7 - 32_000 * 4096 - 65 * 4096)
    cached = 2 * 2 * 32 * 4096
    # Two rows; the first token sees 3 that are cached, the second 4.
    read = 2 * multiplied + 2 * (3 + 4) * cached
    assert roofline.decode_seconds(network, args, work, cluster) == pytest.approx(read / cluster.memory)
    assert roofline.decode_seconds(network, args, work, cluster, gpus=8) == pytest.approx(read / cluster.memory / 8)
    slow = replace(cluster, flops=1e12, memory=math.inf)
    assert roofline.decode_seconds(network, args, work, slow) == pytest.approx(2 * 2 * multiplied / 1e12)


def test_the_update_costs_what_the_gpu_benchmark_counts() -> None:
    from benchmarks.gpu_bench.shapes import LLAMA_7B

    args = replace(scaling_on_paper.settings(64), gradient_checkpointing=False)
    work, split = Workload(prompts=8, prompt_length=512, completion_length=512), Split("fsdp2", 8)
    seconds = roofline.step_seconds(scaling_on_paper.networks_of("7B"), args, work, split, roofline.INFINIBAND)
    assert seconds.update * roofline.FLOPS == pytest.approx(LLAMA_7B.training_flops([(512, 512)] * 8))
    again = roofline.step_seconds(
        scaling_on_paper.networks_of("7B"), scaling_on_paper.settings(64), work, split, roofline.INFINIBAND
    )
    layers = 2 * (LLAMA_7B.layer_weights * 8 * 1024 + 8 * 1024**2 * 4096 * 32)
    assert (again.update - seconds.update) * roofline.FLOPS == pytest.approx(layers)


def test_what_does_not_hide_behind_arithmetic_is_waited_for() -> None:
    networks, args = scaling_on_paper.networks_of("7B"), scaling_on_paper.settings(64)
    work = Workload(prompts=8, prompt_length=512, completion_length=512)
    fast = roofline.step_seconds(networks, args, work, Split("fsdp2", 16), roofline.INFINIBAND)
    slow = roofline.step_seconds(networks, args, work, Split("fsdp2", 16), roofline.ETHERNET)
    assert fast.network == 0
    by_phase = dict.fromkeys(("reward", "reference", "update"), 0.0)
    for own in transfers(networks, args, work, Split("fsdp2", 16)):
        if own.phase in by_phase:
            by_phase[own.phase] += own.received / 12.5e9
    assert slow.network == pytest.approx(sum(max(0.0, by_phase[p] - getattr(slow, p)) for p in by_phase))
    assert slow.step - fast.step == pytest.approx(slow.network + slow.gathering - fast.gathering)


# Page and files -------------------------------------------------------------------------------------------------------


def test_configs_have_the_published_sizes() -> None:
    sizes = {model: scaling_on_paper.networks_of(model)["policy"].counts.parameters for model in ("7B", "14B", "70B")}
    assert sizes == {"7B": P7, "14B": 14_770_033_664, "70B": 70_553_706_496}


def test_tables_and_results_are_what_the_script_gives() -> None:
    found = scaling_on_paper.compute()
    page = scaling_on_paper.PAGE.read_text(encoding="utf-8")
    tables = scaling_on_paper.tables(found)
    assert sorted(re.findall(r"<!-- table: ([a-z ]+) -->", page)) == sorted(tables)
    assert scaling_on_paper.filled(page, tables) == page, "run python -m benchmarks.scaling_on_paper"
    written = json.loads(scaling_on_paper.RESULTS.read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(found))


def test_the_plan_tells_what_the_network_moves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num_devices", "8", "--sharding", "fsdp2", "--device_memory", "80GB", "--bf16"]
    model = str(ROOT / "benchmarks/configs/llama-2-7b.json")
    assert main(["plan", "--model", model, *flags, "--output_file", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "plan.json").read_text())["network"]
    assert {"phase": "rollout", "what": "policy, whole", "collective": "all-gather", "size": 4 * P7}.items() <= written[
        0
    ].items()
    assert "each device receives" in printed
    assert re.search(r"update +policy, backward +all-gather", printed)
    assert max(map(len, printed.splitlines())) <= 120


# What two processes really send ---------------------------------------------------------------------------------------

SENDING = """
    import json, os, pickle, sys, warnings
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    warnings.filterwarnings("ignore")
    folder, width, layers, vocabulary = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    rank = 0 if os.fork() else 1  # torch is imported once.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def sent():
        return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("wchar"))

    def model():
        torch.manual_seed(0)
        linear = [nn.Linear(width, width, bias=False) for _ in range(layers)]
        return nn.Sequential(nn.Embedding(vocabulary, width), *linear, nn.Linear(width, vocabulary, bias=False))

    ids = torch.arange(4)
    found = {}

    def count(name, work):
        dist.barrier()
        before = sent()
        result = work()
        found[name] = sent() - before
        return result

    replica = DistributedDataParallel(model())
    def update(network, syncs_once):
        if syncs_once:
            with network.no_sync():
                network(ids).sum().backward()
        else:
            network(ids).sum().backward()
        network(ids).sum().backward()
    update(replica, True)  # The first time it tells the others how gradients are put together.
    count("ddp", lambda: update(replica, True))

    for name, policy in (
        ("fsdp2", MixedPrecisionPolicy()),
        ("fsdp2, bf16", MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)),
    ):
        network = model()
        for layer in network[1:-1]:
            fully_shard(layer, mp_policy=policy)
        fully_shard(network, mp_policy=policy)
        update(network, False)
        count(name, lambda: update(network, False))
        with torch.no_grad():
            count(name + ", forward", lambda: network(ids))
        network.reshard()
        whole = count(name + ", whole", lambda: [weight.full_tensor() for weight in network.parameters()])
        assert sum(weight.numel() for weight in whole) == sum(weight.numel() for weight in model().parameters())

    with open(f"{folder}/completions", "rb") as file:
        own = pickle.load(file)
    count("completions", lambda: dist.all_gather_object([None, None], own))
    if rank == 0:
        print(json.dumps(found))
"""


def completions(num_rows: int, length: int, vocabulary: int) -> list[tuple[int, Completion]]:
    """Returns rows as processes send them: see roll_out_together."""
    generator = random.Random(0)

    def row(number: int) -> Completion:
        ids = [generator.randrange(vocabulary) for _ in range(length)]
        return Completion(NOWHERE, number, ids, [-generator.random() for _ in range(length)], truncated=True)

    return [(number, row(number)) for number in range(num_rows)]


@pytest.fixture(scope="module", autouse=True)
def sending(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """Two processes at work, which begin with the first test: most of their time goes into importing torch."""
    folder = tmp_path_factory.mktemp("sent")
    plain = [(number, vars(row) | {"prompt": None}) for number, row in completions(8, 64, VOCABULARY)]
    (folder / "completions").write_bytes(pickle.dumps(plain))
    command = [sys.executable, "-c", textwrap.dedent(SENDING), str(folder), *map(str, (WIDTH, LAYERS, VOCABULARY))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def sent(sending: "subprocess.Popen[str]") -> Any:
    """The bytes that one of two processes hands to the system for sending, by what they do together."""
    if sys.platform != "linux":
        pytest.skip("bytes that were sent are counted in /proc")
    printed, errors = sending.communicate(timeout=120)
    assert sending.returncode == 0, errors[-2000:]
    return json.loads(printed)


def test_ddp_sends_gradients_once_for_all_micro_batches(sent: dict[str, int]) -> None:
    found = predicted("ddp")
    assert of(found, "policy, gradients") == 4 * PARAMETERS
    assert sent["ddp"] == pytest.approx(of(found, "policy, gradients"), rel=0.01)


@pytest.mark.parametrize(("name", "bf16", "size"), [("fsdp2", False, 4), ("fsdp2, bf16", True, 2)])
def test_fsdp2_sends_weights_twice_and_gradients_once_per_micro_batch(
    sent: dict[str, int], name: str, bf16: bool, size: int
) -> None:
    found = predicted("fsdp2", bf16=bf16)
    weights = of(found, "policy, forward", "policy, backward")
    gradients = of(found, "policy, gradients")
    assert weights == 2 * 2 * size * PARAMETERS / 2
    assert gradients == 2 * size * PARAMETERS / 2
    # Embedding and head stay from forward to backward; and gloo reduces and scatters by an all-reduce.
    stays = 2 * size * OUTSIDE / 2
    assert sent[name] == pytest.approx(weights - stays + 2 * gradients, rel=0.02)
    assert sent[f"{name}, forward"] == pytest.approx(of(found, "policy, forward") / 2, rel=0.02)


@pytest.mark.parametrize(("name", "bf16"), [("fsdp2", False), ("fsdp2, bf16", True)])
def test_whole_weights_are_gathered_as_they_are_held(sent: dict[str, int], name: str, bf16: bool) -> None:
    found = predicted("fsdp2", bf16=bf16)
    assert of(found, "policy, whole") == 4 * PARAMETERS / 2
    assert sent[f"{name}, whole"] == pytest.approx(of(found, "policy, whole"), rel=0.01)


def test_objects_are_sent_as_pickled(sent: dict[str, int]) -> None:
    plain = [(number, vars(row) | {"prompt": None}) for number, row in completions(8, 64, VOCABULARY)]
    assert sent["completions"] == pytest.approx(len(pickle.dumps(plain)), rel=0.1)


@pytest.mark.parametrize("vocabulary", [32_000, 152_064])
def test_a_token_of_a_rollout_takes_an_id_and_a_float(vocabulary: int) -> None:
    num_rows, length = 8, 512
    size = len(pickle.dumps((completions(num_rows, length, vocabulary), [])))
    most = num_rows * length * token_bytes(vocabulary)
    assert most * 0.93 < size < most * 1.02


def test_what_pickle_adds_to_numbers() -> None:
    import torch

    tensors = {number: torch.randn(64) for number in range(64)}
    assert len(pickle.dumps(tensors)) / 64 == pytest.approx(4 * 64 + TENSOR_BYTES, rel=0.02)
    assert len(pickle.dumps([0.5 + number for number in range(1000)])) / 1000 == pytest.approx(FLOAT_BYTES, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_step_of_a_training_sends_what_the_plan_says(tmp_path: Path, kind: Any) -> None:
    from remax.plan.networks import count_network
    from sending import SETTINGS, wide_policy

    if sys.platform != "linux":
        pytest.skip("bytes that were sent are counted in /proc")
    script = [str(Path(__file__).with_name("sending.py")), str(tmp_path), kind]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads((tmp_path / f"{kind}.json").read_text())

    policy, args, work = wide_policy(), settings(**SETTINGS), Workload(4, prompt_length=12, completion_length=8)
    network = Network(count_network("policy", policy, args), Widths.of(policy))
    still = replace(network, counts=replace(network.counts, trained_tensors=(), trained_linear=0))
    found = transfers({"policy": network, "reference": still}, args, work, Split(kind, 2))
    assert Passes.of(args, work, 2).update == measured["passes"] == 2
    expected = {phase: received([t for t in found if t.phase == phase]) for phase in ("rollout", "reference", "update")}
    if kind == "fsdp2":  # gloo reduces and scatters by an all-reduce.
        expected["update"] += of(found, "policy, gradients")
    for phase, size in expected.items():
        # Embedding and head stay; next to nothing is sent where no weights are.
        assert measured[phase] == pytest.approx(size, rel=0.03, abs=5000), phase

"""The speed benchmark: its arithmetic against numbers worked out by hand, its planned lengths, and all of it once."""

import json
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.speed import bench, floor, memory, process, rounds, scaling  # noqa: E402
from benchmarks.speed.cases import Case, Shape, write  # noqa: E402
from benchmarks.speed.competitors import our_trainer  # noqa: E402
from benchmarks.speed.lengths import LengthPlan, planned_lengths  # noqa: E402
from benchmarks.speed.table import markdown  # noqa: E402
from benchmarks.speed.targets import target, targets  # noqa: E402

TOY = Case("toy", Shape(32, 64, 2, 2, 64), 4, 8, 12, mean_length=5.0)

# Arithmetic -----------------------------------------------------------------------------------------------------------


def figures(seconds: list[float], *, flops: int, live_bytes: int) -> dict[str, Any]:
    return {"seconds": seconds, "flops": flops, "live_bytes": live_bytes, "resident_bytes": live_bytes + 100}


def test_time_is_the_median_of_the_ratios_within_the_rounds() -> None:
    ours = figures([1.0, 2.0, 4.0], flops=10, live_bytes=100)
    other = figures([3.0, 8.0, 8.0], flops=25, live_bytes=150)

    ratio = rounds.compare(ours, other)

    # Ratios 3, 4, 2: their median is 3, while the ratio of the medians is 4.
    assert ratio["time"] == 3.0
    assert ratio["time_by_round"] == [3.0, 4.0, 2.0]
    assert ratio["flops"] == 2.5
    assert ratio["time_of_flops"] == pytest.approx(3.0 / 2.5)
    assert (ratio["live_bytes"], ratio["resident_bytes"]) == (1.5, 1.25)


def test_a_competitor_is_summed_up_by_its_median_and_its_largest_resident_size() -> None:
    watched = {"flops": 7, "live_bytes": 5, "static_bytes": 3}
    timed = [{"seconds": seconds, "resident_bytes": size} for seconds, size in ((2.0, 10), (8.0, 30), (4.0, 20))]

    own = rounds.summary(watched, timed, num_prompts=4)

    assert own["seconds_per_prompt"] == 1.0
    assert own["resident_bytes"] == 30


def test_other_lengths_than_the_first_competitors_are_noticed_but_not_fewer_rows() -> None:
    rounds.check_lengths({"a": [2, 3, 4, 5], "b": [2, 3, 4, 5], "one row per prompt": [2, 3]}, num_prompts=2)
    with pytest.raises(AssertionError, match="b decoded other lengths than a"):
        rounds.check_lengths({"a": [2, 3, 4, 5], "b": [2, 3, 4, 6]}, num_prompts=2)


def test_the_floor_adds_up_its_calls_with_the_fastest_way_to_make_each() -> None:
    seconds = {
        "step": [12.0, 10.0, 22.0],
        "generation: slow": [1.0, 9.0, 9.0],
        "generation: fast": [4.0, 2.0, 3.0],
        "reward": [1.0, 1.0, 1.0],
        "reference: fast": [0.0, 0.0, 1.0],
        "reference: slow": [0.0, 1.0, 1.0],
        "forward and backward: only": [1.0, 1.0, 6.0],
    }

    own = floor.summary(seconds)

    assert own["fastest"] == ["forward and backward: only", "generation: fast", "reference: fast"]
    assert own["floor"] == 6.0  # of 6, 4, 11
    assert own["step_of_floor_by_round"] == [2.0, 2.5, 2.0]
    assert own["step_of_floor"] == 2.0


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_an_exponent_is_found_again(power: float) -> None:
    xs = [8, 16, 64, 100]
    assert scaling.exponent(xs, [3.7 * x**power for x in xs]) == pytest.approx(power)


def test_in_place_products_are_counted() -> None:
    left, right, added = torch.ones(3, 5), torch.ones(5, 7), torch.ones(3, 7)
    with FlopCounterMode(display=False, custom_mapping=memory.UNKNOWN_OPERATIONS) as counter:
        added.addmm_(left, right)
    assert counter.get_total_flops() == 2 * 3 * 5 * 7


def test_a_watched_step_knows_its_peak() -> None:
    kept = torch.ones(1000)
    report: dict[str, Any] = {}
    with memory.watch(report):
        first = kept * 2  # 4000 bytes
        second = first + 1  # 8000 at once
        del first
        third = second[:10] * 1  # 4040
    assert report["live_bytes"] - report["static_bytes"] == 8000
    assert report["static_bytes"] >= 4000
    del second, third


@pytest.mark.parametrize(
    ("early", "late", "expected"), [(7500, 100, 30_000), (7500, 7000, 30_000), (7500, 9000, 36_000)]
)
def test_gradients_are_counted_out_from_when_they_are_made(early: int, late: int, expected: int) -> None:
    """30,000 bytes before the gradient of 4,000 exists, then some beside it."""
    weight = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.SGD([weight], lr=0.1, foreach=False)
    with memory.BesideGradients(optimizer) as beside, beside.live:
        before = torch.ones(early)
        del before
        (weight * 2).sum().backward()  # type: ignore[no-untyped-call]
        after = torch.ones(late)
        optimizer.step()
    assert beside.peak == pytest.approx(expected, abs=16)
    assert beside.live.peak == pytest.approx(max(30_000, 4000 + 4 * late), abs=16)
    del after


# Targets --------------------------------------------------------------------------------------------------------------


def test_a_bound_itself_is_met() -> None:
    assert target("t", 2.5, at_least=2.5) == {"name": "t", "target": "at least 2.5", "measured": 2.5, "met": True}
    assert target("t", 1.25, at_most=1.25)["met"]
    assert not target("t", 2.49, at_least=2.5)["met"]
    assert not target("t", 1.26, at_most=1.25)["met"]
    both = target("t", 1.2, at_least=0.85, at_most=1.15)
    assert both["target"] == "at least 0.85 and at most 1.15"
    assert not both["met"]


def ratio(time: float, *, flops: float = 2.0, live_bytes: float = 1.5) -> dict[str, float]:
    return {"time": time, "flops": flops, "time_of_flops": time / flops, "live_bytes": live_bytes}


def test_every_target_is_judged() -> None:
    parts: dict[str, Any] = {
        "competitors": {
            "tinystories-260k, fixed": {"ratios": {"trl rloo": ratio(2.6), "trl grpo": ratio(1.9)}},
            "tinystories-260k, ragged": {"ratios": {"trl rloo": ratio(4.0), "trl grpo": ratio(3.0, live_bytes=0.8)}},
            "llama-50m, fixed": {"ratios": {"trl rloo": ratio(1.9), "trl grpo": ratio(1.7)}},
            "llama-50m, ragged": {"ratios": {"trl rloo": ratio(2.5), "trl grpo": ratio(1.6)}},
        },
        "baseline": {"llama-50m, fixed": {"price": {"with KL": 1.3, "no KL": 1.0}}},
        "floor": {"llama-50m, fixed": {"step_of_floor": 1.1}},
        "scaling": {
            "batch": {"time_exponent": 0.95},
            "completion length": {"time_exponent": 1.3},
            "vocabulary": {"points": [{"x": 32_768, "beyond_bytes": 100}, {"x": 131_072, "beyond_bytes": 110}]},
            "parameters": {"time_exponent": 5.0},
        },
    }

    judged = {own["name"]: (round(own["measured"], 3), own["met"]) for own in targets(parts)}

    assert judged == {
        "tinystories-260k, fixed: time per prompt, trl rloo / ReMax": (2.6, True),
        "tinystories-260k, fixed: time per prompt, trl grpo / ReMax": (1.9, False),
        "tinystories-260k, ragged: time per prompt, trl rloo / ReMax": (4.0, True),
        "llama-50m, fixed: time ratio / FLOP ratio, trl rloo": (0.95, True),
        "llama-50m, fixed: time ratio / FLOP ratio, trl grpo": (0.85, False),
        "llama-50m: time ratio with ragged / with fixed lengths, trl rloo": (1.316, True),
        "llama-50m: time ratio with ragged / with fixed lengths, trl grpo": (0.941, False),
        **{
            f"{case}: peak live tensor bytes, ReMax / {name}": (0.667, True)
            for case in parts["competitors"]
            for name in ("trl rloo", "trl grpo")
        },
        "tinystories-260k, ragged: peak live tensor bytes, ReMax / trl grpo": (1.25, False),
        "llama-50m, fixed: time of a step, ReMax / REINFORCE": (1.3, False),
        "llama-50m, fixed: time of a step / its floor": (1.1, True),
        "exponent of time over batch": (0.95, True),
        "exponent of time over completion length": (1.3, False),
        "memory beyond weights, gradients and optimiser state: growth from a vocabulary of 32k to 128k": (0.1, True),
    }


def test_parts_that_were_not_run_have_no_targets() -> None:
    assert targets({}) == []


# Lengths --------------------------------------------------------------------------------------------------------------


def test_planned_lengths_are_geometric_and_the_same_for_first_and_second_rows() -> None:
    lengths = planned_lengths(4000, 10_000, 48.0)
    first, second = zip(*lengths, strict=True)

    assert sorted(first) == sorted(second)
    assert first != second
    assert min(first) == 2
    assert sum(first) / 4000 == pytest.approx(48.0, rel=0.01)
    # P(length > n + 1) = (1 - p)^n
    assert sum(length > 48 for length in first) / 4000 == pytest.approx((1 - 1 / 47) ** 47, abs=0.001)


def test_without_a_mean_no_completion_ends_before_the_limit() -> None:
    assert planned_lengths(2, 12, None) == [(13, 13), (13, 13)]


def test_rows_end_where_the_plan_has_it_whoever_decodes(tmp_path: Path) -> None:
    """Ours copies rows from one prefill and lets them leave; transformers' generate() does neither."""
    setting = write(TOY, tmp_path)
    plan, prompts = setting.plan(), setting.tokenizer()(setting.prompts())["input_ids"]
    planned = [min(length, 12) for lengths in plan.lengths.tolist() for length in lengths]
    assert len(set(planned)) > 3
    trainer = our_trainer(setting, process.content_reward)
    rollout = trainer.parts.roll_out(trainer.parts.prompts, num_samples=1, greedy=True, seed=0, step=1)
    ours = {tuple(c.prompt.token_ids): [len(c.token_ids)] for c in rollout.samples}
    for completion in rollout.greedy:
        ours[tuple(completion.prompt.token_ids)].append(len(completion.token_ids))

    model = AutoModelForCausalLM.from_pretrained(setting.folder)
    plan.attach(model)
    rows = torch.tensor([ids for ids in prompts for _ in range(2)])
    sequences = model.generate(rows, max_new_tokens=12, do_sample=True, pad_token_id=2)
    ends = [[*row[8:].tolist(), plan.eos_token_id].index(plan.eos_token_id) + 1 for row in sequences]

    assert [length for ids in prompts for length in ours[tuple(ids)]] == planned
    assert [min(end, 12) for end in ends] == planned
    # The cache is not kept alive, and calls without one are left alone.
    assert plan.cache() is None
    assert torch.equal(model(rows).logits, AutoModelForCausalLM.from_pretrained(setting.folder)(rows).logits)


def test_a_plan_knows_its_prompts_apart() -> None:
    with pytest.raises(AssertionError, match="two prompts are the same"):
        LengthPlan([[1, 2], [1, 2]], [(3, 3), (4, 4)], 0)


def test_everybody_gets_micro_batches_of_as_many_tokens() -> None:
    def micro_batches(length: int, tokens: int) -> int:
        case = replace(TOY, num_prompts=6, prompt_length=8, max_completion_length=length)
        return replace(case, micro_batch_tokens=tokens).micro_batches

    assert micro_batches(12, 240) == 1  # 12 rows of 20 tokens
    assert micro_batches(12, 239) == 2
    assert micro_batches(12, 85) == 3  # 4 rows of 20 tokens
    assert micro_batches(12, 79) == 4
    assert bench.TINY.micro_batches == 2


# All of it ------------------------------------------------------------------------------------------------------------


class ThreadWorker:
    """A Worker whose competitor runs in a thread: importing everything again in processes would take too long."""

    def __init__(self, name: str, run: Callable[..., None], args: Iterable[Any], log: Path) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(run, theirs, tuple(args)), daemon=True)
        self.thread.start()
        self.ready.wait()  # One after the other: loading a model changes torch for all threads.

    def _run(self, run: Callable[..., None], connection: Any, args: tuple[Any, ...]) -> None:
        steps = process.Steps(connection)
        begin = steps.begin

        def ready() -> None:
            self.ready.set()
            begin()

        steps.begin = ready  # type: ignore[method-assign]
        try:
            run(steps, *args)
        except process.Stopped:
            pass
        except BaseException as error:
            connection.send(error)
        self.ready.set()

    def step(self, order: str = "step") -> dict[str, Any]:
        self.connection.send(order)
        report = self.connection.recv()
        if isinstance(report, BaseException):
            raise report
        return dict(report)

    def stop(self) -> None:
        self.connection.send("stop")
        self.thread.join()


def test_all_parts_run_and_write_their_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "Worker", ThreadWorker)
    monkeypatch.setattr(bench, "alone", lambda function, *args: function(*args))
    monkeypatch.setattr(memory, "alive_bytes", lambda: 0)  # half a second each, tested above
    output = tmp_path / "speed.json"

    bench.main(["--quick", "--output", str(output), "--parts", "competitors", "baseline"])
    bench.main(["--quick", "--output", str(output), "--parts", "floor", "scaling"])

    results = json.loads(output.read_text())
    assert list(results["parts"]) == ["competitors", "baseline", "floor", "scaling"]
    fixed, ragged = results["parts"]["competitors"].values()
    assert fixed["completion_lengths"] == [12] * 8
    assert len(set(ragged["completion_lengths"])) > 1
    for case in (fixed, ragged):
        assert all(len(own["seconds"]) == 2 for own in case["competitors"].values())
        # TRL trains on both rows of a prompt, RLOO runs the policy once more than GRPO.
        assert case["ratios"]["trl rloo"]["flops"] > case["ratios"]["trl grpo"]["flops"] > 1.5
    competitors = results["parts"]["baseline"]["toy, fixed"]["competitors"]
    counted = [competitors[name]["flops"] for name in ("remax", "reinforce", "reinforce, no KL")]
    assert counted == sorted(counted, reverse=True)
    assert competitors["authors' schedule"]["flops"] > competitors["remax"]["flops"]
    assert results["parts"]["floor"]["toy, fixed"]["step_of_floor"] > 0
    assert {own["name"] for own in results["targets"]} >= {"toy, fixed: time of a step / its floor"}
    assert (tmp_path / "speed.md").read_text() == markdown(results)


def test_parts_of_another_machine_are_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, here = tmp_path / "speed.json", {"hardware": {"cpu": "this"}, "quick": False}
    output.write_text(json.dumps({"hardware": {"cpu": "other"}, "quick": False, "parts": {"floor": {}}}))

    assert bench.earlier_parts(output, here) == {}
    assert "run with other hardware" in capsys.readouterr().out
    assert bench.earlier_parts(output, {"hardware": {"cpu": "other"}, "quick": False}) == {"floor": {}}
    assert bench.earlier_parts(tmp_path / "none.json", here) == {}


@pytest.mark.slow
def test_the_command_runs_its_competitors_in_processes(tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--output", str(output), "--parts", "competitors"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert json.loads(output.read_text())["parts"]["competitors"].keys() == {"toy, fixed", "toy, ragged"}

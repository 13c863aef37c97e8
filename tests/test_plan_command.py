"""`remax plan`: what it proposes when a run does not fit, and what the command answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planning import GIB, P7, STEP, plan_of, settings, write_seven
from remax.cli import main
from remax.config import PlanConfig, PlanInputs, ReMaxConfig
from remax.config.plan import parse_bytes
from remax.errors import UserError
from remax.plan import device
from remax.plan.command import make_plan
from remax.plan.phases import Peak, largest
from remax.plan.proposals import cheapest, levers, single_changes
from remax.plan.ratios import SHAPES


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of Llama-2-7B and nothing else."""
    return write_seven(tmp_path_factory.mktemp("llama-2-7b"))


# Proposals ------------------------------------------------------------------------------------------------------------


def fake(peak_of: Callable[[ReMaxConfig], int]) -> Any:
    return lambda args: {"update": Peak("update", "x", 0, 0, 0, 0, peak_of(args))}


def find(args: ReMaxConfig, peak_of: Callable[[ReMaxConfig], int], usable: int) -> Any:
    return cheapest(args, possible(args), fake(peak_of), usable=usable)


def possible(args: ReMaxConfig, **changes: Any) -> list[Any]:
    return levers(args, STEP, **{"has_reward_model": True, "on_gpu": True, **changes})


def names_of(found: list[Any]) -> list[str]:
    return [next(iter(lever.values[0])) for lever in found]


def test_changes_are_tried_from_the_cheapest_to_the_dearest() -> None:
    assert names_of(possible(settings(optim="adamw_torch"))) == [
        *("optim", "micro_batch_tokens", "reward_batch_size", "rollout_batch_size", "reward_placement"),
        *("reference_placement", "gradient_checkpointing", "bf16", "optim", "use_peft"),
    ]
    assert "gradient_checkpointing" not in names_of(possible(settings(gradient_checkpointing=True)))


def test_only_what_exists_can_be_placed_elsewhere() -> None:
    placements = {"reward_placement", "reference_placement"}

    def placed(args: ReMaxConfig, **changes: Any) -> set[str]:
        return placements & set(names_of(possible(args, **changes)))

    assert placed(settings()) == placements
    assert placed(settings(), on_gpu=False) == set()
    assert placed(settings(), has_reward_model=False) == {"reference_placement"}
    for changes in ({"kl_mode": "loss"}, {"use_peft": True}, {"beta": 0.0}):
        assert placed(settings(**changes)) == {"reward_placement"}


def test_the_cheapest_that_fits_is_proposed_and_goes_no_further_than_it_must() -> None:
    args = settings()
    micro = find(args, lambda own: own.micro_batch_tokens, usable=1100)
    assert micro.changes == {"micro_batch_tokens": 1024}  # From 4 rows x 512 tokens: 1024, then 512.
    assert micro.flags == "--micro_batch_tokens 1024"
    assert find(args, lambda own: own.micro_batch_tokens, usable=1000).changes == {"micro_batch_tokens": 512}
    either = find(args, lambda own: 0 if own.use_peft or own.gradient_checkpointing else 9, usable=1)
    assert either.changes == {"gradient_checkpointing": True}
    assert either.flags == "--gradient_checkpointing"

    def both(own: ReMaxConfig) -> int:
        return 100 - 40 * (own.reward_placement == "offload") - 40 * own.gradient_checkpointing - 70 * own.use_peft

    assert find(args, both, usable=30).changes == {"reward_placement": "offload", "gradient_checkpointing": True}
    assert find(args, both, usable=-100) is None


def test_each_change_alone_is_shown_at_its_most() -> None:
    args = settings()
    found = single_changes(args, possible(args), fake(lambda own: own.micro_batch_tokens), usable=600)
    first, second, *_ = found
    assert (first.changes, first.fits) == ({"micro_batch_tokens": 512}, True)
    assert (list(second.changes), second.fits) == (["reward_batch_size"], False)


def test_what_vllm_makes_useless_is_not_proposed() -> None:
    args = settings(rollout_engine="vllm")
    assert "rollout_batch_size" not in names_of(possible(args))
    assert "vllm_enable_sleep_mode" not in names_of(possible(args))
    assert "vllm_enable_sleep_mode" in names_of(possible(settings(rollout_engine="vllm", vllm_enable_sleep_mode=False)))


# Answers --------------------------------------------------------------------------------------------------------------


def test_seven_billion_on_one_card_of_80_gb(seven: Path) -> None:
    args = {"bf16": True, "dtype": "bfloat16", "optim": "adamw_torch_8bit", "micro_batch_tokens": 1536}
    plan = plan_of(seven, device_memory="80GB", args=args)
    assert plan.fits
    assert plan.methods["remax"].total == largest(plan.peaks).total
    assert plan.methods["ppo"].total > plan.memory.total
    assert not plan_of(seven, device_memory="80GB", args={**args, "method": "ppo"}).fits


def test_the_papers_setting_fits_with_remax_and_not_with_ppo(seven: Path) -> None:
    offload = {"reward_placement": "offload", "reference_placement": "offload"}
    args = {"bf16": True, "gradient_checkpointing": True, "max_prompt_length": 256, **offload}
    inputs = {"device_memory": "40GB", "num_devices": 8, "sharding": "zero2"}
    remax = plan_of(seven, args=args, **inputs)
    ppo = plan_of(seven, args={**args, "method": "ppo"}, **inputs)
    assert remax.fits
    assert not ppo.fits
    # 2 bytes of weight and an eighth of 14, one frozen model at a time: of one network, and of two.
    assert largest(remax.peaks).total == pytest.approx(P7 * (2 + 14 / 8 + 2) - P7 * 2 / 8, rel=0.06)
    assert ppo.peaks["update"].weights == pytest.approx(2 * 2 * P7, rel=0.02)
    everything = {**args, "reward_placement": "resident", "reference_placement": "resident"}
    assert plan_of(seven, args=everything, **{**inputs, "sharding": "fsdp2"}).fits


def test_the_ratio_of_both_methods_tends_to_that_of_their_static_bytes(seven: Path) -> None:
    plan = plan_of(seven, device_memory="80GB", args={"bf16": True, "micro_batch_tokens": 768})
    assert [own.name for own in plan.ratios] == list(SHAPES)
    largest_model = plan.ratios[-1]
    # Their gradients are never there together: (4 + 8) + (4 + 8) + 4 + 2 + 2 to 4 + 8 + 4 + 2 + 2.
    assert largest_model.static == pytest.approx(32 / 20, rel=0.01)
    assert largest_model.remax.static == pytest.approx(20 * largest_model.parameters, rel=0.01)
    assert [own.peak for own in plan.ratios] == sorted(own.peak for own in plan.ratios)
    assert all(own.peak < own.static for own in plan.ratios)
    assert plan_of(seven, device_memory="80GB", args={"use_peft": True}).ratios == []


def test_the_command_prints_tables_and_writes_strict_json(
    tmp_path: Path, seven: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "plan.json"
    flags = ["--device_memory", "40GB", "--bf16", "--output_file", str(path)]
    assert main(["plan", "--model", str(seven / "config.json"), *flags]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    assert "It does not fit" in printed
    assert "The same run with --method ppo does not fit" in printed
    written = json.loads(path.read_text())
    assert written["fits"] is False
    assert list(written["phases"]) == ["rollout", "reward", "reference", "update"]
    assert written["peak"] == max(phase["total"] for phase in written["phases"].values())
    assert len(written["ratios"]) == len(SHAPES)
    proposal = written["proposal"]
    assert proposal["fits"]
    assert proposal["peak"] <= written["device"]["usable"]
    again = PlanConfig(**{"bf16": True, **proposal["changes"]})
    plan = make_plan(PlanInputs(model=str(seven), device_memory="40GB"), again)
    assert plan.fits
    assert largest(plan.peaks).total == proposal["peak"]


def test_functions_as_rewards_take_no_memory(seven: Path) -> None:
    plan = plan_of(seven, device_memory="80GB", reward_funcs=["any.py:function"])
    assert list(plan.parameters) == ["policy", "reference"]
    assert plan.peaks["reward"].total == plan.peaks["reference"].total, "which runs beside them on a GPU"
    without = plan_of(seven, device_memory="80GB", reward_funcs=["any.py:function"], args={"kl_mode": "none"})
    assert without.peaks["reward"].own == 0


def test_a_vllm_that_cannot_hold_the_policy_is_refused(seven: Path) -> None:
    with pytest.raises(
        UserError, match=r"is 0.3: that is 7.2 GiB, .* \(12.6 GiB\) does not fit; set .*utilization 0.63"
    ):
        plan_of(seven, device_memory="24GB", args={"rollout_engine": "vllm", "bf16": True})
    with pytest.raises(UserError, match="does not fit; set --rollout_engine embedded"):
        plan_of(seven, device_memory="24GB", args={"rollout_engine": "vllm"})


# Sizes and mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * GIB), ("40960 MB", 40 * GIB), ("1.5TiB", 1536 * GIB), ("24g", 24 * GIB)]
)
def test_memory_is_read_as_cards_are_named(text: str, size: int) -> None:
    assert parse_bytes(text, flag="--device_memory") == size


def test_free_memory_minds_the_limit_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, usage = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(device, "CONTROL_GROUP_FILES", ((limit, usage),))
    limit.write_text("max\n")
    usage.write_text("100\n")
    without = device.free_main_memory()
    limit.write_text("5000\n")
    assert device.free_main_memory() == 4900
    assert without > 4900


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"device_memory": "lots"}, {}, "--device_memory is lots: that is no size of a memory; set one such as 80GB."),
    ({"device_memory": "80"}, {}, "--device_memory is 80: nothing fits in 80 bytes; set a unit too, such as 80GB."),
    ({"sharding": "zero2"}, {}, "--sharding is zero2: with --num_devices 1 there is nothing to split"),
    ({"num_devices": 8}, {}, "--num_devices is 8: --sharding none does not say what they split"),
    ({"num_devices": 8, "sharding": "zero2"}, {"batch_size": 4}, "a step has only 4 prompts"),
    ({"prompt_length": 600}, {}, "--prompt_length is 600: --max_prompt_length 512 lets no such prompt in"),
    (
        {"prompt_length": 97},
        {"max_completion_length": 4000},
        "more than the model's context of 4096; set --prompt_length 96 or less.",
    ),
    ({}, {"max_completion_length": 4096}, "set a smaller --max_completion_length than 4096."),
    ({"num_processes": 2}, {}, "--num_processes is 2: without --accelerate_config one process trains"),
    ({"accelerate_config": "fsdp2"}, {}, "--accelerate_config is fsdp2: it does not say how many devices there are"),
    (
        {"accelerate_config": "own.yaml", "num_processes": 2},
        {},
        "--accelerate_config is own.yaml: a plan reads no such",
    ),
    ({"reward_url": "localhost:8000"}, {}, "--reward_url is localhost:8000: that is no address of a server"),
    ({"gold_reward_model": "/nowhere/gold"}, {}, "--gold_reward_model is /nowhere/gold: there is no such folder"),
    ({"model": "/nowhere/model"}, {}, "--model is /nowhere/model: there is no such folder"),
    ({"model": "nobody/no-such-model"}, {}, "its config could not be read"),
    ({"reward_model": "/nowhere/reward"}, {}, "--reward_model is /nowhere/reward: there is no such folder"),
]


@pytest.mark.parametrize(("inputs", "args", "message"), MISTAKES, ids=lambda value: None)
def test_mistakes_are_told_in_a_sentence(
    seven: Path, inputs: dict[str, Any], args: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        plan_of(seven, args=args, **inputs)
    assert message in str(error.value)


def test_a_config_of_no_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 8}))
    with pytest.raises(UserError, match=r"--model is of type vit: its network could not be built"):
        plan_of(tmp_path, device_memory="80GB")
    other = tmp_path / "other.json"
    other.write_text("{")
    with pytest.raises(UserError, match="its config could not be read"):
        plan_of(other, device_memory="80GB")

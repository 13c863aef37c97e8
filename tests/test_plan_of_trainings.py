"""`remax plan` of what `remax train` is given: its files, rewards that are elsewhere, and vLLM."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from planning import GIB, LLAMA_2_7B, plan_of, settings
from remax.cli import main
from remax.config import TrainInputs
from remax.plan.phases import Peak, largest
from remax.recipes import RECIPES
from remax.recording import RunFolder


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a small Llama with a long context."""
    folder = tmp_path_factory.mktemp("shallow")
    small = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps({**LLAMA_2_7B, **small, "num_key_value_heads": 4}))
    return folder


# Files of trainings --------------------------------------------------------------------------------------------------


def run_file(folder: Path, **changes: Any) -> Path:
    """Returns a file for `remax train` with the settings of a starter file of `remax init`, changed; None removes."""
    path = folder / "run.yaml"
    assert main(["init", "lora-24gb", "--output", str(path)]) == 0
    content = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not None}))
    return path


def plan_json(folder: Path, *flags: str) -> dict[str, Any]:
    path = folder / "plan.json"
    assert main(["plan", *flags, "--device_memory", "80GB", "--output_file", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_file_that_init_writes_can_be_planned(recipe: str, tmp_path: Path, shallow: Path) -> None:
    path = tmp_path / "run.yaml"
    assert main(["init", recipe, "--output", str(path)]) == 0
    settings = RECIPES[recipe].settings
    flags = ["--model", str(shallow), *(["--reward_model", str(shallow)] if "reward_model" in settings else [])]
    flags += ["--gold_reward_model", str(shallow)] if "gold_reward_model" in settings else []
    written = plan_json(tmp_path, "--config", str(path), *flags)
    assert ("reward" in written["parameters"]) == ("reward_model" in settings)
    assert written["settings"]["max_completion_length"] == settings["max_completion_length"]
    assert not (tmp_path / settings["output_dir"]).exists()


def test_a_plan_of_a_file_is_that_of_its_settings(
    tmp_path: Path, shallow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = run_file(tmp_path, model=str(shallow), reward_model=str(shallow), gold_reward_funcs=["r.py:f"], save_steps=7)
    read = plan_json(tmp_path, "--config", str(path))
    settings = {
        "max_completion_length": 512,
        "rollout_batch_size": 32,
        "micro_batch_tokens": 4096,
        "dtype": "bfloat16",
        "bf16": True,
        "gradient_checkpointing": True,
        "use_peft": True,
        "lora_r": 32,
    }
    plan = plan_of(shallow, device_memory="80GB", reward_model=str(shallow), args=settings)
    assert read["peak"] == largest(plan.peaks).total
    assert {item.name for item in tmp_path.iterdir()} == {"run.yaml", "plan.json"}, "nothing at the run's --output_dir"


def test_the_config_that_a_run_left_can_be_planned(tmp_path: Path, shallow: Path) -> None:
    inputs = TrainInputs(model=str(shallow), train_dataset="prompts.jsonl", reward_url="http://127.0.0.1:8000")
    folder = RunFolder(str(tmp_path / "out"))
    folder.create({**asdict(inputs), **asdict(settings(use_peft=True))})
    written = plan_json(tmp_path, "--config", str(folder.path / "config.yaml"))
    assert list(written["parameters"]) == ["policy"]
    assert written["settings"]["use_peft"] is True


def test_a_misspelt_setting_of_a_file_is_refused(
    tmp_path: Path, shallow: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(tmp_path, model=str(shallow), eval_datset="x")
    assert main(["plan", "--config", str(path)]) == 2
    assert "remax plan has no setting eval_datset and would ignore it; did you mean eval_dataset" in (
        capsys.readouterr().err
    )


def test_devices_are_those_of_the_training(tmp_path: Path, shallow: Path) -> None:
    shared = {"model": str(shallow), "reward_model": str(shallow)}
    path = run_file(tmp_path, **shared, accelerate_config="zero3", num_processes=4)

    def devices(*flags: str) -> tuple[str, int]:
        inputs = plan_json(tmp_path, "--config", str(path), *flags)["inputs"]
        return inputs["sharding"], inputs["num_devices"]

    assert devices() == ("zero3", 4)
    assert devices("--num_devices", "8") == ("zero3", 8)
    assert devices("--sharding", "ddp") == ("ddp", 4)
    path.unlink()
    run_file(tmp_path, **shared, accelerate_config="own.yaml", num_processes=1)
    assert devices() == ("none", 1)


def test_an_output_file_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, shallow: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", str(shallow), "--output_file", str(shallow)]) == 2
    assert f"--output_file is {shallow}: it cannot be written (" in capsys.readouterr().err


# Rewards and engines elsewhere ----------------------------------------------------------------------------------------


def test_a_reward_server_takes_no_memory(shallow: Path) -> None:
    served = plan_of(shallow, device_memory="80GB", reward_url="http://127.0.0.1:8000")
    function = plan_of(shallow, device_memory="80GB", reward_funcs=["any.py:function"])
    assert served.parameters == function.parameters
    assert served.peaks == function.peaks


def test_a_gold_reward_model_counts_in_evaluations_alone(shallow: Path) -> None:
    args = {"use_peft": True, "bf16": True}
    without = plan_of(shallow, device_memory="80GB", reward_funcs=["any.py:function"], args=args)
    judged = plan_of(
        shallow, device_memory="80GB", reward_funcs=["any.py:function"], gold_reward_model=shallow, args=args
    )
    for phase in ("rollout", "reference", "update"):
        assert judged.peaks[phase] == without.peaks[phase]
    scoring = judged.peaks["reward"]
    assert scoring.moment == "gold scoring, in evaluations"
    policy = plan_of(shallow, device_memory="80GB").parameters["policy"]
    scorer = policy - 32000 * 256 + 256  # a head of one row
    assert scoring.weights == without.peaks["rollout"].weights + 4 * scorer


def test_a_colocated_vllm_takes_its_fraction_in_rollouts(shallow: Path) -> None:
    args = {"bf16": True, "use_peft": True, "dtype": "bfloat16", "rollout_engine": "vllm"}

    def peaks(**changes: Any) -> dict[str, Peak]:
        return plan_of(shallow, device_memory="80GB", reward_funcs=["any.py:f"], args={**args, **changes}).peaks

    asleep, awake = peaks(), peaks(vllm_enable_sleep_mode=False)
    assert asleep["rollout"].own == int(0.3 * 80 * GIB)
    assert peaks(vllm_gpu_memory_utilization=0.5)["rollout"].own == 40 * GIB
    assert asleep["update"] == peaks(rollout_engine="embedded")["update"]
    for phase in ("reward", "reference", "update"):
        assert awake[phase].total - asleep[phase].total == int(0.3 * 80 * GIB)
    assert peaks(vllm_mode="server")["rollout"].own == 0


def test_vllm_is_told_in_one_line(shallow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["plan", "--model", str(shallow), "--rollout_engine", "vllm", "--device_memory", "80GB", "--bf16"]

    def line(*flags: str) -> str:
        assert main([*shared, *flags]) == 0
        (found,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("vLLM:"))
        return found

    assert (
        line() == "vLLM: 24.0 GiB of each device in rollouts, and nothing between them (--vllm_gpu_memory_utilization)."
    )
    assert "24.0 GiB of each device all the time" in line("--vllm_enable_sleep_mode", "false")
    assert "the memory of its server is not counted" in line("--vllm_mode", "server")
    shared[5:7] = []
    assert "what it takes of a CPU's memory is not known" in line()


def test_prompts_are_no_longer_than_the_context_lets_them(shallow: Path) -> None:
    assert plan_of(shallow, device_memory="80GB", args={"max_completion_length": 4000}).work.prompt_length == 96
    assert plan_of(shallow, device_memory="80GB", args={"max_completion_length": 3000}).work.prompt_length == 512

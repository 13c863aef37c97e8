"""The supervised stages are resumed exactly, refuse what `remax train` refuses, and stop when they are asked to."""

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, LlamaConfig

from remax.checkpoint.files import list_checkpoints, path_of, problem_of
from remax.checkpoint.lock import RunLock
from remax.config import DPOConfig, RewardConfig, SFTConfig
from remax.errors import Interrupted, UserError
from remax.stages import run as stage_run
from remax.stages.dpo import run_dpo
from remax.stages.reward import run_reward
from remax.stages.sft import run_sft
from tiny_models import tiny_model
from toy_tokenizers import EOS, VOCAB_SIZE, toy_tokenizer

STEPS = 6
ANSWERS = [{"prompt": f"{c}?", "completion": f" {c * n}."} for n, c in enumerate("abcdefghij", start=1)]
PAIRS = [{"prompt": f"{c}?", "chosen": f" {c * n}.", "rejected": f" {c}!"} for n, c in enumerate("abcdefgh", start=1)]


def language_model() -> Any:
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, eos_token_id=EOS)
    model.generation_config.eos_token_id = EOS
    return model


def reward_model() -> Any:
    config = LlamaConfig(**{**language_model().config.to_dict(), "num_labels": 1, "pad_token_id": 0})
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


STAGES: dict[str, tuple[Any, Any, Any, Any]] = {
    "sft": (run_sft, SFTConfig, language_model, ANSWERS),
    "reward": (run_reward, RewardConfig, reward_model, PAIRS),
    "dpo": (run_dpo, DPOConfig, language_model, PAIRS),
}


def run(stage: str, out: Path, *, rows: Any = None, **settings: Any) -> dict[str, float]:
    function, config, model, own_rows = STAGES[stage]
    defaults = {"max_steps": STEPS, "save_steps": 2, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2}
    data = Dataset.from_list(rows or own_rows)
    metrics: dict[str, float] = function(
        config(**{**defaults, "output_dir": str(out), "report_to": ["none"], **settings}),
        model(),
        data,
        Dataset.from_list(own_rows),
        toy_tokenizer("<s> $A", bos_token="<s>"),
    )
    return metrics


def outcome(out: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "model": (out / "model" / "model.safetensors").read_bytes(),
        "eval": (out / "eval.json").read_text(),
        "metrics": [json.dumps(line) for line in lines],
        "steps": [line["step"] for line in lines],
    }


class Stop(Exception):
    """Stands for whatever ends a process."""


def act_in(step: int, monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Has something happen in the middle of a step, once."""
    log = stage_run.MetricsLog.on_log

    def acts(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        log(self, args, state, *rest, **kwargs)
        if state.global_step == step:
            monkeypatch.setattr(stage_run.MetricsLog, "on_log", log)
            action()

    monkeypatch.setattr(stage_run.MetricsLog, "on_log", acts)


def stop() -> None:
    raise Stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of `sft`."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run("sft", out)
    return out


@pytest.mark.parametrize("stage", ["sft", "dpo", pytest.param("reward", marks=pytest.mark.slow)])
def test_a_resumed_stage_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    settings = {"sft": {"use_peft": True, "lora_dropout": 0.1}, "reward": {}, "dpo": {"use_peft": True}}[stage]
    expected = run(stage, tmp_path / "whole", **settings)
    act_in(5, monkeypatch, stop)
    with pytest.raises(Stop):
        run(stage, tmp_path / "parts", **settings)
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == ["step-000002", "step-000004"]
    assert not list(tmp_path.rglob("training_args.bin")), "no pickle of settings"
    found = run(stage, tmp_path / "parts", **settings, resume="auto")
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "parts")
    assert outcome(tmp_path / "parts")["steps"] == list(range(1, STEPS + 1))
    assert found == expected
    assert not list((tmp_path / "parts").rglob("checkpoint-*"))

    again = run(stage, tmp_path / "parts", **settings, resume="auto")
    assert again == pytest.approx(expected), "a finished one only tells its figures"


def test_a_stage_refuses_what_it_cannot_go_on_with(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    act_in(5, monkeypatch, stop)
    with pytest.raises(Stop):
        run("sft", out)
    with pytest.raises(UserError, match=r"learning_rate: 0.01 -> 0.02.*--allow_config_change"):
        run("sft", out, resume="auto", learning_rate=0.02)
    with pytest.raises(UserError, match="it holds a run of `remax sft`, which `remax dpo` cannot go on with"):
        run("dpo", out, resume="auto")
    with pytest.raises(UserError, match="the examples: "):
        run("sft", out, resume="auto", rows=ANSWERS[::-1])
    with pytest.raises(UserError, match=r"already holds a run .*--resume auto"):
        run("sft", out)
    damaged = path_of(out, 4) / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run("sft", out, resume="auto")
    assert f"{path_of(out, 4)} cannot be used: optimizer.pt has " in capsys.readouterr().out
    assert outcome(whole) == outcome(out)


def test_a_state_that_does_not_fit_a_stage_costs_no_newer_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("sft", out, use_peft=True, max_steps=4)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = {"max_steps": 4, "use_peft": True, "lora_r": 5, "allow_config_change": True}
    with pytest.raises(UserError, match=r"step-000002: its state does not fit the model .*; resume with the --model"):
        run("sft", out, resume=str(path_of(out, 2)), **again)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_finishes_the_step_of_a_stage_and_saves(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    act_in(3, monkeypatch, lambda: os.kill(os.getpid(), number))
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped after step \d, with its state saved in .*--resume auto") as stopped:
        run("sft", tmp_path / "parts", save_steps=0)
    assert stopped.value.exit_code == 128 + number
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert [problem_of(path) for path in list_checkpoints(tmp_path / "parts")] == [None]
    run("sft", tmp_path / "parts", save_steps=0, resume="auto")
    assert outcome(whole) == outcome(tmp_path / "parts")


def test_a_stage_killed_before_it_wrote_its_model_writes_it(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stage_run.StageRun, "save", lambda *args, **kwargs: stop())
        with pytest.raises(Stop):
            run("sft", tmp_path / "parts")
    run("sft", tmp_path / "parts", resume="auto")
    assert outcome(whole) == outcome(tmp_path / "parts")


def test_no_other_run_gets_the_folder_before_the_model_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, handler, seen = tmp_path / "out", signal.getsignal(signal.SIGINT), []

    def saves(*args: Any, **kwargs: Any) -> None:
        with pytest.raises(UserError, match="a run is going on there"):
            RunLock(out).check_free()
        seen.append(signal.getsignal(signal.SIGINT))

    monkeypatch.setattr(stage_run, "save_model", saves)
    run("sft", out)
    assert seen == [handler], "Ctrl-C stops at once, as no step has to be finished"
    RunLock(out).check_free()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64")])
def test_a_full_disk_ends_a_stage_in_one_sentence_and_costs_no_older_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save = transformers.Trainer._save_optimizer_and_scheduler

    def full(self: Any, folder: str) -> None:
        save(self, folder)
        if self.state.global_step == 4:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(
            UserError, match=r"a checkpoint could not be written \((No space|unexpected pos).*; free space"
        ):
            run("sft", tmp_path / "out")
    assert list_checkpoints(tmp_path / "out") == [path_of(tmp_path / "out", 2)]
    run("sft", tmp_path / "out", resume="auto")
    assert outcome(whole) == outcome(tmp_path / "out")

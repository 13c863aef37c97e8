"""What the supervised stages share with others: trackers, the hub and the card, as `remax train` does."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaForCausalLM

from remax.checkpoint.files import list_checkpoints
from remax.config import SFTConfig
from remax.errors import UserError
from remax.hub import PushFailed
from remax.stages import run as stage_run
from remax.trackers import LOGGER_TYPE_TO_CLASS
from stages_together import CONFIG, STAGES
from test_hub import LocalTokenNotFoundError, error, hub  # noqa: F401
from test_trackers import Recorder, clean_environment, recorder, wandb_records  # noqa: F401
from toy_tokenizers import toy_tokenizer
from toy_training import read


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "small"
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(folder)
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(folder)
    return folder


def run(stage: str, base: Path, out: Path, *, held_out: bool = True, **settings: Any) -> dict[str, float]:
    """Returns what a run of three steps gives."""
    function, config, _, rows = STAGES[stage]
    flags = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-3, "report_to": "none", **settings}
    data = Dataset.from_list(rows)
    run_config = {"model": str(base), "train_dataset": "someone/rows", **flags, "output_dir": str(out)}
    metrics: dict[str, float] = function(
        config(output_dir=str(out), **flags), str(base), data, data if held_out else None, run_config=run_config
    )
    return metrics


# Trackers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_tracker_gets_every_step_and_what_was_held_out(
    stage: str,
    base: Path,
    recorder: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    metrics = run(stage, base, tmp_path / "out", report_to="tensorboard")
    (tracker,) = recorder.made
    *steps, held_out = tracker.logged
    assert [step for step, _ in steps] == [1, 2, 3]
    for (_, logged), line in zip(steps, read(tmp_path / "out" / "metrics.jsonl"), strict=True):
        assert logged == {name: value for name, value in line.items() if name != "step"}
        assert {"loss", "grad_norm", "learning_rate", "epoch", "num_processes"} <= set(logged)
    assert held_out == (3, {name: value for name, value in metrics.items() if name.startswith("eval/")})
    assert tracker.num_finished == 1
    assert tracker.config["batch_size"] == 4


def test_a_tracker_hears_how_a_run_failed(
    base: Path,
    recorder: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends: list[Any] = []
    monkeypatch.setattr("remax.trackers._finish", lambda tracker, why: ends.append(type(why)))
    with pytest.raises(UserError, match="nothing is learned from here on"):
        run("sft", base, tmp_path / "out", report_to="tensorboard", learning_rate=1e30, max_grad_norm=0)
    monkeypatch.setattr(stage_run.StageRun, "save", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run("sft", base, tmp_path / "other", report_to="tensorboard")
    assert ends == [UserError, ZeroDivisionError]


def test_a_tracker_that_cannot_start_stops_a_stage_before_its_first_step(
    base: Path,
    recorder: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Recorder, "breaks", ("start",))
    with pytest.raises(UserError, match=r"^--report_to is tensorboard: it could not be started \(ConnectionError"):
        run("sft", base, tmp_path / "out", report_to="tensorboard")
    assert not (tmp_path / "out").exists()


def test_tensorboard_goes_on_where_a_stage_is_resumed(base: Path, tmp_path: Path) -> None:
    """What was logged behind the checkpoint is logged again, and counts once."""
    out, settings = tmp_path / "out", {"report_to": "tensorboard", "save_steps": 2, "allow_config_change": True}
    run("sft", base, out, held_out=False, **settings)
    (out / "model").rename(tmp_path / "former")
    run("sft", base, out, held_out=False, **settings, resume=str(list_checkpoints(out)[0]))
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert logged == [(line["step"], pytest.approx(line["loss"])) for line in read(out / "metrics.jsonl")]
    assert len(logged) == 3


def test_wandb_offline(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run("dpo", base, tmp_path / "out", report_to="wandb", project="pairs", run_name="night run")
    begun, history, exits = wandb_records(tmp_path / "out")
    assert (begun.project, begun.display_name) == ("pairs", "night run")
    lines = read(tmp_path / "out" / "metrics.jsonl")
    assert [own["loss"] for own in history[:3]] == pytest.approx([line["loss"] for line in lines])
    assert "eval/accuracy" in {name for own in history for name in own}
    assert exits == [0]


def test_mlflow_in_a_local_store(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    metrics = run("reward", base, tmp_path / "out", report_to="mlflow", project="pairs", run_name="night run")
    (found,) = mlflow.search_runs(experiment_names=["pairs"], output_format="list")
    assert (found.info.run_name, found.info.status) == ("night run", "FINISHED")
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "loss")
    lines = read(tmp_path / "out" / "metrics.jsonl")
    assert [(entry.step, entry.value) for entry in history] == [(ln["step"], pytest.approx(ln["loss"])) for ln in lines]
    assert found.data.metrics["eval.accuracy"] == metrics["eval/accuracy"]


def test_trackio(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="Trackio is not installed")
    run("sft", base, tmp_path / "out", report_to="trackio", project="texts", run_name="night run")
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    logged = [line for line in storage.get_logs("texts", "night run") if "loss" in line]
    lines = read(tmp_path / "out" / "metrics.jsonl")
    assert [(own["step"], own["loss"]) for own in logged] == [(ln["step"], pytest.approx(ln["loss"])) for ln in lines]


def test_trackers_that_are_not_there_are_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tensorboard" in LOGGER_TYPE_TO_CLASS
    monkeypatch.setattr("remax.trackers.get_available_trackers", lambda: ["tensorboard", "aim"])
    with pytest.raises(UserError, match=r"^--report_to is wandb: .* set tensorboard or aim, or none\.$"):
        run("sft", base, tmp_path / "out", report_to="wandb")
    with pytest.raises(UserError, match=r"^--report_to is \['none', 'aim'\]: .*; set trackers, or none alone\.$"):
        SFTConfig(report_to=["none", "aim"])
    assert not (tmp_path / "out").exists()


# The hub and the card -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_is_pushed_when_it_is_done_and_again_when_it_is_resumed(
    stage: str,
    base: Path,
    hub: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = {"push_to_hub": True, "hub_model_id": "lab/small", "hub_private_repo": True, "hub_revision": "night"}
    out = tmp_path / "out"
    run(stage, base, out, **settings)
    assert hub.names == ["whoami", "create_repo", "create_branch", "upload_folder"]
    assert hub.calls[1][1] == {"repo_id": "lab/small", "private": True, "exist_ok": True}
    upload = hub.calls[3][1]
    assert (upload["repo_id"], upload["revision"], upload["folder_path"]) == ("lab/small", "night", out / "model")
    assert upload["commit_message"] == f"Model after 3 steps of remax {stage}"
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= set(hub.uploaded)

    run(stage, base, out, **settings, resume="auto")
    assert hub.names[4:] == ["whoami", "create_repo", "create_branch", "upload_folder"]
    assert hub.calls[-1][1]["commit_message"] == f"Model after 3 steps of remax {stage}"
    assert len(read(out / "metrics.jsonl")) == 3, "nothing was trained again"


def test_what_would_fail_is_said_before_a_model_is_loaded(hub: Any, tmp_path: Path) -> None:  # noqa: F811
    hub.answer = LocalTokenNotFoundError("none")
    with pytest.raises(UserError, match=r"there is no token .* hf auth login, or set .* HF_TOKEN\.$"):
        run("sft", tmp_path / "no-such-model", tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()


def test_a_push_that_fails_leaves_the_run(base: Path, hub: Any, recorder: Any, tmp_path: Path) -> None:  # noqa: F811
    hub.fails = error(500)
    with pytest.raises(PushFailed, match=r"try again with: hf upload ada/out .*out/model \.$"):
        run("sft", base, tmp_path / "out", push_to_hub=True, report_to="tensorboard")
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    assert recorder.made[0].num_finished == 1


@pytest.mark.parametrize(
    ("stage", "task", "words", "columns"),
    [
        ("sft", "text-generation", "after supervised fine-tuning on 9 examples", "| step | loss |"),
        ("reward", "text-classification", "Held-out pairs ranked right", "| step | loss | accuracy |"),
        ("dpo", "text-generation", "| beta | 0.1 |", "| step | loss | accuracy | token accuracy |"),
    ],
)
def test_the_card_has_data_settings_curve_and_what_was_measured(
    stage: str, task: str, words: str, columns: str, base: Path, tmp_path: Path
) -> None:
    run(stage, base, tmp_path / "out", use_peft=True, beta=0.1) if stage == "dpo" else run(
        stage, base, tmp_path / "out"
    )
    text = (tmp_path / "out" / "model" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "datasets": ["someone/rows"],
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["remax"],
    }
    assert str(tmp_path) not in text
    assert str(base.parent) not in text
    assert "<code>small</code>" in text
    assert "eld-out" in text
    assert words in text
    lines = text.splitlines()
    for line in ("| train_dataset | someone/rows |", "| batch_size | 4 |", "| learning_rate | 0.001 |"):
        assert line in lines
    start = lines.index(columns) + 2
    losses = [float(line.strip("|").split("|")[1]) for line in lines[start : start + 3]]
    assert losses == pytest.approx([line["loss"] for line in read(tmp_path / "out" / "metrics.jsonl")], rel=1e-3)

"""Trackers, each read back with its own tools: what they got is what metrics.jsonl and completions.jsonl have."""

import importlib
import json
import math
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from remax.config import ReMaxConfig
from remax.errors import UserError
from remax.recording import RunFolder
from remax.trackers import Trackers, public_settings, table_of
from toy_training import make_trainer, read, vowels

HOSTILE = "<script>alert(1)</script> | *bold* ![x](http://x)\n# end"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def hostile(completions: list[str], log_extra: Any, **columns: Any) -> list[float]:
    log_extra("note", [HOSTILE for _ in completions])
    return vowels(completions)


def run(folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """Returns the metrics of a training of three steps."""
    make_trainer(folder, hostile, max_steps=3, run_name="night run", project="vowels", **settings).train()
    return read(folder / "metrics.jsonl")


def breaks_in_call(number: int) -> Any:
    """Returns a reward function whose call of that number stops the training."""
    calls: list[int] = []

    def breaks(completions: list[str], **_: Any) -> list[Any]:
        calls.append(1)
        return ["x" if len(calls) == number else 1.0] * len(completions)

    return breaks


# Without any package --------------------------------------------------------------------------------------------------


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory = "tensorboard", True
    made: "list[Recorder]" = []  # noqa: RUF012
    breaks: tuple[str, ...] = ()

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments, self.config, self.logged, self.num_finished, self.num_tries = arguments, None, [], 0, 0
        self.writer = self
        self.made.append(self)

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None:
        if "start" in self.breaks:
            raise ConnectionError("no <b>way</b>")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.num_tries += 1
        if "log" in self.breaks:
            raise ConnectionError("gone")
        self.logged.append((step, values))

    def add_text(self, *_: Any, **__: Any) -> None: ...
    def flush(self) -> None: ...

    def finish(self) -> None:
        self.num_finished += 1


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder


def test_a_tracker_gets_every_finite_metric_of_every_step_and_is_finished(recorder: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", report_to=["tensorboard"], max_steps=2, method="reinforce")
    trainer.train()
    (tracker,) = recorder.made
    assert [step for step, _ in tracker.logged] == [1, 2]
    for (_, logged), line in zip(tracker.logged, read(tmp_path / "out" / "metrics.jsonl"), strict=True):
        assert logged == {name: value for name, value in line.items() if value is not None and name != "step"}
        assert "reward/greedy" not in logged, "NaN: the method draws no greedy completions"
    assert tracker.num_finished == 1
    assert tracker.config["batch_size"] == 4
    assert trainer.accelerator.get_tracker("tensorboard") is tracker, "callbacks find it"


def test_what_is_not_finite_is_not_logged(recorder: Any, tmp_path: Path) -> None:
    trackers = Trackers(ReMaxConfig(report_to="tensorboard"), RunFolder(str(tmp_path)), say=print)
    trackers.start(SimpleNamespace(trackers=[]), {}, step=0, max_steps=1)  # type: ignore[arg-type]
    trackers.log({"eval/kl": math.nan, "eval/reward": 2.0, "eval/gold": math.inf}, 7)
    assert recorder.made[0].logged == [(7, {"eval/reward": 2.0})]


def test_a_tracker_is_finished_when_the_training_fails(recorder: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", lambda completions, **_: ["x"] * len(completions), report_to="tensorboard")
    with pytest.raises(UserError):
        trainer.train()
    assert recorder.made[0].num_finished == 1


def test_a_tracker_that_cannot_start_stops_the_run_before_its_first_step(
    recorder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "breaks", ("start",))
    trainer = make_trainer(tmp_path / "out", report_to="tensorboard")
    with pytest.raises(UserError, match=r"^--report_to is tensorboard: it could not be started \(ConnectionError"):
        trainer.train()
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_cannot_be_reached_does_not_end_the_training(
    recorder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "breaks", ("log",))
    trainer = make_trainer(tmp_path / "out", report_to="tensorboard", max_steps=5, log_completions=False)
    notes: list[str] = []
    monkeypatch.setattr(trainer.view, "note", notes.append, raising=False)
    trainer.train()
    assert len(read(tmp_path / "out" / "metrics.jsonl")) == 5
    warnings = [note for note in notes if "--report_to" in note]
    assert warnings == [
        "Warning: --report_to tensorboard: something was not logged (ConnectionError: gone).",
        "Warning: --report_to tensorboard: nothing more is logged there.",
    ]
    assert recorder.made[0].num_tries == 3, "then no step waits for it any more"


def test_only_the_process_that_writes_tracks(recorder: Any, tmp_path: Path) -> None:
    args = ReMaxConfig(output_dir=str(tmp_path / "out"), report_to=["tensorboard"])
    trackers = Trackers(args, RunFolder(args.output_dir, writes=False), say=print)
    trackers.start(None, {}, step=0, max_steps=1)  # type: ignore[arg-type]
    trackers.log({"reward": 1.0}, 1)
    assert recorder.made == []
    assert not (tmp_path / "out").exists()


def test_nothing_secret_is_in_the_settings_that_trackers_get() -> None:
    settings = {
        "batch_size": 3,
        "top_p": None,
        "vllm_server_base_url": "http://me:pw@host:1",
        "hub_token": "hf_x",
        "micro_tokens": 2,
    }
    assert public_settings(settings) == {
        "batch_size": 3,
        "vllm_server_base_url": "http://***@host:1",
        "micro_tokens": 2,
    }


def test_a_table_has_columns_of_one_type_each() -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "é"}], "reward": math.nan, "rewards": {"a": 1.0}, "mixed": 1},
        {"prompt": "x", "reward": 2.0, "rewards": {"a": math.inf}, "mixed": "one"},
    ]
    assert table_of(rows) == {
        "prompt": ['[{"role": "user", "content": "é"}]', "x"],
        "reward": [None, 2.0],
        "mixed": ["1", "one"],
        "rewards/a": [1.0, None],
    }


@pytest.mark.parametrize("name", ["project", "run_name"])
def test_names_that_no_tracker_takes_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"^--{name} is"):
        ReMaxConfig(**{name: "a\nb"})


# The real ones --------------------------------------------------------------------------------------------------------


def test_tensorboard(tmp_path: Path) -> None:
    metrics = run(tmp_path / "out", report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    for name in ("reward", "reward/greedy", "completions/mean_length"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(line["step"], pytest.approx(line[name])) for line in metrics]
    tables = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("completions/text_summary")]
    assert len(tables) == 3
    assert all(len(table.splitlines()) == 2 + 4 for table in tables), "a row per completion, whatever is in it"
    assert "alert" in tables[0]
    assert not any(mark in table for table in tables for mark in ("<script>", "*bold*", "![x]"))


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    metrics = run(tmp_path / "out", report_to="wandb")
    begun, history, exits = wandb_records(tmp_path / "out")
    assert (begun.project, begun.display_name) == ("vowels", "night run")
    assert len(history) == 3
    for line, logged in zip(metrics, history, strict=True):
        assert logged["_step"] == line["step"]
        assert {name: logged[name] for name in ("reward", "reward/gap")} == pytest.approx(
            {name: line[name] for name in ("reward", "reward/gap")}
        )
        assert (logged["completions/_type"], logged["completions/nrows"]) == ("table-file", 4)
    assert exits == [0]
    assert wandb.run is None, "it was finished"

    (table, *_) = sorted((tmp_path / "out" / "wandb").rglob("completions_*.table.json"))
    content = json.loads(table.read_text())
    assert HOSTILE in content["data"][0]


def test_wandb_says_when_a_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    breaks = breaks_in_call(2)
    with pytest.raises(UserError):
        make_trainer(tmp_path / "out", breaks, report_to="wandb").train()
    assert wandb_records(tmp_path / "out")[2] == [1]


def test_wandb_without_a_key_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    with pytest.raises(UserError, match=r"^--report_to is wandb: there is no key .* WANDB_MODE=offline\.$"):
        make_trainer(tmp_path / "out", model="no-such-model", report_to="wandb")


def wandb_records(folder: Path) -> tuple[Any, list[dict[str, Any]], list[int]]:
    """Returns the run, its history and its exit codes, from the file that `wandb sync` would upload.

    Weights & Biases has a program of its own write it, which may end a little later.
    """
    until = time.monotonic() + 20
    while not (records := _wandb_records(folder))[2] and time.monotonic() < until:
        time.sleep(0.2)
    return records


def _wandb_records(folder: Path) -> tuple[Any, list[dict[str, Any]], list[int]]:
    proto = importlib.import_module("wandb.proto.wandb_internal_pb2")
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    begun, history, exits = [], [], []
    for data in leveldb_records(file.read_bytes()):
        record = proto.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            begun.append(record.run)
        elif kind == "history":
            items = record.history.item
            history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        elif kind == "exit":
            exits.append(record.exit.exit_code)
    return (begun or [None])[-1], history, exits


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Yields the records of a log of LevelDB: blocks of 32 KiB, in which pieces say if they begin or end a record."""
    position, record = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # all of it, or its end
            yield record
            record = b""


def test_mlflow_in_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    metrics = run(tmp_path / "out", report_to="mlflow", save_steps=1)
    client = mlflow.MlflowClient()
    (found,) = mlflow.search_runs(experiment_names=["vowels"], output_format="list")
    assert (found.info.run_name, found.info.status) == ("night run", "FINISHED")
    assert found.data.params["batch_size"] == "4"
    for name in ("reward", "reward/greedy", "rewards/hostile/mean"):
        history = client.get_metric_history(found.info.run_id, name.replace("/", "."))
        assert [(entry.step, entry.value) for entry in history] == [
            (line["step"], pytest.approx(line[name])) for line in metrics
        ]
    table = client.load_table(found.info.experiment_id, "completions/step-000003.json", [found.info.run_id])
    assert list(table["completion"]) == [c["completion"] for c in read(tmp_path / "out" / "completions.jsonl")[-4:]]

    make_trainer(
        tmp_path / "out", hostile, max_steps=3, project="vowels", report_to="mlflow", save_steps=1, resume="auto"
    ).train()
    assert len(mlflow.search_runs(experiment_names=["vowels"], output_format="list")) == 1


def test_mlflow_goes_on_with_the_run_of_a_resumed_training_and_says_when_one_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from the environment")
    breaks = breaks_in_call(2)
    with pytest.raises(UserError):
        make_trainer(tmp_path / "out", breaks, report_to="mlflow", save_steps=1, max_steps=3).train()
    (found,) = mlflow.search_runs(experiment_names=["from the environment"], output_format="list")
    assert found.info.status == "FAILED"
    make_trainer(tmp_path / "out", breaks, report_to="mlflow", save_steps=1, max_steps=3, resume="auto").train()
    (found,) = mlflow.search_runs(experiment_names=["from the environment"], output_format="list")
    assert found.info.status == "FINISHED"
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "reward")
    assert [entry.step for entry in history] == [1, 2, 3]


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="Trackio is not installed")
    metrics = run(tmp_path / "out", report_to="trackio")
    found = trackio.Api().runs("vowels")
    assert [own.name for own in found] == ["night run"]
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    lines = storage.get_logs("vowels", "night run")
    logged, tables = ([line for line in lines if name in line] for name in ("reward", "completions"))
    assert [(line["step"], line["reward/greedy"]) for line in logged] == [
        (line["step"], pytest.approx(line["reward/greedy"])) for line in metrics
    ]
    assert [line["step"] for line in tables] == [1, 2, 3]
    assert tables[0]["completions"]["_value"][0]["note"] == HOSTILE

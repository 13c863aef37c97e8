"""A resumed training is the uninterrupted one, bit by bit; whatever is saved is needed for that."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from remax.checkpoint import state
from remax.checkpoint.files import list_checkpoints, path_of, step_of
from remax.errors import GuardStop, UserError
from toy_training import lively, make_trainer, policy, read

STEPS, STOPPED_IN = 6, 5


class Stop(Exception):
    """Stands for whatever ends a process."""


class StopsIn(TrainerCallback):  # type: ignore[misc]
    """Ends the training once a step is taken, before it is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Stop


def train(folder: Path, *, reward: Any = lively, until: int | None = None, **settings: Any) -> Any:
    """Trains, or ends in the middle of it, and returns the trainer."""
    defaults = {"max_steps": STEPS, "save_steps": 2, "callbacks": [StopsIn(until)] if until else []}
    trainer = make_trainer(folder, reward, **{**defaults, **settings})
    if until is None:
        trainer.train()
    else:
        with pytest.raises(Stop):
            trainer.train()
    return trainer


def cleaned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns lines of metrics without times and memory."""
    noise = ("time/", "memory", "tokens_per_second")
    return [{key: value for key, value in line.items() if not key.startswith(noise)} for line in lines]


def outcome(folder: Path) -> dict[str, Any]:
    """Returns everything that a run left and that has to be the same, byte by byte."""
    files = ["model/model.safetensors", "model/adapter/adapter_model.safetensors", "best_model/model.safetensors"]
    there = {
        name: (folder / name).read_bytes()
        for name in [*files, "completions.jsonl", "eval.jsonl"]
        if (folder / name).exists()
    }
    return {**there, "metrics": [json.dumps(line) for line in cleaned(read(folder / "metrics.jsonl"))]}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns, for settings, the folder of an uninterrupted training and that of one that was ended; made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(settings: dict[str, Any]) -> tuple[Path, Path]:
        key = repr(sorted(settings.items(), key=str))
        if key not in made:
            folder = tmp_path_factory.mktemp("runs")
            train(folder / "whole", **settings)
            train(folder / "parts", until=STOPPED_IN, **settings)
            made[key] = folder / "whole", folder / "parts"
        return made[key]

    return make


def resumed_differs(ended: Any, tmp_path: Path, settings: dict[str, Any]) -> bool:
    """Whether a training that is ended and resumed comes out otherwise than one that is not."""
    whole, parts = ended(settings)
    shutil.copytree(parts, tmp_path / "parts")
    train(tmp_path / "parts", **settings, resume="auto")
    expected, found = outcome(whole), outcome(tmp_path / "parts")
    assert expected.keys() == found.keys()
    assert [line["step"] for line in read(tmp_path / "parts" / "metrics.jsonl")] == list(range(1, STEPS + 1))
    return expected != found


def draws(completions: list[str], **_: Any) -> list[float]:
    """A reward that takes from every global random generator."""
    return [r + random.random() + np.random.rand() + torch.rand(()).item() for r in lively(completions)]


EVALUATION = {
    "eval_dataset": Dataset.from_list([{"prompt": "who"}, {"prompt": "and then"}]),
    "eval_steps": 2,
    "num_eval_prompts": 2,
}
PPO = {
    **{"method": "ppo", "target_kl": 0.05, "lr_scheduler_type": "linear", "value_learning_rate": 1e-2},
    **{"num_mini_batches": 2, "num_ppo_epochs": 1},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "remax": {"lr_scheduler_type": "cosine", "beta": 0.1},
    "greedy every second visit": {"greedy_every": 2, "lr_scheduler_type": "constant"},
    "mixed baseline": {"baseline": "mixed", "num_generations": 2},
    "moving average": {"method": "reinforce", "baseline": "moving_average", "lr_scheduler_type": "linear"},
    "evaluations and best model": {**EVALUATION, "warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"},
    "adapter": {"use_peft": True, "beta": 0.1},
    "bfloat16": {"bf16": True},
    "checkpointing and adafactor": {"gradient_checkpointing": True, "optim": "adafactor"},
    "ppo": PPO,
    "ppo with adapters": {**PPO, "use_peft": True},
    "random generators": {"reward": draws},
}


SLOW = ("moving average", "checkpointing and adafactor", "ppo with adapters")
"""What the others cover in part."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in VARIANTS])
def test_a_resumed_training_equals_an_uninterrupted_one(ended: Any, tmp_path: Path, name: str) -> None:
    assert not resumed_differs(ended, tmp_path, VARIANTS[name])


def test_states_of_one_byte_and_stochastic_rounding_are_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    wide = {"hidden_size": 64, "intermediate_size": 64}  # torchao keeps small tensors in full.

    def run(folder: Path, **settings: Any) -> None:
        model = policy(**wide).to(torch.bfloat16)
        trainer = train(folder, model=model, dtype="bfloat16", optim="adamw_torch_8bit", **settings)
        values = [value for own in trainer.policy.optimizer.state.values() for value in own.values()]
        small = [value for value in values if type(value).__name__ == "OptimState8bit"]
        assert small
        copied, codes = state._copied(small[0]), small[0].codes.clone()
        small[0].codes.add_(1)
        assert torch.equal(copied.codes, codes), "what is written in the background is a copy"

    run(tmp_path / "whole")
    run(tmp_path / "parts", until=STOPPED_IN)
    run(tmp_path / "parts", resume="auto")
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "parts")


def forget(key: str) -> Any:
    """Returns a _load that leaves out a part of the state, as a new training has it."""
    load = state._load

    def forgetful(checkpoint: Path) -> dict[str, Any]:
        saved = load(checkpoint)
        learners, parts = saved["learners"], saved["parts"]
        if key == "optimiser":
            learners["policy"]["optimizer"] = {}
        elif key == "value model's optimiser":
            learners["value_model"]["optimizer"] = {}
        elif key == "schedule":
            learners["policy"]["num_steps"] = 0
        elif key == "value model's schedule":
            learners["value_model"]["num_steps"] = 0
        elif key == "greedy rewards":
            parts["method"]["greedy_rewards"] = {"visits": {}, "rewards": {}}
        elif key == "baseline":
            parts["method"]["baseline"] = dict.fromkeys(parts["method"]["baseline"], 0.0)
        elif key == "beta":
            parts["method"]["beta"] = 0.05
        elif key == "number of PPO's steps":
            parts["method"]["num_steps"] = 0
        elif key == "python":
            saved["generators"]["python"] = random.Random(1).getstate()
        elif key == "numpy":
            name, _, *rest = saved["generators"]["numpy"]
            saved["generators"]["numpy"] = (name, list(range(624)), *rest)
        elif key == "torch":
            saved["generators"]["torch"] = torch.Generator().manual_seed(1).get_state()
        return saved

    return forgetful


GREEDY = {"greedy_every": 3, "rows": [{"prompt": p} for p in ("a cat", "the dog sat", "x", "once")]}
PIECES: list[tuple[str, dict[str, Any]]] = [
    ("optimiser", VARIANTS["remax"]),
    ("schedule", VARIANTS["remax"]),
    ("greedy rewards", GREEDY),
    ("baseline", VARIANTS["mixed baseline"]),
    ("baseline", VARIANTS["moving average"]),
    ("value model's optimiser", PPO),
    ("value model's schedule", PPO),
    ("beta", PPO),
    ("number of PPO's steps", PPO),
    ("python", VARIANTS["random generators"]),
    ("numpy", VARIANTS["random generators"]),
    ("torch", VARIANTS["random generators"]),
]


@pytest.mark.parametrize(("key", "settings"), PIECES, ids=[f"{key}-{i}" for i, (key, _) in enumerate(PIECES)])
def test_without_a_piece_of_the_state_the_training_comes_out_otherwise(
    ended: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(state, "_load", forget(key))
    assert resumed_differs(ended, tmp_path, settings), f"{key} was not needed"


@pytest.mark.parametrize("network", ["policy", "value_model"])
def test_without_its_weights_the_training_comes_out_otherwise(
    ended: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    own = state._restore_weights
    monkeypatch.setattr(state, "_restore_weights", lambda *args: None if args[-1].stem == network else own(*args))
    assert resumed_differs(ended, tmp_path, PPO)


@pytest.mark.parametrize(("saved", "here"), [(2, 1), (1, 2), (0, 1)])
def test_a_state_of_another_number_of_gpus_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: int, here: int
) -> None:
    train(tmp_path / "out", max_steps=2)
    (checkpoint,) = list_checkpoints(tmp_path / "out")
    read_state, put = state._load(checkpoint), []
    read_state["generators"]["cuda"] = [torch.tensor(number) for number in range(saved)]
    monkeypatch.setattr(state, "_load", lambda checkpoint: read_state)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *given: put.append(given))
    state.restore_generators(checkpoint)
    assert put == [(torch.tensor(number), number) for number in range(min(saved, here))]


def test_counts_and_the_best_evaluation_are_resumed(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", **EVALUATION)
    train(tmp_path / "parts", until=STOPPED_IN, **EVALUATION)
    parts = train(tmp_path / "parts", resume="auto", **EVALUATION)
    for name in ("global_step", "epoch", "best_metric", "best_global_step"):
        assert getattr(whole.state, name) == getattr(parts.state, name), name
    assert parts.num_tokens == whole.num_tokens == read(tmp_path / "whole" / "metrics.jsonl")[-1]["num_tokens"]
    assert cleaned(parts.state.log_history) == cleaned(whole.state.log_history)


def test_it_goes_on_from_any_checkpoint_and_newer_ones_are_deleted(tmp_path: Path, capsys: Any) -> None:
    settings = {"save_steps": 1, "save_total_limit": 10}
    out = tmp_path / "out"
    train(out, **settings)
    expected = outcome(out)
    (out / "checkpoints" / ".step-000099.partial").mkdir()
    train(out, resume=str(path_of(out, 2)), until=4, **settings)
    assert list(map(step_of, list_checkpoints(out))) == [1, 2, 3]
    assert f"{path_of(out, 6)} is deleted: its steps are taken again." in capsys.readouterr().out
    assert not list((out / "checkpoints").glob(".*")), "what was half-written is deleted too"
    train(out, resume="auto", **settings)
    assert outcome(out) == expected
    assert list(map(step_of, list_checkpoints(out))) == [1, 2, 3, 4, 5, 6]


def test_a_finished_training_is_left_alone_and_a_longer_one_is_a_change(tmp_path: Path, capsys: Any) -> None:
    trainer = train(tmp_path / "out", max_steps=4, lr_scheduler_type="linear")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = make_trainer(tmp_path / "out", lively, max_steps=4, save_steps=2, lr_scheduler_type="linear", resume="auto")
    assert again.session.finished
    assert again.train()["num_tokens"] == trainer.num_tokens
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before

    longer = {"max_steps": STEPS, "save_steps": 2, "lr_scheduler_type": "linear", "resume": "auto"}
    with pytest.raises(UserError, match=r"max_steps: 4 -> 6.*--allow_config_change"):
        make_trainer(tmp_path / "out", lively, **longer)
    trainer = make_trainer(tmp_path / "out", lively, **longer, allow_config_change=True)
    trainer.train()
    rates = [line["learning_rate"] for line in read(tmp_path / "out" / "metrics.jsonl")]
    assert rates == pytest.approx([1e-2 * (1 - i / 4) for i in range(4)] + [1e-2 * (1 - i / 6) for i in (4, 5)])
    assert "max_steps: 4 -> 6" in capsys.readouterr().out


def test_a_run_whose_model_is_missing_only_writes_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between its last checkpoint and the end."""
    train(tmp_path / "whole")
    trainer = make_trainer(tmp_path / "parts", lively, max_steps=STEPS, save_steps=2)
    monkeypatch.setattr(trainer, "save_model", lambda folder: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        trainer.train()
    again = make_trainer(tmp_path / "parts", lively, max_steps=STEPS, save_steps=2, resume="auto")
    monkeypatch.setattr(again, "step", None)
    assert again.train()["step"] == STEPS
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "parts")


def test_a_run_that_left_no_checkpoint_begins_again(tmp_path: Path, capsys: Any) -> None:
    settings = {**EVALUATION, "save_steps": 0}
    train(tmp_path / "whole", **settings)
    train(tmp_path / "parts", until=3, **settings)
    (tmp_path / "parts" / "mine.txt").write_text("kept")
    train(tmp_path / "parts", resume="auto", **settings)
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "parts")
    assert (tmp_path / "parts" / "mine.txt").read_text() == "kept"
    assert "begins again" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "parts" / "checkpoints").glob("step-*")] == [f"step-{STEPS:06d}"]


def test_auto_begins_where_nothing_is_and_a_run_is_refused_without_it(tmp_path: Path) -> None:
    train(tmp_path / "out", max_steps=2, resume="auto")
    with pytest.raises(UserError, match=r"already holds a run .*--resume auto"):
        make_trainer(tmp_path / "out", lively, max_steps=2)
    with pytest.raises(UserError, match=r"--resume is .*step-000009: that is no checkpoint of .*step-000002"):
        make_trainer(
            tmp_path / "out", lively, max_steps=2, resume=str(tmp_path / "out" / "checkpoints" / "step-000009")
        )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="holds no training with checkpoints"):
        make_trainer(tmp_path / "other", lively, resume="auto")


def test_a_run_without_checkpoints_leaves_none(tmp_path: Path) -> None:
    train(tmp_path / "out", max_steps=2, save_steps=-1)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("completions.jsonl", "config.yaml", "metrics.jsonl", "model", "provenance.json"),
    ]
    with pytest.raises(UserError, match="--save_steps is -1: a run without checkpoints cannot be resumed"):
        make_trainer(tmp_path / "out", lively, save_steps=-1, resume="auto")


def test_another_model_or_other_prompts_are_refused(tmp_path: Path) -> None:
    train(tmp_path / "out", until=STOPPED_IN)
    again = {"max_steps": STEPS, "save_steps": 2, "resume": "auto"}
    other = policy()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(UserError, match=r"\(the model: \w{16} -> \w{16}\) and would go on as another one"):
        make_trainer(tmp_path / "out", lively, model=other, **again)
    rows = [{"prompt": p} for p in ("ab", "a cat", "the dog sat", "y", "once upon", "hello there", "no", "tea at five")]
    with pytest.raises(UserError, match="the prompts: "):
        make_trainer(tmp_path / "out", lively, rows=rows, **again)
    make_trainer(tmp_path / "out", lively, **again).train()


def test_weights_of_another_shape_are_refused_even_if_changes_are_allowed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(out, until=STOPPED_IN)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    trainer = make_trainer(
        out, lively, max_steps=STEPS, use_peft=True, resume=str(path_of(out, 2)), allow_config_change=True
    )
    with pytest.raises(UserError, match="its policy has other weights than the one that is trained here"):
        trainer.train()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before, "nothing was deleted"


class StopsAtGuard(TrainerCallback):  # type: ignore[misc]
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise GuardStop("The KL exploded.")


def test_a_guard_that_stops_a_step_leaves_the_state_of_the_step_before(tmp_path: Path) -> None:
    settings = {"max_steps": STEPS, "save_steps": 0, "greedy_every": 2}
    make_trainer(tmp_path / "whole", lively, **settings).train()
    trainer = make_trainer(tmp_path / "parts", lively, callbacks=[StopsAtGuard()], **settings)
    with pytest.raises(GuardStop, match="The KL exploded"):
        trainer.train()
    assert [p.name for p in (tmp_path / "parts" / "checkpoints").glob("step-*")] == ["step-000002"]
    make_trainer(tmp_path / "parts", lively, resume="auto", **settings).train()
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "parts")


def test_a_guard_in_the_middle_of_a_step_does_not_count_its_prompts_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": STEPS, "save_steps": 0, "rows": GREEDY["rows"], "greedy_every": 2}
    make_trainer(tmp_path / "whole", lively, **settings).train()
    trainer = make_trainer(tmp_path / "parts", lively, **settings)
    update = trainer.method.update

    def stops_third(record: Any) -> None:
        if trainer.state.global_step == 2:
            raise GuardStop("No memory.")
        update(record)

    monkeypatch.setattr(trainer.method, "update", stops_third)
    with pytest.raises(GuardStop):
        trainer.train()
    make_trainer(tmp_path / "parts", lively, resume="auto", **settings).train()
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "parts")

"""Steps that are not finite: what is skipped changes nothing, and the run goes on or stops as it was told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from faults import NaNLayer
from guarded_runs import PPO, weights
from remax.cli import main
from remax.errors import GuardStop
from toy_tokenizers import toy_tokenizer
from toy_training import calm_policy, lively, make_trainer, policy, read


class At(TrainerCallback):
    """Switches a layer on for some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.layer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.layer.on = state.global_step + 1 in self.steps


def with_nan(folder: Path, *steps: int, **settings: Any) -> Any:
    """A trainer whose policy gives NaN in the gradient passes of these steps."""
    at = At(*steps)
    trainer = make_trainer(folder, lively, callbacks=[at], **settings)
    at.layer = NaNLayer(trainer.parts.policy.model.norm)
    return trainer


def dumps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "dumps").glob("*"))


def test_a_step_that_is_not_finite_leaves_weights_and_moments_and_goes_on_with_the_schedule(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "lr_scheduler_type": "linear", "beta": 0.2}
    trainer = with_nan(tmp_path / "nan", 2, **settings)
    trainer.train()

    without = make_trainer(tmp_path / "without", lively, **settings)
    update = without.method.update
    without.method.update = lambda record: None if record.step == 2 else update(record)
    without.train()
    assert torch.equal(weights(trainer), weights(without))
    moments, others = (t.policy.optimizer.state_dict()["state"] for t in (trainer, without))
    for index, state in moments.items():
        assert all(torch.equal(value, others[index][name]) for name, value in state.items())
        assert state["step"] == 3

    lines, expected = (read(tmp_path / name / "metrics.jsonl") for name in ("nan", "without"))
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]
    assert [line["learning_rate"] for line in lines] == [line["learning_rate"] for line in expected]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, False]
    assert lines[1]["loss"] is None
    for line, other in ((lines[0], expected[0]), (lines[2], expected[2]), (lines[3], expected[3])):
        assert (line["loss"], line["grad_norm"], line["kl"]) == (other["loss"], other["grad_norm"], other["kl"])
    (news,) = read(tmp_path / "nan" / "alarms.jsonl")
    assert (news["step"], news["event"], news["causes"]) == (2, "skipped", ["the policy's loss"])
    assert news["dump"] == "dumps/step-000002"
    assert dumps(tmp_path / "nan") == ["step-000002"]
    assert not (tmp_path / "without" / "dumps").exists()


def test_rows_without_a_gradient_have_a_loss_that_has_to_be_finite_too(tmp_path: Path) -> None:
    """Every reward is the same, so that nothing is differentiated; the weights are broken all the same."""
    trainer = make_trainer(tmp_path / "out", lambda completions, **_: [1.0] * len(completions), beta=0.0)
    before = weights(trainer)
    trainer.parts.policy.model.norm.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    record = trainer.step(trainer.order.batch(1), 1)
    assert [skipped.what for skipped in record.skipped] == ["loss"]
    assert torch.equal(before, weights(trainer))


@pytest.mark.parametrize("network", ["policy", "value"])
def test_ppo_skips_one_update_and_takes_the_others(tmp_path: Path, network: str) -> None:
    def nth(learner: Any, replaced: Any) -> None:
        """Replaces the second update of the step."""
        own, calls = learner.update, []

        def update(losses: Any, num_losses: int) -> float:
            calls.append(losses)
            return replaced(own, losses, num_losses) if len(calls) == 2 else own(losses, num_losses)

        learner.update = update

    trainers = []
    for name in ("nan", "without"):
        trainer = make_trainer(tmp_path / name, lively, model=calm_policy(1), **PPO, beta=0.2, max_steps=1)
        learner = trainer.policy if network == "policy" else trainer.method.critic
        if name == "nan":
            layer = NaNLayer((trainer.parts.policy.model if network == "policy" else learner.network.body).norm)

            def disturbed(own: Any, losses: Any, num_losses: int, layer: NaNLayer = layer) -> float:
                layer.on = True
                try:
                    return own(losses, num_losses)
                finally:
                    layer.on = False

            nth(learner, disturbed)
        else:
            nth(learner, lambda own, losses, num_losses: 0.0)
        trainer.train()
        trainers.append(trainer)
    assert torch.equal(weights(trainers[0]), weights(trainers[1]))
    (line,) = read(tmp_path / "nan" / "metrics.jsonl")
    assert line["skipped_steps"] == 1
    assert (line["grad_norm"] is None, line["value/grad_norm"] is None) == (network == "policy", network == "value")
    (news,) = read(tmp_path / "nan" / "alarms.jsonl")
    assert news["causes"] == [f"the {'policy' if network == 'policy' else 'value model'}'s loss"]
    assert news["updates"] == 1
    files = {path.name for path in (tmp_path / "nan" / "dumps" / "step-000001").iterdir()}
    assert ("value_model.safetensors" in files) == (network == "value")


def test_skipped_steps_in_a_row_stop_the_run_and_a_good_one_in_between_does_not(tmp_path: Path) -> None:
    with_nan(tmp_path / "apart", 1, 2, 4, 5, max_steps=5, max_skipped_steps=2).train()
    assert read(tmp_path / "apart" / "metrics.jsonl")[-1]["skipped_steps"] == 4
    assert dumps(tmp_path / "apart") == ["step-000001", "step-000002", "step-000004"], "three are kept"

    trainer = with_nan(tmp_path / "row", 2, 3, 4, 5, max_steps=6, max_skipped_steps=2)
    with pytest.raises(
        GuardStop, match=r"3 steps in a row skipped.*--max_skipped_steps is 2: the policy's loss .*remax replay"
    ):
        trainer.train()
    assert [line["step"] for line in read(tmp_path / "row" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (tmp_path / "row" / "checkpoints" / "step-000004").is_dir(), "the state is saved"
    assert trainer.guards.state_dict()["skips"] == {"num_skipped": 3, "in_a_row": 3}


def test_a_resumed_run_counts_and_tells_the_same(tmp_path: Path) -> None:
    """Killed after step 5, it goes on from step 3: counts, alarms and the line of one that is still up."""
    settings = {"max_steps": 7, "save_steps": 3, "alarm_window": 2, "min_entropy_ratio": 0.99, "learning_rate": 3e-2}
    with_nan(tmp_path / "whole", 2, 3, 6, **settings).train()

    class Killed(BaseException):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                raise Killed

    killed = with_nan(tmp_path / "out", 2, 3, 6, **settings)
    killed.callbacks.append(Kill())
    with pytest.raises(Killed):
        killed.train()
    assert len(read(tmp_path / "out" / "metrics.jsonl")) == 5
    with_nan(tmp_path / "out", 2, 3, 6, **settings, resume="auto").train()
    assert (tmp_path / "out" / "alarms.jsonl").read_bytes() == (tmp_path / "whole" / "alarms.jsonl").read_bytes()
    events = {news["event"] for news in read(tmp_path / "whole" / "alarms.jsonl")}
    assert events == {"skipped", "alarm"}
    for folder in ("out", "whole"):
        lines = read(tmp_path / folder / "metrics.jsonl")
        assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2, 2, 3, 3]


def test_a_dump_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path) -> None:
    trainer = with_nan(tmp_path / "out", 1, max_steps=2)
    notes: list[str] = []
    trainer.view.note = notes.append
    trainer.guards.folder = tmp_path / "file"
    (tmp_path / "file").write_text("in the way")
    trainer.train()
    assert any("its batch could not be kept (" in note for note in notes)


def test_the_command_line_exits_with_3_and_replay_shows_why(tmp_path: Path, capsys: Any) -> None:
    """A learning rate that blows the weights up in the first step, as it would in earnest."""
    policy().save_pretrained(tmp_path / "policy")
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(tmp_path / "policy")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": c * 3}) + "\n" for c in "abcdefgh"))
    (tmp_path / "rewards.py").write_text("def e(completions, **_):\n    return [t.count('e') for t in completions]\n")
    out = tmp_path / "out"
    flags = ["--model", tmp_path / "policy", "--train_dataset", tmp_path / "prompts.jsonl", "--output_dir", out]
    flags += ["--reward_funcs", f"{tmp_path / 'rewards.py'}:e", "--reward_timeout_seconds", 0, "--report_to", "none"]
    flags += ["--max_steps", 9, "--batch_size", 4, "--max_completion_length", 6, "--learning_rate", 1e18]
    assert main(["train", *map(str, flags)]) == 3
    said = capsys.readouterr()
    assert "remax: 4 steps in a row skipped, and --max_skipped_steps is 3: the policy's " in said.err
    skipped = [news["step"] for news in read(out / "alarms.jsonl")]
    assert skipped == list(range(skipped[0], skipped[0] + 4))
    assert f"Skipped step {skipped[0]} because the policy's " in said.out
    assert len([line for line in said.err.splitlines() if line.startswith("remax: ")]) == 1
    assert read(out / "metrics.jsonl")[-1]["step"] == skipped[-1]
    assert main(["replay", str(out / read(out / "alarms.jsonl")[0]["dump"])]) == 0
    assert "\nreproduced: " in capsys.readouterr().out

"""`remax replay`: a weight that breaks between rollout and update is found again, with rows and tokens it reached."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults import NaNLayer
from remax.checkpoint.files import write_checkpoint, write_json
from remax.cli import main
from remax.config import ReplayConfig
from remax.errors import UserError
from remax.guards.dumps import KINDS
from remax.guards.replay import run_replay
from toy_tokenizers import toy_tokenizer
from toy_training import lively, make_trainer, policy

PPO = {"method": "ppo", "num_ppo_epochs": 1, "num_mini_batches": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    policy().save_pretrained(folder)
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(folder)
    return str(folder)


def skipped_step(folder: Path, model: str, break_it: Any, **settings: Any) -> tuple[Any, Path]:
    """One step whose rewards come while something is broken; returns its record and the dump."""

    def rewards(completions: list[str], **_: Any) -> list[float]:
        break_it(trainer)
        return lively(completions)

    defaults = {"batch_size": 8, "beta": 0.1, "micro_batch_tokens": 60}
    trainer = make_trainer(folder, rewards, model=model, **{**defaults, **settings})
    record = trainer.step(trainer.order.batch(1), 1)
    assert record.skipped
    return record, folder / "dumps" / "step-000001"


def break_token(token: int) -> Any:
    def break_it(trainer: Any) -> None:
        with torch.no_grad():
            trainer.parts.policy.get_input_embeddings().weight[token] = torch.inf

    return break_it


def rare_token(folder: Path, model: str) -> int:
    """A token that some of the step's completions read and others do not."""
    trainer = make_trainer(folder, lively, model=model, batch_size=8, beta=0.1)
    prompts = trainer.order.batch(1)
    rollout = trainer.parts.roll_out(prompts, num_samples=1, greedy=True, seed=trainer.args.seed, step=1)
    read = [{*c.prompt.token_ids, *c.token_ids[:-1]} for c in rollout.samples]
    inside = [token for c in rollout.samples for token in c.token_ids[2:-1]]
    return next(token for token in inside if 1 < sum(token in own for own in read) < 5)


@pytest.mark.parametrize("method", ["remax", "ppo"])
def test_a_broken_embedding_is_traced_to_the_rows_and_tokens_that_read_it(
    tmp_path: Path, model: str, method: str, capsys: Any
) -> None:
    token = rare_token(tmp_path / "look", model)
    settings = PPO if method == "ppo" else {}
    record, dump = skipped_step(tmp_path / "out", model, break_token(token), **settings)
    replay = run_replay(ReplayConfig(str(dump)))
    assert replay.reproduced
    expected = {}
    for row, sample in enumerate(record.rollout.samples):
        read = [*sample.prompt.token_ids, *sample.token_ids[:-1]]
        if token in read:
            expected[row] = max(0, read.index(token) + 1 - len(sample.prompt.token_ids))
    assert 0 < len(expected) < 8
    assert {found.rows[0] for found in replay.rows} == set(expected)
    for found in replay.rows:
        position = expected[found.rows[0]]
        token_id = record.rollout.samples[found.rows[0]].token_ids[position]
        assert found.first == f"log-probability of token {position} (id {token_id})"
    for found in replay.passes:
        assert found.is_finite == (not set(found.rows) & set(expected))
    assert sorted(row for found in replay.passes for row in found.rows) == list(range(8))
    assert any("norm" in name for name in replay.bad_weights)
    text = capsys.readouterr().out
    assert "\nreproduced: loss nan" in text
    assert "Rows that are not finite" in text


def test_the_loss_and_gradient_of_a_replay_are_those_of_the_step(tmp_path: Path, model: str) -> None:
    """A gradient that overflows in the run alone: the replay, which is finite, has the numbers of a healthy step."""
    for number, settings in enumerate(({}, {"kl_mode": "loss"}, {"use_peft": True, "lora_r": 4}, PPO)):
        healthy = make_trainer(tmp_path / f"healthy{number}", lively, model=model, batch_size=8, beta=0.1, **settings)
        expected = healthy.step(healthy.order.batch(1), 1)
        assert expected.grad_norm > 1e-3

        def break_it(trainer: Any) -> None:
            NaNLayer(
                trainer.parts.policy.get_base_model().model.norm
                if trainer.args.use_peft
                else trainer.parts.policy.model.norm
            ).on = True

        _, dump = skipped_step(tmp_path / f"out{number}", model, break_it, **settings)
        replay = run_replay(ReplayConfig(str(dump)))
        assert not replay.reproduced
        assert replay.loss == pytest.approx(expected.loss, rel=1e-3, abs=1e-5)
        assert replay.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
        assert (replay.rows, replay.bad_weights) == ([], [])


def test_of_lora_only_the_adapter_is_kept(tmp_path: Path, model: str) -> None:
    def break_it(trainer: Any) -> None:
        name, matrix = next((n, p) for n, p in trainer.parts.policy.named_parameters() if "lora_B" in n)
        broken.append(name)
        with torch.no_grad():
            matrix[0, 0] = torch.nan

    broken: list[str] = []
    _, dump = skipped_step(tmp_path / "out", model, break_it, use_peft=True, lora_r=4)
    names = load_file(dump / "policy.safetensors")
    assert names
    assert all("lora_" in name for name in names)
    assert run_replay(ReplayConfig(str(dump))).reproduced


def test_a_broken_value_model_is_dumped_and_replayed(tmp_path: Path, model: str) -> None:
    def break_it(trainer: Any) -> None:
        critic = trainer.method.critic
        own = critic.update

        def update(losses: Any, num_losses: int) -> float:
            with torch.no_grad():
                critic.network.head.weight[0, 0] = torch.inf
            return own(losses, num_losses)

        critic.update = update

    _, dump = skipped_step(tmp_path / "out", model, break_it, **PPO)
    facts = json.loads((dump / "state.json").read_text())
    assert facts["cause"] == "the value model's loss"
    assert load_file(dump / "value_model.safetensors")["head.weight"][0, 0] == torch.inf
    replay = run_replay(ReplayConfig(str(dump)))
    assert replay.reproduced
    assert len(replay.rows) == 8
    assert replay.rows[0].first.startswith("value of token 0 ")


def test_a_made_up_dump_is_refused_in_one_sentence(tmp_path: Path, model: str) -> None:
    _, dump = skipped_step(tmp_path / "out", model, break_token(5), **PPO)
    facts = json.loads((dump / "state.json").read_text())
    tensors = load_file(dump / "samples.safetensors")
    first = facts["samples"][0]

    def refused(said: str, state: Any = facts, samples: Any = tensors, without: str = "") -> None:
        shutil.rmtree(tmp_path / "made_up", ignore_errors=True)

        def fill(folder: Path) -> None:
            write_json(folder / "state.json", state)
            save_file(samples, folder / "samples.safetensors")
            if not without:
                shutil.copy(dump / "policy.safetensors", folder)

        write_checkpoint(tmp_path / "made_up", fill)
        with pytest.raises(UserError, match=said):
            run_replay(ReplayConfig(str(tmp_path / "made_up")))

    for name in facts.keys() & KINDS.keys():
        refused("something else than a dump", {key: value for key, value in facts.items() if key != name})
        refused("something else than a dump", {**facts, name: None})
    for name in first:
        refused("something else than a dump", {**facts, "samples": [{**first, name: {}}, *facts["samples"][1:]]})
    for state in ([], "x", {**facts, "samples": []}, {**facts, "sampling": {**facts["sampling"], "more": 1}}):
        refused("something else than a dump", state)
    for name in ("logprobs", "rewards", "advantages", "experience/mask"):
        refused("something else than a dump", samples={**tensors, name: torch.zeros(1)})
    refused("something else than a dump", samples={"rewards": tensors["rewards"]})
    refused("none of PPO's", samples={name: t for name, t in tensors.items() if name != "experience/returns"})
    refused("policy.safetensors is missing or cannot be read", without="policy")
    beyond = {**first, "prompt_ids": [10**6]}
    refused("it has token 1000000", {**facts, "samples": [beyond, *facts["samples"][1:]]})


def test_what_is_no_dump_exits_with_2(tmp_path: Path, model: str, capsys: Any) -> None:
    _, dump = skipped_step(tmp_path / "out", model, break_token(5), kl_mode="to_go", beta=0.1)

    def refused(path: Path, *flags: str) -> str:
        capsys.readouterr()
        assert main(["replay", str(path), *flags]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("remax: ")]
        return line

    assert "there is no such folder" in refused(tmp_path / "nowhere")
    assert "manifest.json is missing" in refused(tmp_path)
    for file in ("samples.safetensors", "policy.safetensors", "state.json"):
        broken = tmp_path / "broken"
        shutil.copytree(dump, broken)
        content = (broken / file).read_bytes()
        (broken / file).write_bytes(content[:-7])
        assert f"{file} has {len(content) - 7} bytes instead of {len(content)}" in refused(broken)
        (broken / file).write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
        assert f"{file} has changed" in refused(broken)
        shutil.rmtree(broken)

    other = tmp_path / "other"
    policy(hidden_size=16, head_dim=4).save_pretrained(other)
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(other)
    assert "has other weights than the model" in refused(dump, "--model", str(other))
    with pytest.raises(UserError, match="--model is nowhere/at/all: there is no such folder"):
        run_replay(ReplayConfig(str(dump), model="nowhere/at/all"))

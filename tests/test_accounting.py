"""What a step costs: frozen weights in bfloat16, and measured bytes and operations against counts by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from remax import precision
from remax.cli import main
from remax.compare.accounting import with_totals
from remax.compare.measure import LiveTensors, SavedTensors, measure, num_bytes
from remax.components import Components
from remax.config import ReMaxConfig
from remax.models import load_reward_model
from remax.trainer import ReMaxTrainer
from tiny_models import tiny_model
from toy_tokenizers import BOS, EOS, PAD, VOCAB_SIZE, toy_tokenizer

PROMPTS = ["ab", "a cat", "the dog sat", "x", "once upon", "hello there", "no", "tea at five"]
MEDIUM = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
LINEAR = 4 * (4 * 256 * 256 + 3 * 256 * 688)
"""Weights of the linear layers of the medium body."""
OTHERS = VOCAB_SIZE * 256 + (2 * 4 + 1) * 256
"""Its embedding and norms."""


class Silent:
    """A view that shows nothing."""

    def start(self, max_steps: int, step: int = 0) -> None: ...
    def update(self, metrics: Any, sample: Any) -> None: ...
    def note(self, line: str) -> None: ...
    def stop(self) -> None: ...


def save_pair(folder: Path, sizes: dict[str, int], **more: Any) -> dict[str, str]:
    """Writes a policy and a reward model of the same body; returns their folders."""
    special = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": BOS}
    settings = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 128, "tie_word_embeddings": False, **special}
    folders = {}
    for name, model_class in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        torch.manual_seed(0)
        model = model_class(LlamaConfig(**{**settings, **sizes, **more}, num_labels=1))
        model.save_pretrained(folder / name)
        toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(folder / name)
        folders[name] = str(folder / name)
    return folders


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_pair(tmp_path_factory.mktemp("medium"), MEDIUM)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_pair(tmp_path_factory.mktemp("small"), SMALL, num_key_value_heads=2)


def make_trainer(folder: Path, model: Any, reward: Any, **settings: Any) -> ReMaxTrainer:
    defaults = {"max_steps": 2, "batch_size": 4, "max_completion_length": 8, "report_to": ["none"]}
    return ReMaxTrainer(
        model,
        reward,
        ReMaxConfig(**{**defaults, "output_dir": str(folder), **settings}),
        train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS]),
        processing_class=toy_tokenizer("<s> $A", bos_token="<s>"),
        view=Silent(),
    )


def checksum(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between almost all completions."""
    return [sum(map(ord, text)) % 7 - 3.0 for text in completions]


# Frozen models in bfloat16 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {}),
        ("llama", {"method": "ppo", "num_ppo_epochs": 1}),
        ("qwen2", {"kl_mode": "loss"}),
        ("gpt2", {}),
        ("opt", {}),
        ("gemma2", {}),
    ],
    ids=str,
)
def test_the_reference_in_bfloat16_changes_no_bit_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, settings: dict[str, Any]
) -> None:
    def run(folder: str) -> tuple[ReMaxTrainer, torch.Tensor, torch.Tensor]:
        model = tiny_model(architecture, vocab_size=VOCAB_SIZE)
        model.generation_config.eos_token_id = EOS
        trainer = make_trainer(tmp_path / folder, model, checksum, bf16=True, beta=0.2, learning_rate=1e-2, **settings)
        records = [trainer.step(trainer.order.batch(step), step) for step in (1, 2)]
        kl = torch.cat([record.kl for record in records])
        return trainer, kl, torch.cat([p.detach().flatten() for p in trainer.parts.policy.parameters()])

    cast, kl, weights = run("cast")
    monkeypatch.setattr(Components, "hold_frozen_in_bfloat16", lambda self: None)
    as_given, kl_as_given, weights_as_given = run("as given")
    dtypes = {p.dtype for p in cast.parts.reference.parameters()}
    assert dtypes == {torch.float32, torch.bfloat16}
    assert {p.dtype for p in as_given.parts.reference.parameters()} == {torch.float32}
    assert {p.dtype for p in cast.parts.policy.parameters()} == {torch.float32}
    assert kl.abs().max() > 0
    assert torch.equal(kl, kl_as_given)
    assert torch.equal(weights, weights_as_given)


def test_at_first_all_log_ratios_to_the_reference_in_bfloat16_are_zero(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    model.generation_config.eos_token_id = EOS
    trainer = make_trainer(tmp_path, model, checksum, bf16=True)
    assert trainer.step(trainer.order.batch(1), 1).kl.tolist() == [0.0] * 4


def test_embeddings_and_heads_tied_to_them_are_not_cast() -> None:
    for tied in (True, False):
        model = tiny_model("llama", tie_word_embeddings=tied).requires_grad_(False)
        precision.hold_in_bfloat16(model)
        assert model.get_input_embeddings().weight.dtype == torch.float32
        assert (model.get_output_embeddings().weight.dtype == torch.float32) == tied
        assert {p.dtype for n, p in model.named_parameters() if "norm" in n} == {torch.float32}
        assert {p.dtype for n, p in model.named_parameters() if "proj" in n} == {torch.bfloat16}


def test_with_an_adapter_the_reference_is_the_policy_and_nothing_is_cast(tmp_path: Path, small: Any) -> None:
    trainer = make_trainer(tmp_path, small["policy"], checksum, bf16=True, use_peft=True)
    assert {p.dtype for p in trainer.parts.policy.parameters()} == {torch.float32}


def test_a_reward_model_in_bfloat16_scores_as_before_with_its_head_in_float32(tmp_path: Path, small: Any) -> None:
    trainer = make_trainer(tmp_path, small["policy"], small["reward"], bf16=True)
    reward = trainer.parts.reward_functions[0]
    exact = load_reward_model(small["reward"], flag="--reward_model")
    assert reward.model.score.weight.dtype == torch.float32
    assert {p.dtype for n, p in reward.model.named_parameters() if "proj" in n} == {torch.bfloat16}
    texts = [[BOS, *range(10, 10 + n)] for n in (3, 7, 12, 30)]
    scores = torch.tensor(reward.score_ids(texts))
    with torch.no_grad():
        expected = torch.stack([exact(torch.tensor([ids])).logits[0, 0] for ids in texts])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = [exact.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in texts]
        by_hand = torch.stack([(state.float() @ exact.score.weight.T)[0] for state in states])
    tolerance = 0.02 * expected.abs().max().item()
    assert expected.std() > 5 * tolerance
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)
    alone = torch.tensor([reward.score_ids([ids])[0] for ids in texts])
    torch.testing.assert_close(alone, by_hand, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alone, scores, rtol=0, atol=tolerance)


def test_a_reward_model_that_is_passed_in_loaded_stays_as_it_is(tmp_path: Path, small: Any) -> None:
    model = load_reward_model(small["reward"], flag="--reward_model")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(tmp_path, small["policy"], model, bf16=True)
    trainer.step(trainer.order.batch(1), 1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_value_model_starts_from_the_float32_weights_of_the_reward_model(tmp_path: Path, small: Any) -> None:
    trainer = make_trainer(tmp_path, small["policy"], small["reward"], bf16=True, method="ppo")
    exact = load_reward_model(small["reward"], flag="--reward_model")
    value_model = trainer.method.critic.network
    assert {p.dtype for p in trainer.parts.reward_functions[0].model.parameters()} != {torch.float32}
    for name, parameter in exact.model.named_parameters():
        assert torch.equal(value_model.body.get_parameter(name), parameter)
    assert torch.equal(value_model.head.weight, exact.score.weight)


# Instruments ----------------------------------------------------------------------------------------------------------


def test_saved_tensors_are_what_autograd_keeps_at_once_without_parameters() -> None:
    weight = torch.nn.Parameter(torch.ones(100))
    saved = SavedTensors([weight])
    with saved:
        factor = torch.ones(100, requires_grad=True)
        (weight * factor).sum().backward()  # keeps both factors, of which one is no parameter, and is gone again
        values = (weight * 2.0).exp()  # keeps its result
        (values * values.detach()).sum().backward()  # the same storage twice
    assert saved.peak == 400
    assert saved.total == 0
    with saved:
        kept = [(weight * torch.ones(100)).sum() for _ in range(3)]
    assert saved.peak == 1200
    del kept
    assert saved.total == 0


def test_live_tensors_are_those_made_inside_without_views() -> None:
    outside = torch.zeros(1000)
    with LiveTensors() as live:
        first = outside.view(10, 100).t() + 1.0
        del first
        second = torch.zeros(500) + 1.0  # two tensors at once, 2000 bytes each
        second.add_(1.0)
    assert live.peak == 4000
    assert live.total == 2000


def test_bytes_count_shared_tensors_once() -> None:
    tensor = torch.zeros(10, dtype=torch.bfloat16)
    assert num_bytes([tensor, tensor.view(2, 5), torch.zeros(3)]) == 20 + 12


# Accounting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_static_memory_is_what_theory_says(tmp_path: Path, medium: Any, bf16: bool) -> None:
    methods = {}
    for method, more in (("remax", {}), ("ppo", {"num_ppo_epochs": 1})):
        settings = {"method": method, "bf16": bf16, "batch_size": 2, "max_completion_length": 3, **more}
        methods[method] = measure(make_trainer(tmp_path / method, medium["policy"], medium["reward"], **settings))
    completed = with_totals(methods)
    policy, reward = LINEAR + OTHERS + VOCAB_SIZE * 256, LINEAR + OTHERS + 256
    frozen = 2 if bf16 else 4
    by_hand = {
        "weights/policy": 4 * policy,
        "weights/reference": frozen * (LINEAR + VOCAB_SIZE * 256) + 4 * OTHERS,
        "weights/reward": frozen * LINEAR + 4 * (OTHERS + 256),
        "gradients/policy": 4 * policy,
        "optimiser/policy": 8 * policy + 4 * (4 * 9 + 3),
    }
    for_value = {"weights/value": 4 * reward, "gradients/value": 4 * reward, "optimiser/value": 8 * reward + 4 * 39}
    for name, expected in (("remax", by_hand), ("ppo", by_hand | for_value)):
        static = completed[name]["static"]
        assert {kind: pair["measured"] for kind, pair in static.items()} == expected
        assert {kind: pair["predicted"] for kind, pair in static.items()} == expected
        assert completed[name]["static_total"]["measured"] == sum(expected.values())
    equal = {name: own["equal_size"] for name, own in completed.items()}
    remax, ppo = (20, 36) if bf16 else (24, 40)
    assert (equal["remax"]["theory"], equal["ppo"]["theory"]) == (remax, ppo)
    assert equal["remax"]["measured"] / equal["ppo"]["measured"] == pytest.approx(remax / ppo, rel=0.02)
    assert equal["remax"]["measured"] == pytest.approx(remax, rel=0.02)
    assert equal["ppo"]["measured"] == pytest.approx(ppo, rel=0.02)
    assert completed["ppo"]["ratios"]["equal_size"]["theory"] == pytest.approx(ppo / remax)
    assert methods["ppo"]["gradients_at_once"] == 4 * policy  # Never those of both networks.


VARIANTS: dict[str, dict[str, Any]] = {
    "adapters": {"use_peft": True},
    "adapters, bf16": {"use_peft": True, "bf16": True},
    "PPO with adapters": {"use_peft": True, "method": "ppo", "num_ppo_epochs": 1},
    "bfloat16 weights": {"dtype": "bfloat16", "bf16": True, "method": "ppo", "num_ppo_epochs": 1},
    "no reference": {"beta": 0.0, "method": "rloo"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_static_predictions_are_exact(tmp_path: Path, small: Any, variant: str) -> None:
    settings = {"max_completion_length": 4, **VARIANTS[variant]}
    own = measure(make_trainer(tmp_path, small["policy"], small["reward"], **settings))
    for kind, pair in own["static"].items():
        assert pair["measured"] == pair["predicted"], kind
    assert ("weights/reference" in own["static"]) == (variant == "bfloat16 weights")
    assert own["equal_size_theory"] == (16 + 4 if variant == "no reference" else None)


@pytest.mark.parametrize("settings", [{}, {"rollout_batch_size": 4}, {"bf16": True}, {"dtype": "bfloat16"}], ids=str)
def test_the_cache_and_the_logits_are_as_large_as_predicted(
    tmp_path: Path, small: Any, settings: dict[str, Any]
) -> None:
    model = LlamaForCausalLM.from_pretrained(small["policy"], dtype=settings.get("dtype", "float32"))
    trainer = make_trainer(tmp_path, model, small["reward"], num_generations=3, **settings)
    own = measure(trainer)["phases"]
    rows = 4 if "rollout_batch_size" in settings else 4 * 4
    longest = max(len(prompt.token_ids) for prompt in trainer.order.batch(1))
    by_hand = 2 * (2 * 16) * rows * (longest + 8) * (4 + 4 if settings in ({}, {"rollout_batch_size": 4}) else 2 + 2)
    assert own["rollout"]["kv_cache"] == {"measured": by_hand, "predicted": by_hand}
    logit = 2 if "bf16" in settings or "dtype" in settings else 4
    by_hand = rows * VOCAB_SIZE * logit
    assert own["rollout"]["logits"] == {"measured": by_hand, "predicted": by_hand}
    # One chunk with all tokens of all samples.
    assert own["reference"]["logits"] == own["update"]["logits"]
    assert own["update"]["logits"]["measured"] == own["update"]["logits"]["predicted"]
    assert 0 < own["update"]["logits"]["measured"] <= 4 * 3 * 8 * VOCAB_SIZE * logit


@pytest.mark.parametrize(
    "settings", [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"kl_mode": "loss"}], ids=str
)
def test_predicted_activations_of_a_llama_are_within_ten_percent(
    tmp_path: Path, small: Any, settings: dict[str, Any]
) -> None:
    trainer = make_trainer(tmp_path, small["policy"], small["reward"], **settings)
    own = measure(trainer)["phases"]
    for phase in ("reward", "update"):
        pair = own[phase]["activations"]
        assert pair["predicted"] == pytest.approx(pair["measured"], rel=0.1), phase
    assert own["update"]["made"] > own["update"]["activations"]["measured"] * 0.9


def test_operations_are_those_of_the_linear_layers(tmp_path: Path, medium: Any) -> None:
    trainer = make_trainer(tmp_path, medium["policy"], medium["reward"], max_completion_length=5)
    steps: list[Any] = []
    own_step = trainer.step
    trainer.step = lambda *args: steps.append(own_step(*args)) or steps[-1]  # type: ignore[method-assign]
    own = measure(trainer)["flops"]
    rollout = steps[0].rollout
    prompt = max(len(c.prompt.token_ids) for c in rollout.samples)
    rows, lengths = rollout.samples + rollout.greedy, [len(c.token_ids) for c in rollout.samples]
    longest = max(len(c.prompt.token_ids) + len(c.token_ids) for c in rollout.samples)
    head = VOCAB_SIZE * 256
    decoded = sum(len(c.token_ids) - 1 for c in rows)
    by_hand = {
        "rollout": 2 * LINEAR * (4 * prompt + decoded) + 2 * head * (4 + decoded),
        "reference": 2 * (LINEAR * 4 * longest + head * sum(lengths)),
        "update": 6 * (LINEAR * 4 * longest + head * sum(lengths)),
    }
    for phase, expected in by_hand.items():
        assert own[phase]["measured"] == pytest.approx(expected, rel=0.1), phase
    for phase in ("rollout", "reward", "reference", "update", "total"):
        assert own[phase]["predicted"] == pytest.approx(own[phase]["measured"], rel=0.1), phase
        assert own[phase]["predicted"] < own[phase]["measured"]  # Attention is counted only in what is measured.


def test_operations_with_packed_weights_are_counted(tmp_path: Path, medium: Any) -> None:
    trainer = make_trainer(tmp_path, medium["policy"], checksum, max_completion_length=20)
    own = measure(trainer)["flops"]["rollout"]  # So many tokens that the engine packs the weights on a CPU.
    assert own["predicted"] == pytest.approx(own["measured"], rel=0.1)


def test_gradient_checkpointing_costs_another_forward_pass(tmp_path: Path, medium: Any) -> None:
    settings = {"max_completion_length": 5, "gradient_checkpointing": True, "beta": 0.0}
    own = measure(make_trainer(tmp_path, medium["policy"], checksum, **settings))["flops"]["update"]
    assert own["predicted"] == pytest.approx(own["measured"], rel=0.1)


def test_operations_of_ppo_are_linear_in_its_epochs(tmp_path: Path, small: Any) -> None:
    flops = {}
    for epochs in (1, 3):
        settings = {"method": "ppo", "num_ppo_epochs": epochs, "batch_size": 2, "max_completion_length": 4}
        trainer = make_trainer(tmp_path / str(epochs), small["policy"], small["reward"], **settings)
        flops[epochs] = with_totals({"ppo": measure(trainer)})["ppo"]["flops"]
    for own in flops.values():
        for epochs, other in flops.items():
            predicted = own["epochs"]["once"] + epochs * own["epochs"]["each"]
            assert predicted == pytest.approx(other["total"]["measured"], rel=1e-9)
        assert own["by_epochs"][1] == flops[1]["total"]["measured"]


def test_the_command_writes_tables_and_strict_json(
    tmp_path: Path, small: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    settings = {
        "model": small["policy"],
        "reward_model": small["reward"],
        "train_dataset": str(data),
        "eval_dataset": str(data),
        "methods": {"remax": {}, "mine": {"method": "ppo", "num_ppo_epochs": 2}},
        "settings": {"batch_size": 4, "max_completion_length": 8},
        "accounting": True,
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    out = tmp_path / "out"
    assert main(["compare", "--config", str(tmp_path / "compare.yaml"), "--output_dir", str(out)]) in (None, 0)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    accounting = json.loads((out / "accounting.json").read_text(), parse_constant=refuse)
    assert list(accounting["methods"]) == ["remax", "mine"]
    assert accounting["versions"]["torch"]
    assert accounting["hardware"]["cpu"]
    assert accounting["command"].startswith("remax")
    assert accounting["settings"]["mine"]["num_ppo_epochs"] == 2
    mine = accounting["methods"]["mine"]
    assert mine["ratios"]["static"]["measured"] == pytest.approx(40 / 24, rel=0.1)
    assert mine["ratios"]["flops"]["measured"] > 1
    assert len(mine["hyperparameters"]) == 8
    assert all(math.isfinite(mine["phases"][phase]["peak"]) for phase in ("rollout", "reward", "reference", "update"))
    markdown = (out / "accounting.md").read_text()
    for text in (printed, markdown):
        assert "mine: GFLOP" in text
        assert "by theory 24/40 = 60.0%" in " ".join(text.split())
    assert not (out / "comparison.json").exists()
    assert not (out / "runs").exists()

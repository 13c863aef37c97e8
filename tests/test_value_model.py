"""PPO's value model: where it reads, what it starts from, that it is a copy, and which ones are refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

from remax import critic
from remax.batching import collate
from remax.config import ReMaxConfig
from remax.errors import UserError
from remax.interfaces import Completion, Prompt
from remax.rewards import RewardModel
from toy_tokenizers import BOS, EOS, PAD, VOCAB_SIZE, toy_tokenizer
from toy_training import calm_policy, make_trainer, policy, vowels

TEXTS = [("ab", "cat"), ("once upon", "a time"), ("x", "y")]


def tokenizer() -> Any:
    return toy_tokenizer("<s> $A", bos_token="<s>")


def completions(texts: list[tuple[str, str]] = TEXTS) -> list[Completion]:
    encode = tokenizer()
    return [
        Completion(Prompt(i, p, encode(p).input_ids), 0, [*encode(c).input_ids[1:], EOS], [], False)
        for i, (p, c) in enumerate(texts)
    ]


def batch_of(rows: list[Completion]) -> Any:
    return collate(rows, PAD, torch.device("cpu"))


def reward_model(seed: int) -> Any:
    config = policy().config
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification._from_config(type(config)(**{**config.to_dict(), "num_labels": 1}))
    model.config.pad_token_id = PAD
    nn.init.normal_(model.score.weight)
    return model.eval()


def saved(model: Any, folder: Path, own_tokenizer: Any = None) -> str:
    model.save_pretrained(folder)
    (own_tokenizer or tokenizer()).save_pretrained(folder)
    return str(folder)


def load(
    *, own_policy: Any = None, rewards: Any = (), tokenizer_of_policy: Any = None, **settings: Any
) -> critic.ValueModel:
    args = ReMaxConfig(method="ppo", **settings)
    return critic.load_value_model(args, own_policy or policy(), tokenizer_of_policy or tokenizer(), list(rewards))


def prefix_scores(model: Any, completion: Completion) -> list[float]:
    """What a reward model says of the prompt and the tokens before each token, one plain forward pass for each."""
    ids = completion.prompt.token_ids + completion.token_ids
    start = len(completion.prompt.token_ids)
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids[:t]])).logits.item() for t in range(start, len(ids))]


def assert_scores(value_model: critic.ValueModel, model: Any) -> None:
    rows = completions()
    values = value_model(batch_of(rows))
    assert values.dtype == torch.float32
    assert values.std() > 0.1
    for row, completion in enumerate(rows):
        expected = prefix_scores(model, completion)
        expected += [0.0] * (values.shape[1] - len(expected))
        torch.testing.assert_close(values[row], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_from_a_reward_model_it_is_the_score_of_the_prefix() -> None:
    model = reward_model(1)
    assert_scores(load(rewards=[RewardModel(model, tokenizer())]), model)
    functions = [SimpleNamespace(name="f"), RewardModel(model, tokenizer())]
    assert_scores(load(rewards=functions), model)


def test_the_value_of_a_token_depends_on_what_is_before_it_alone() -> None:
    value_model = load(rewards=[RewardModel(reward_model(1), tokenizer())])
    (row,) = completions([("once", "abcd")])
    before = value_model(batch_of([row]))[0]
    for t in range(len(row.token_ids)):
        changed = [*row.token_ids]
        changed[t] = BOS if changed[t] != BOS else PAD
        other = value_model(batch_of([Completion(row.prompt, 0, changed, [], False)]))[0]
        torch.testing.assert_close(other[: t + 1], before[: t + 1], rtol=0, atol=1e-5)
        assert (other[t + 1 :] - before[t + 1 :]).abs().gt(1e-3).all()


def test_padding_has_no_effect() -> None:
    value_model = load(rewards=[RewardModel(reward_model(1), tokenizer())])
    rows = completions()
    together = value_model(batch_of(rows))
    for row, completion in enumerate(rows):
        alone = value_model(batch_of([completion]))[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)
        assert together[row, len(alone) :].eq(0).all()


def body_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_from_the_policy_it_starts_at_zero_with_the_policys_body() -> None:
    own = calm_policy(3)
    value_model = load(own_policy=own)
    assert value_model(batch_of(completions())).eq(0).all()
    assert_same(body_state(value_model.body), body_state(own.model))
    assert value_model.head.out_features == 1
    assert all(p.requires_grad for p in value_model.parameters())


def test_the_given_value_model_comes_before_reward_model_and_policy(tmp_path: Path) -> None:
    rewards = [RewardModel(reward_model(1), tokenizer())]
    given = reward_model(2)
    assert_scores(load(rewards=rewards, value_model=saved(given, tmp_path / "rm")), given)
    language_model = calm_policy(5)
    value_model = load(rewards=rewards, value_model=saved(language_model, tmp_path / "lm"))
    assert value_model(batch_of(completions())).eq(0).all()
    assert_same(body_state(value_model.body), body_state(language_model.model))


@pytest.mark.parametrize("source", ["policy", "reward model", "value_model"])
def test_it_is_a_copy_that_is_trained_in_full(source: str, tmp_path: Path) -> None:
    """Its training moves neither policy nor reward model, and the policy's training moves neither of these."""
    folder = saved(reward_model(1), tmp_path / "rm")
    settings = {"value_model": folder} if source == "value_model" else {}
    rewards = folder if source == "reward model" else vowels
    model = policy()
    trainer = make_trainer(tmp_path / "out", rewards, model=model, method="ppo", beta=0.0, **settings)
    parts = trainer.parts
    learners = {"policy": trainer.policy, "critic": trainer.method.critic}
    frozen = [f.model for f in parts.reward_functions if isinstance(f, RewardModel)]
    addresses = [
        {p.data_ptr() for p in network.parameters()} for network in (learners["critic"].network, parts.policy, *frozen)
    ]
    assert len(set.union(*addresses)) == sum(map(len, addresses))
    batch = batch_of(completions())
    for name, learner in learners.items():
        networks = {"policy": parts.policy, "critic": learners["critic"].network}
        before = {key: body_state(network) for key, network in networks.items()}
        before_rewards = [body_state(network) for network in frozen]
        if name == "critic":
            loss = learner.network(batch).sub(1).square().sum()
        else:
            loss = -learner.network(batch, parts.sampling).logprobs.sum()
        learner.update([loss], 1)
        other = "policy" if name == "critic" else "critic"
        assert_same(body_state(networks[other]), before[other])
        for network, state in zip(frozen, before_rewards, strict=True):
            assert_same(body_state(network), state)
        now = body_state(networks[name])
        unchanged = [key for key in now if torch.equal(now[key], before[name][key])]
        head_alone = source == "policy" and name == "critic"  # a head of zeros gives the body no gradient yet
        assert unchanged == [key for key in now if head_alone and not key.startswith("head.")]


def test_with_adapters_only_they_and_the_head_are_trained(tmp_path: Path) -> None:
    for name, rewards in [("policy", vowels), ("reward model", saved(reward_model(1), tmp_path / "rm"))]:
        trainer = make_trainer(tmp_path / name, rewards, method="ppo", use_peft=True, lora_r=4, beta=0.1)
        networks = trainer.parts.policy, trainer.method.critic.network
        before = [body_state(network) for network in networks]
        for step in (1, 2):
            trainer.step(trainer.order.batch(step), step)
        changed = [
            {key for key, tensor in body_state(network).items() if not torch.equal(tensor, old[key])}
            for network, old in zip(networks, before, strict=True)
        ]
        assert any("lora_A" in key for key in changed[0])
        assert all("lora_" in key for key in changed[0])
        assert {"head.weight"} < changed[1], name
        assert all("lora_" in key or key.startswith("head.") for key in changed[1])


def test_of_a_policy_with_an_adapter_it_takes_the_weights_with_the_adapter_merged() -> None:
    adapted = get_peft_model(policy(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    before = body_state(adapted)
    value_model = load(own_policy=adapted)
    assert_same(body_state(adapted), before)
    ids = torch.tensor([[BOS, 20, 30, 40]])
    expected = adapted.base_model.model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(value_model.body(input_ids=ids).last_hidden_state, expected, rtol=1e-3, atol=1e-4)
    assert not any("lora_" in name for name, _ in value_model.named_parameters())
    assert all(p.requires_grad for p in value_model.parameters())


def test_precision_dropout_and_checkpointing_are_those_of_the_settings(tmp_path: Path) -> None:
    model = reward_model(1)
    for rewards, settings in [
        ([RewardModel(model, tokenizer())], {}),
        ([], {"value_model": saved(model, tmp_path / "rm")}),
        ([], {"value_model": saved(policy(), tmp_path / "lm")}),
    ]:
        value_model = load(rewards=rewards, dtype="bfloat16", **settings)
        assert {p.dtype for p in value_model.body.parameters()} == {torch.bfloat16}
        assert value_model.head.weight.dtype == torch.float32
        assert value_model(batch_of(completions())).dtype == torch.float32
    assert not load().training
    value_model = load(own_policy=policy(attention_dropout=0.5), gradient_checkpointing=True)
    assert value_model.training
    assert value_model.body.is_gradient_checkpointing
    nn.init.normal_(value_model.head.weight)
    batch = batch_of(completions())
    assert torch.equal(value_model(batch), value_model(batch))
    adapted = load(own_policy=policy(), gradient_checkpointing=True, use_peft=True, lora_dropout=0.5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or name.startswith("head"):
            nn.init.normal_(parameter)
    assert torch.equal(adapted(batch), adapted(batch)), "the adapter's own dropout is off, too"


def other_tokenizer() -> Any:
    """The same characters, two of them with each other's id."""
    ours = tokenizer()
    core = json.loads(ours.backend_tokenizer.to_str())
    vocabulary = core["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return type(ours)(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def test_another_tokenizer_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    folder = saved(reward_model(1), tmp_path / "rm", other_tokenizer())
    (Path(folder) / "model.safetensors").unlink()
    sentence = "its tokenizer gives other ids than that of --model, .* set a --value_model with the policy's tokenizer"
    with pytest.raises(UserError, match=f"--value_model is {folder}: {sentence}"):
        make_trainer(tmp_path / "out", method="ppo", value_model=folder)
    with pytest.raises(UserError, match=f"--value_model is not set and {folder} is used: {sentence}"):
        make_trainer(tmp_path / "out", folder, method="ppo")
    with pytest.raises(UserError, match=r"its model could not be loaded"):
        make_trainer(tmp_path / "out", folder)  # other methods have no value model, so its tokens do not matter
    loaded = RewardModel(reward_model(1), other_tokenizer(), name="mine")
    with pytest.raises(UserError, match=f"--value_model is not set and mine is used: {sentence}"):
        make_trainer(tmp_path / "out", loaded, method="ppo")
    assert not (tmp_path / "out").exists()


def test_a_value_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--value_model is ./nowhere: there is no such folder"):
        make_trainer(tmp_path / "out", method="ppo", value_model="./nowhere")


def test_spare_tokens_of_the_value_models_tokenizer_do_no_harm(tmp_path: Path) -> None:
    """It may have more tokens than the policy's, as a reward model with a pad token of its own has."""
    larger = tokenizer()
    larger.add_tokens(["<extra>"])
    assert len(larger) == VOCAB_SIZE + 1
    assert_scores(load(rewards=[RewardModel(model := reward_model(1), larger)]), model)
    trainer = make_trainer(tmp_path / "out", method="ppo", value_model=saved(model, tmp_path / "rm", larger))
    assert_scores(trainer.method.critic.network, model)

"""Reward-model input to the id, scores that depend on nothing but their text, and reward functions of every kind."""

import asyncio
import functools
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from remax.errors import UserError
from remax.interfaces import Completion, Prompt
from remax.rewards import (
    CallableReward,
    RewardModel,
    load_reward_function,
    require_chat_template,
    resolve_weights,
    reward_input_ids,
    score,
    unique_names,
)
from toy_tokenizers import BOS, CHATML, EOS, PAD, VOCAB_SIZE, characters, say, toy_tokenizer, turn

NAN = math.nan


def completion(prompt: Any, text: str, /, *, truncated: bool = False, **columns: Any) -> Completion:
    return Completion(Prompt(0, prompt, [7, 8], columns), 0, [9, EOS], [-1.0, -1.0], truncated, text)


def same(first: Sequence[float | None], second: Sequence[float | None]) -> bool:
    """Equality where NaN equals NaN."""
    return [repr(x) for x in first] == [repr(x) for x in second]


# Texts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", ["<s> $A", "<s> $A </s>"])
def test_text_gets_the_tokenizers_bos_and_one_eos_if_finished(around: str) -> None:
    tokenizer = toy_tokenizer(around, bos_token="<s>")
    assert reward_input_ids(tokenizer, "ab", "c", True) == [BOS, *characters("abc"), EOS]
    assert reward_input_ids(tokenizer, "ab", "c</s>", True) == [BOS, *characters("abc"), EOS]
    assert reward_input_ids(tokenizer, "ab", "c", False) == [BOS, *characters("abc")]


def test_tokenizer_without_eos_appends_nothing() -> None:
    assert reward_input_ids(toy_tokenizer(eos_token=None), "ab", "c", True) == characters("abc")


def test_real_tokenizer_joins_prompt_and_completion(tinystories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    # The pieces of stories260K: ▁Once ▁upon ▁a ▁time; a completion that is tokenised alone would start with another ▁.
    joint = [1, 403, 407, 261, 378]
    assert tokenizer.convert_ids_to_tokens(joint[1:]) == ["▁Once", "▁upon", "▁a", "▁time"]
    assert reward_input_ids(tokenizer, "Once upon", " a time", True) == [*joint, 2]
    assert reward_input_ids(tokenizer, "Once up", "on a time", False) == joint


def test_conversation_is_rendered_by_the_reward_models_template() -> None:
    tokenizer = toy_tokenizer("<s> $A", eos_token="<|im_end|>", chat_template=CHATML)
    prompt, answer = say("hi"), say("yo", roles=["assistant"])
    assert reward_input_ids(tokenizer, prompt, answer, True) == turn("user", "hi") + turn("assistant", "yo")
    cut = turn("user", "hi") + turn("assistant", "yo", closed=False)
    assert reward_input_ids(tokenizer, prompt, answer, False) == cut
    assert reward_input_ids(tokenizer, "", prompt + answer, True) == turn("user", "hi") + turn("assistant", "yo")


def test_unfinished_answers_that_templates_trim_or_that_say_nothing_are_not_closed() -> None:
    trimming = CHATML.replace("message['content']", "message['content'].split('</think>')[-1].strip()")
    tokenizer = toy_tokenizer(chat_template=trimming)
    for text, shown in [("", ""), ("<think>so</think> yo", "yo"), ("yo", "yo")]:
        ids = reward_input_ids(tokenizer, say("hi"), say(text, roles=["assistant"]), False)
        assert ids == turn("user", "hi") + turn("assistant", shown, closed=False)


def test_prefilled_answer_and_its_continuation_are_one_message() -> None:
    tokenizer = toy_tokenizer(chat_template=CHATML)
    ids = reward_input_ids(tokenizer, say("hi", "Well,"), say(" yo", roles=["assistant"]), True)
    assert ids == turn("user", "hi") + turn("assistant", "Well, yo")


def test_conversation_without_a_template_is_refused() -> None:
    tokenizer = toy_tokenizer(name_or_path="some/model")
    with pytest.raises(
        UserError, match=r"^--reward_model is some/model: its tokenizer has no chat template, so .*; set"
    ):
        reward_input_ids(tokenizer, say("hi"), say("yo", roles=["assistant"]), True)
    with pytest.raises(UserError, match=r"^--model is some/model"):
        require_chat_template(tokenizer, flag="--model")


# Learned rewards ------------------------------------------------------------------------------------------------------


def reward_llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    defaults = {"max_position_embeddings": 64, "num_labels": 1, "pad_token_id": PAD, "initializer_range": 0.3}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=VOCAB_SIZE, **sizes, **{**defaults, **settings}))


@pytest.fixture
def scored() -> list[Completion]:
    texts = ["yes", "a longer answer", "no", "b", "a longer answer still, with more to say", "yes"]
    return [completion("ask: ", text, truncated=i == 5) for i, text in enumerate(texts)]


def by_hand(model: Any, ids: list[int]) -> float:
    """The scalar at the last token, from the hidden states of one unpadded row."""
    with torch.no_grad():
        return float(model.model(torch.tensor([ids])).last_hidden_state[0, -1] @ model.score.weight[0])


def test_score_is_the_scalar_at_the_last_token(scored: list[Completion]) -> None:
    model = reward_llama()
    rewards = RewardModel(model, toy_tokenizer("<s> $A"))(scored)
    texts = [[BOS, *characters("ask: " + c.text), *([] if c.truncated else [EOS])] for c in scored]
    assert rewards == pytest.approx([by_hand(model, ids) for ids in texts], abs=1e-5)
    assert abs(rewards[0] - rewards[5]) > 1e-2, "whether an answer is finished must show in its score"
    assert np.std(rewards) > 0.1


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_score_depends_on_neither_batch_nor_order_nor_padding(scored: list[Completion], batch_size: int) -> None:
    model, tokenizer = reward_llama(), toy_tokenizer("<s> $A")
    expected = RewardModel(model, tokenizer)(scored)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = RewardModel(model, tokenizer, batch_size=batch_size)([scored[i] for i in order])
    assert shuffled == pytest.approx([expected[i] for i in order], abs=1e-5)


def test_equal_inputs_are_scored_once_and_with_little_padding(scored: list[Completion]) -> None:
    model, shapes = reward_llama(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    reward_model = RewardModel(model, toy_tokenizer(), batch_size=2)
    rewards = reward_model([*scored, *scored, scored[0]])
    lengths = sorted(len("ask: " + c.text) + (not c.truncated) for c in scored)
    assert shapes == [(2, lengths[1]), (2, lengths[3]), (2, lengths[5])], "batches are of similar length"
    assert rewards[:6] == rewards[6:12]
    assert rewards[12] == rewards[0]


def test_scoring_ignores_dropout_and_leaves_the_mode_of_the_model(scored: list[Completion]) -> None:
    model = reward_llama(attention_dropout=0.5)
    expected = RewardModel(model.eval(), toy_tokenizer())(scored)
    assert RewardModel(model.train(), toy_tokenizer())(scored) == expected
    assert model.training


def test_foreign_model_that_pads_with_eos_is_scored_as_it_is(scored: list[Completion]) -> None:
    model = reward_llama(pad_token_id=EOS)
    rewards = RewardModel(model, toy_tokenizer())(scored)
    assert rewards == pytest.approx([by_hand(model, characters("ask: " + c.text)) for c in scored], abs=1e-5)


def test_foreign_model_without_a_pad_token_scores_row_by_row(scored: list[Completion]) -> None:
    model = reward_llama(pad_token_id=None)
    rewards = RewardModel(model, toy_tokenizer(eos_token=None))(scored)
    assert rewards == pytest.approx([by_hand(model, characters("ask: " + c.text)) for c in scored], abs=1e-5)


def test_padding_is_hidden_from_models_that_look_ahead(scored: list[Completion]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCAB_SIZE, num_labels=1, pad_token_id=PAD, initializer_range=0.3, **sizes)
    model = BertForSequenceClassification(config).eval()
    together = RewardModel(model, toy_tokenizer())(scored)
    assert together == pytest.approx(RewardModel(model, toy_tokenizer(), batch_size=1)(scored), abs=1e-5)
    assert np.std(together) > 0.01


def test_text_beyond_the_models_positions_has_no_reward_and_is_told_once(scored: list[Completion]) -> None:
    reward_model = RewardModel(reward_llama(), toy_tokenizer(), name="judge")
    longest = completion("ask: ", "x" * (64 - len("ask: ") - 1))
    too_long = completion("ask: ", "x" * (64 - len("ask: ")))
    with pytest.warns(UserWarning, match=r"^judge: a text is longer than the 64 tokens that"):
        rewards = reward_model([scored[0], longest, too_long, too_long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward_model([too_long])
    assert [math.isnan(reward) for reward in rewards] == [False, False, True, True]
    assert reward_model.num_overlong == 2


# Programmed rewards ---------------------------------------------------------------------------------------------------


def two() -> list[Completion]:
    return [completion("p0", "a", answer="x", prompt="no"), completion("p1", "bb", answer="y", prompt="no")]


def test_function_gets_what_trl_gives_it() -> None:
    seen: dict[str, Any] = {}

    def f(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.5, 1]

    reward = CallableReward(f)
    reward.trainer_state = "state"
    assert same(reward(two()), [0.5, 1.0])
    assert reward.name == "f"
    seen.pop("log_extra")
    seen.pop("log_metric")
    assert seen == {
        "prompts": ["p0", "p1"],
        "completions": ["a", "bb"],
        "completion_ids": [[9, EOS], [9, EOS]],
        "answer": ["x", "y"],
        "trainer_state": "state",
    }


def test_conversational_completion_is_a_message() -> None:
    prompt = say("hi")
    seen = {}

    def f(prompts: Any, completions: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions)
        return [1.0]

    CallableReward(f)([completion(prompt, "yo")])
    assert seen == {"prompts": [prompt], "completions": [[{"role": "assistant", "content": "yo"}]]}


def test_function_without_kwargs_gets_what_it_names() -> None:
    def f(completions: Any, answer: Any, log_metric: Any) -> list[float]:
        log_metric("length", len(completions[0]))
        return [float(len(c)) for c in completions]

    reward = CallableReward(f)
    assert reward(two()) == [1.0, 2.0]
    assert reward.pop_metrics() == {"length": 1.0}


def test_logged_metrics_are_averaged_and_extra_columns_kept_until_collected() -> None:
    def f(completions: Any, log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        log_metric("share", len(completions) / 2)
        log_extra("first", [c[0] for c in completions])
        return [0.0] * len(completions)

    reward = CallableReward(f)
    reward(two())
    reward(two()[:1])
    assert reward.pop_metrics() == {"share": 0.75}
    assert reward.pop_metrics() == {}
    assert reward.pop_extra() == {"first": ["a", "b", "a"]}
    assert reward.pop_extra() == {}


async def slow(completions: Any, **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]


def test_async_function_runs_also_where_a_loop_is_running() -> None:
    reward = CallableReward(functools.partial(slow, unused=1))
    assert reward.name == "slow"
    assert reward(two()) == [1.0, 2.0]

    async def notebook() -> list[float | None]:
        return reward(two())

    assert asyncio.run(notebook()) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([None, NAN], [None, NAN]),
        ([True, False], [1.0, 0.0]),
        ((1, 2.5), [1.0, 2.5]),
        (np.array([1, 2]), [1.0, 2.0]),
        (torch.tensor([0.5, 1.5]), [0.5, 1.5]),
        ([np.float32(0.5), np.bool_(True)], [0.5, 1.0]),
        ([torch.tensor(0.5), torch.tensor(2)], [0.5, 2.0]),
        ([math.inf, np.array(3)], [math.inf, 3.0]),
    ],
)
def test_numbers_of_all_kinds_are_taken(returned: Any, expected: list[float | None]) -> None:
    rewards = CallableReward(lambda **_: returned)(two())
    assert same(rewards, expected)
    assert all(value is None or type(value) is float for value in rewards)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (1.0, r"it returned a float \(1.0\)"),
        (None, "it returned a NoneType"),
        ("ab", r"it returned a str \('ab'\)"),
        ({"a": 1, "b": 2}, "it returned a dict"),
        ((x for x in (1.0, 2.0)), "it returned a generator"),
        ([1.0], "it returned 1 rewards"),
        ([1.0, 2.0, 3.0], "it returned 3 rewards"),
        (torch.ones(2, 2), r"one reward is a list \(\[1.0, 1.0\]\)"),
        (["1.0", "2.0"], r"one reward is a str \('1.0'\)"),
        ([1.0, [2.0]], "one reward is a list"),
        ([1j, 2.0], "one reward is a complex"),
    ],
)
def test_anything_else_is_refused(returned: Any, said: str) -> None:
    expected = "return a list of 2 numbers or None, one per completion"
    with pytest.raises(UserError, match=rf"^--reward_funcs has mine: {said}.*; {expected}\.$"):
        CallableReward(lambda **_: returned, name="mine")(two())


def test_function_that_needs_a_column_that_is_not_there_is_refused() -> None:
    def f(completions: Any, solution: Any) -> list[float]:
        return [0.0, 0.0]

    with pytest.raises(
        UserError, match=r"has f\(completions.*missing a required argument: 'solution'\).*\(answer, prompt"
    ):
        CallableReward(f)(two())


def test_function_that_raises_gives_nan_and_is_warned_of_once_per_error() -> None:
    def f(completions: Any) -> list[float]:
        if len(completions) == 1:
            raise KeyError("one")
        raise ValueError(f"no number in {completions[0]}")

    reward = CallableReward(f)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert same(reward(two()), [NAN, NAN])
        assert same(reward([*two(), *two()]), [NAN] * 4)
        assert same(reward(two()[:1]), [NAN])
    assert reward.num_failures == 7
    assert len(caught) == 2
    assert str(caught[0].message).startswith("f raised ValueError: no number in a (test_rewards.py, line ")


def test_async_function_that_raises_gives_nan() -> None:
    async def f(completions: Any) -> list[float]:
        raise TimeoutError("the judge is silent")

    with pytest.warns(UserWarning, match="f raised TimeoutError: the judge is silent"):
        assert same(CallableReward(f)(two()), [NAN, NAN])


def test_user_error_of_a_function_passes() -> None:
    def f(completions: Any) -> list[float]:
        raise UserError("set something else.")

    with pytest.raises(UserError, match="set something else"):
        CallableReward(f)(two())


# Loading by name ------------------------------------------------------------------------------------------------------

CODE = """
import neighbour_of_rewards
limit = 3
class Judge: pass
def length(completions, **kwargs):
    return [float(neighbour_of_rewards.size(c)) for c in completions]
def lower(completions, **kwargs):
    return [0.0 for c in completions]
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path, modules = list(sys.path), set(sys.modules)
    (tmp_path / "my_rewards.py").write_text(CODE)
    (tmp_path / "neighbour_of_rewards.py").write_text("size = len\n")
    yield tmp_path / "my_rewards.py"
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_function_is_loaded_from_a_file(file: Path) -> None:
    reward = load_reward_function(f"{file}:length")
    assert reward.name == "length"
    assert reward(two()) == [1.0, 2.0]


def test_function_is_loaded_from_a_module(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert load_reward_function("my_rewards:length")(two()) == [1.0, 2.0]
    assert load_reward_function("remax.rewards:unique_names").name == "unique_names"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{file}", "that names no function"),
        ("{file}:", "that names no function"),
        ("no_such.py:f", "there is no file no_such.py; set path/to/file.py:function"),
        ("{file}:lenght", "has no function lenght; did you mean length"),
        ("{file}:quality", "has no function quality; it has length, lower"),
        ("{file}:limit", r"limit is a int \(3\), not a function"),
        ("{file}:Judge", "Judge is a class, not a function"),
        ("no.such.module:f", r"cannot be imported \(ModuleNotFoundError: No module named 'no'\)"),
        ("{folder}/broken.py:f", r"broken.py cannot be imported \(.*, line 2\); correct it"),
        ("{folder}/raising.py:f", r"raising.py cannot be imported \(ZeroDivisionError: division by zero, line 3\)"),
    ],
)
def test_function_that_cannot_be_loaded(spec: str, said: str, file: Path) -> None:
    (file.parent / "broken.py").write_text("x = 1\ndef f(:\n")
    (file.parent / "raising.py").write_text("\n\nx = 1 / 0\n")
    with pytest.raises(UserError, match=rf"^--reward_funcs has .*{said}"):
        load_reward_function(spec.format(file=file, folder=file.parent))


# Several rewards ------------------------------------------------------------------------------------------------------


class Fixed:
    def __init__(self, name: str, rewards: list[float | None]) -> None:
        self.name, self.rewards = name, rewards

    def __call__(self, completions: Sequence[Completion]) -> list[float | None]:
        return self.rewards


def test_rewards_are_weighted_and_summed_over_the_functions_that_apply() -> None:
    first = Fixed("f", [1.0, 1.0, None, None, 1.0, NAN, None])
    second = Fixed("f", [10.0, None, 10.0, None, math.inf, 10.0, -math.inf])
    scores = score([first, second], [2.0, 0.5], two() * 3 + two()[:1])
    assert same(scores.total, [7.0, 2.0, 5.0, NAN, NAN, NAN, NAN])
    assert list(scores.by_function) == ["f", "f_2"]
    assert same(scores.by_function["f"], [1.0, 1.0, NAN, NAN, 1.0, NAN, NAN])
    assert same(scores.by_function["f_2"], [10.0, NAN, 10.0, NAN, NAN, 10.0, NAN])


def test_failing_function_leaves_no_sample_to_the_other_rewards() -> None:
    def broken(completions: Any) -> list[float]:
        raise ValueError("broken")

    with pytest.warns(UserWarning, match="broken raised"):
        scores = score([Fixed("f", [1.0, 2.0]), CallableReward(broken)], [1.0, 1.0], two())
    assert same(scores.total, [NAN, NAN])


def test_names_are_made_unique() -> None:
    functions = [Fixed(name, []) for name in ("f", "g", "f", "f_2", "f")]
    assert unique_names(functions) == ["f", "g", "f_2", "f_2_2", "f_3"]


def test_weights_are_one_by_default_and_one_for_each_reward() -> None:
    assert resolve_weights([], 2) == [1.0, 1.0]
    assert resolve_weights([0.5, 2], 2) == [0.5, 2]
    with pytest.raises(UserError, match=r"^--reward_weights has 1 numbers: there are 2 rewards; set one for each"):
        resolve_weights([1.0], 2)

"""`remax doctor`, check by check: each sees a planted fault and passes where there is none.

What it finds in rewards and rollouts is in test_doctor_reward.py.
"""

import math
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from doctor_checks import QUESTIONS, TEXTS, chat_tokens, only, set_up, statuses
from remax.config import ReMaxConfig, TrainInputs
from remax.doctor import machine, prompts, quick_warnings, tokenizer
from remax.doctor.context import Context, Part
from remax.doctor.findings import Finding, Unavailable, judged, run_check
from remax.doctor.statistics import correlation_interval, mean_interval
from remax.errors import UserError
from remax.plan.device import Memory
from remax.plan.phases import Device
from toy_tokenizers import CHATML, END, EOS, START, VOCAB_SIZE, toy_tokenizer
from toy_training import policy

# How checks are run ---------------------------------------------------------------------------------------------------


def test_a_check_that_crashes_is_a_finding_with_the_type_and_no_traceback() -> None:
    def check_first_thing(context: Any) -> list[Finding]:
        raise ZeroDivisionError("by\nzero \x1b[31m")

    (finding,) = run_check(check_first_thing, None)
    assert (finding.check, finding.status) == ("first thing", "fail")
    assert "ZeroDivisionError: by" in finding.finding
    assert "Traceback" not in finding.finding


def test_a_users_mistake_is_split_into_finding_and_fix() -> None:
    def check_it(context: Any) -> list[Finding]:
        raise UserError("--model is x: it has a; b; set another one.")

    assert run_check(check_it, None) == [Finding("it", "fail", "--model is x: it has a; b", "set another one")]


def test_a_part_is_made_once_and_a_failure_is_told_once() -> None:
    class Two:
        failed: set[str]
        made = 0

        def __init__(self) -> None:
            self.failed = set()

        @Part
        def good(self) -> int:
            self.made += 1
            return self.made

        @Part
        def bad_one(self) -> int:
            self.made += 1
            raise ValueError("once")

        @Part
        def above(self) -> int:
            return self.bad_one

    two = Two()
    assert (two.good, two.good, two.made) == (1, 1, 1)
    with pytest.raises(ValueError, match="once"):
        _ = two.bad_one
    for _ in range(2):
        with pytest.raises(Unavailable, match="bad one"):
            _ = two.bad_one
    assert two.made == 2
    assert statuses(run_check(lambda_check(lambda: two.above), None)) == ["skip"]


def lambda_check(function: Any) -> Any:
    def check_it(context: Any) -> Any:
        return function()

    return check_it


def test_texts_of_a_finding_cannot_steer_the_terminal() -> None:
    finding = Finding("a\x1b]0;title\x07", "fail", "two\nlines \x9b31m", "\x1b[2J")
    for text in (finding.check, finding.finding, finding.fix):
        assert text.isprintable()
    assert finding.finding.startswith("two lines ")
    assert judged("x", "y", "do z").fix == ""


# Intervals ------------------------------------------------------------------------------------------------------------


def test_intervals() -> None:
    # Fisher: tanh(atanh(0.5) -+ 1.96 / sqrt(25)), by hand with atanh(0.5) = 0.549306.
    low, high = correlation_interval(0.5, 28)
    assert (low, high) == pytest.approx((math.tanh(0.549306 - 0.391993), math.tanh(0.549306 + 0.391993)), abs=1e-6)
    assert correlation_interval(1.0, 3) == (-1.0, 1.0)
    assert correlation_interval(1.0, 100)[0] > 0.99
    mean, low, high = mean_interval([1.0, 3.0])  # standard deviation sqrt(2), of the mean 1
    assert (mean, high - mean, mean - low) == pytest.approx((2.0, 1.959964, 1.959964), abs=1e-6)


# Tokenizer ------------------------------------------------------------------------------------------------------------


def ending_at(*ids: int) -> Any:
    model = policy(eos_token_id=ids[0])
    model.generation_config.eos_token_id = list(ids)
    return model


def test_a_sound_tokenizer_passes(tmp_path: Path) -> None:
    context = set_up(tmp_path, QUESTIONS, model=ending_at(END), tokens=chat_tokens(eos_token="<|im_end|>"))
    checks = (tokenizer.check_eos, tokenizer.check_pad, tokenizer.check_vocabulary, tokenizer.check_bos)
    assert [only(check, context).status for check in (*checks, tokenizer.check_chat_template)] == ["pass"] * 5
    assert "<|im_end|> (4), an EOS" in only(tokenizer.check_chat_template, context).finding


def test_no_eos(tmp_path: Path) -> None:
    finding = only(tokenizer.check_eos, set_up(tmp_path, tokens=toy_tokenizer(eos_token=None)))
    assert finding.status == "fail"
    assert "without an EOS" in finding.finding
    assert "eos_token" in finding.fix


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (ending_at(EOS, 9999), "9999"),
        (ending_at(END), "</s> (2) is not among"),
        (policy(eos_token_id=[EOS, START]), "<|im_start|> (3)"),
    ],
    ids=["unknown id", "another one", "forgotten"],
)
def test_model_and_tokenizer_disagree_on_eos(model: Any, words: str, tmp_path: Path) -> None:
    finding = only(tokenizer.check_eos, set_up(tmp_path, model=model))
    assert finding.status == "warn"
    assert words in finding.finding


def test_pad_that_is_eos(tmp_path: Path) -> None:
    for kwargs in ({"pad_token": "</s>"}, {"pad_token": None}):
        finding = only(tokenizer.check_pad, set_up(tmp_path, tokens=toy_tokenizer(**kwargs)))
        assert finding.status == "warn"
        assert "</s> (2), which also ends" in finding.finding


def test_embedding_without_a_row_for_every_token(tmp_path: Path) -> None:
    context = set_up(tmp_path)
    assert only(tokenizer.check_vocabulary, context).status == "pass"
    context.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCAB_SIZE - 1))
    assert only(tokenizer.check_vocabulary, context).status == "fail"


def test_template_whose_end_of_turn_is_no_eos(tmp_path: Path) -> None:
    finding = only(tokenizer.check_chat_template, set_up(tmp_path, QUESTIONS, tokens=chat_tokens()))
    assert finding.status == "fail"
    assert "a turn ends with <|im_end|> (4) '\\n' (5);" in finding.finding
    assert '"eos_token_id": [2, 4] in generation_config.json' in finding.fix
    both = set_up(tmp_path, QUESTIONS, tokens=chat_tokens(), model=ending_at(EOS, END))
    assert only(tokenizer.check_chat_template, both).status == "pass", "the fix that was named"
    unused = set_up(tmp_path, TEXTS, tokens=chat_tokens())
    assert only(tokenizer.check_chat_template, unused).status == "warn", "prompts that are texts do not need it"


def test_template_that_is_missing_or_ends_with_nothing(tmp_path: Path) -> None:
    endless = CHATML.replace("<|im_end|>\n", "")
    assert only(tokenizer.check_chat_template, set_up(tmp_path, TEXTS)).status == "pass"
    assert only(tokenizer.check_chat_template, set_up(tmp_path, QUESTIONS)).status == "fail"
    tokens = toy_tokenizer(chat_template=endless)
    finding = only(tokenizer.check_chat_template, set_up(tmp_path, QUESTIONS, tokens=tokens))
    assert (finding.status, finding.fix) == ("fail", "let the template end answers")


def test_bos_twice_or_now_and_then(tmp_path: Path) -> None:
    twice = toy_tokenizer(bos_token="<s>", chat_template="{{ '<s><s>' }}" + CHATML)
    finding = only(tokenizer.check_bos, set_up(tmp_path, QUESTIONS, tokens=twice))
    assert finding.status == "fail"
    assert f"{len(QUESTIONS)} with several" in finding.finding
    mixed = set_up(tmp_path, [{"prompt": "<s>a"}, {"prompt": "b"}], tokens=toy_tokenizer(bos_token="<s>"))
    assert only(tokenizer.check_bos, mixed).status == "warn"


# Prompts --------------------------------------------------------------------------------------------------------------


def test_sound_prompts_pass(tmp_path: Path) -> None:
    context = set_up(tmp_path, eval_rows=[{"prompt": "never seen"}])
    checks = (prompts.check_prompt_lengths, prompts.check_duplicates, prompts.check_leakage)
    assert [only(check, context).status for check in checks] == ["pass"] * 3
    assert statuses(prompts.check_room(context)) == ["pass", "pass"]
    assert only(prompts.check_leakage, set_up(tmp_path)).status == "skip"


def test_histogram() -> None:
    assert prompts.histogram([0] * 9 + [12]) == "█" + " " * 10 + "▁"
    assert prompts.histogram([5, 5, 5]) == "█" + " " * 11


def test_overlong_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": c * 10} for c in "abcdefghi"] + [{"prompt": "x" * 60}]
    some = only(prompts.check_prompt_lengths, set_up(tmp_path, rows, max_prompt_length=20))
    assert some.status == "warn"
    assert "1 (10.0%) are longer than 20 and are dropped" in some.finding
    assert only(prompts.check_prompt_lengths, set_up(tmp_path, rows, max_prompt_length=100)).status == "pass"
    most = [{"prompt": "x" * 60}, {"prompt": "y" * 60}, {"prompt": "a"}]
    assert only(prompts.check_prompt_lengths, set_up(tmp_path, most, max_prompt_length=20)).status == "fail"


def test_empty_prompts(tmp_path: Path) -> None:
    finding = only(prompts.check_prompt_lengths, set_up(tmp_path, [*TEXTS, {"prompt": " "}]))
    assert finding.status == "fail"
    assert "1 empty value" in finding.finding


def test_room(tmp_path: Path) -> None:
    few, long = set_up(tmp_path, batch_size=99), set_up(tmp_path, max_completion_length=250)
    assert statuses(prompts.check_room(few)) == ["fail", "pass"]
    assert statuses(prompts.check_room(long)) == ["pass", "fail"]
    longest = max(len(row["prompt"]) for row in TEXTS) + 1  # BOS
    assert f"--max_completion_length {256 - longest} or less" in prompts.check_room(long)[1].fix


def test_duplicates_and_leakage(tmp_path: Path) -> None:
    rows = [*TEXTS, {"prompt": f" {TEXTS[0]['prompt'].upper()}\n"}]
    finding = only(prompts.check_duplicates, set_up(tmp_path, rows))
    assert finding.status == "warn"
    assert f"1 of {len(rows)} prompts" in finding.finding
    unseen = [{"prompt": f"held out {i}"} for i in range(19)]
    one = only(prompts.check_leakage, set_up(tmp_path, eval_rows=[*unseen, rows[-1]]))
    assert (one.status, "1 of 20 prompts" in one.finding) == ("warn", True)
    assert only(prompts.check_leakage, set_up(tmp_path, eval_rows=[*unseen, *TEXTS[:3]])).status == "fail"
    leaked = set_up(tmp_path, QUESTIONS, eval_rows=QUESTIONS[:1], tokens=chat_tokens())
    assert only(prompts.check_leakage, leaked).status == "fail", "messages are compared too"


# Machine --------------------------------------------------------------------------------------------------------------


def test_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = set_up(tmp_path)
    assert only(machine.check_versions, context).status == "pass"
    wanted = ["torch>=99", "no-such-thing>1", 'also-missing>1; extra == "dev"']
    monkeypatch.setattr(machine, "requires", lambda name: wanted)
    finding = only(machine.check_versions, context)
    assert finding.status == "warn"
    assert "is not >=99" in finding.finding
    assert "no-such-thing is missing" in finding.finding
    assert "also-missing" not in finding.finding


def test_more_threads_than_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = set_up(tmp_path)
    assert only(machine.check_device, context).status == "pass"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9999)
    assert only(machine.check_device, context).status == "warn"


def free_disk(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, int(size)))


def test_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = set_up(tmp_path, eval_rows=[{"prompt": "x"}], save_steps=1)
    model = 4 * sum(p.numel() for p in policy().parameters())
    written = machine._written(context)
    # 16 prompts are 4 steps: all of save_total_limit 2 and a third one, of weights and two averages each.
    step_numbers = 4 * sum(1 for _ in policy().parameters())
    checkpoints = 3 * (3 * model + step_numbers)
    assert written == {"model": model, "best model": model, "3 checkpoints": checkpoints}
    for settings, number in (({"save_steps": -1}, 0), ({"save_steps": 0}, 1), ({"max_steps": 2, "save_steps": 1}, 2)):
        left = machine._written(set_up(tmp_path, **settings))
        names = {0: [], 1: ["1 checkpoint"], 2: ["2 checkpoints"]}
        assert [name for name in left if "checkpoint" in name] == names[number]
    needed = sum(written.values())
    for free, status in ((needed - 1, "fail"), (needed / 0.9, "warn"), (needed / 0.7, "pass")):
        free_disk(monkeypatch, free)
        assert only(machine.check_disk_space, context).status == status


def test_plan_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(machine.check_memory, set_up(tmp_path)).status == "pass"
    card = Memory(Device("cuda"), "a card", 2**30 + 2**19)
    monkeypatch.setattr("remax.plan.command.memory_of", lambda inputs: card)
    finding = only(machine.check_memory, set_up(tmp_path))
    assert finding.status == "fail"
    assert "a card" in finding.finding
    assert finding.fix


# What training checks by itself ---------------------------------------------------------------------------------------


def quick(context: Context) -> list[str]:
    return quick_warnings(context.inputs, context.args)


def test_quick_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quick(set_up(tmp_path, eval_rows=[{"prompt": "held out"}])) == []
    lines = quick(set_up(tmp_path, [*QUESTIONS, QUESTIONS[0]], eval_rows=QUESTIONS[:1], tokens=chat_tokens()))
    assert [line.split(":")[1].strip() for line in lines] == ["chat template", "duplicates", "leakage"]
    free_disk(monkeypatch, 10)
    (line,) = quick(set_up(tmp_path))
    assert line.startswith("doctor: disk space: ")
    assert line.endswith(".")


def test_quick_warnings_refuse_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training refuses, it refuses itself; a fault of a check is a line."""
    free_disk(monkeypatch, 10**12)
    nothing = TrainInputs(model="./no", train_dataset="no.jsonl", eval_dataset="no.jsonl", reward_funcs=["a.py:f"])
    assert quick_warnings(nothing, ReMaxConfig()) == []
    assert quick(set_up(tmp_path, tokens=toy_tokenizer(eos_token=None))) == []
    context = set_up(tmp_path, QUESTIONS, tokens=toy_tokenizer(chat_template="{{ raise_exception('mine') }}"))
    (line,) = quick(context)
    assert "TemplateError" in line

"""The recipes in examples/: each is what `remax init` gives, and its rewards score answers as they should."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from example_files import EXAMPLES, lines, module_of
from remax.cli import main
from remax.commands import COMMANDS
from remax.flags import parse
from remax.recipes import RECIPES

OTHERS = {"distributed"}
"""Folders that are no recipe."""
STAGE_FILES = sorted(path.relative_to(EXAMPLES) for path in EXAMPLES.glob("*/*.yaml") if path.name != "run.yaml")

# Files ----------------------------------------------------------------------------------------------------------------


def test_every_recipe_has_an_example() -> None:
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - OTHERS == set(RECIPES)
    overview = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in folders:
        assert f"({name}/README.md)" in overview


@pytest.mark.parametrize("name", RECIPES)
def test_an_example_has_the_settings_of_its_recipe(name: str) -> None:
    path = EXAMPLES / name / "run.yaml"
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == RECIPES[name].settings
    assert parse("remax train", "", COMMANDS["train"].settings, ["--config", str(path)], example="") is not None
    readme = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    for heading in ("## What to expect", "## Hardware, time and memory", "## What was run"):
        assert heading in readme


@pytest.mark.parametrize("path", STAGE_FILES, ids=str)
def test_the_files_of_the_stages_before_are_accepted(path: Path) -> None:
    command = path.stem
    flags = ["--config", str(EXAMPLES / path)]
    assert parse(f"remax {command}", "", COMMANDS[command].settings, flags, example="") is not None


# Rewards --------------------------------------------------------------------------------------------------------------


ANSWERS = {
    r"so \boxed{72}": (1, 1),
    r"72 clips": (1, 1),
    r"\boxed{71} and 72": (0, 0),
    r"\boxed{72.00}": (1, 1),
    r"\boxed{\$72}": (1, 1),
    r"\boxed{\frac{144}{2}}": (1, 0),
    r"\boxed{72": (None, 1),
    "first 71, then 72": (None, 1),
    "-72": (0, 0),
    "1,072": (0, 0),
    "": (0, 0),
}
"""What `correct` and `same_number` say of an answer where 72 is right; None: whatever it says."""


def test_gsm8k_checks_answers() -> None:
    rewards = module_of("gsm8k/plain_rewards.py")
    texts, chats = list(ANSWERS), [[{"role": "assistant", "content": text}] for text in ANSWERS]
    expected = [plain for _, plain in ANSWERS.values()]
    assert rewards.same_number(texts, ["72"] * len(texts)) == expected
    assert rewards.same_number(chats, ["72"] * len(texts)) == expected
    assert rewards.same_number([r"\boxed{1,200}"], ["1200"]) == [1.0]


def test_gsm8k_checks_answers_with_math_verify() -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    rewards = module_of("gsm8k/rewards.py")
    given = rewards.correct(list(ANSWERS), ["72"] * len(ANSWERS))
    wanted = [right for right, _ in ANSWERS.values()]
    assert [g for g, w in zip(given, wanted, strict=True) if w is not None] == [w for w in wanted if w is not None]
    assert rewards.correct([[{"role": "assistant", "content": r"\boxed{1,200}"}]], ["1200"]) == [1.0]


@pytest.mark.parametrize(
    ("name", "package", "extra", "timeout"),
    [("gsm8k", "math_verify", "math", "300"), ("reasoning-gym", "reasoning_gym", "reasoning", "0")],
)
def test_a_recipe_says_what_to_install_before_it_loads_anything(
    name: str, package: str, extra: str, timeout: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "hides" / package).mkdir(parents=True)
    lost = f"raise ModuleNotFoundError('No module named {package}', name='{package}')"
    (tmp_path / "hides" / package / "__init__.py").write_text(lost)
    monkeypatch.syspath_prepend(tmp_path / "hides")
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr("remax.models.load_tokenizer", lambda *_, **__: pytest.fail("the tokenizer was loaded"))
    monkeypatch.chdir(shutil.copytree(EXAMPLES / name, tmp_path / name))
    assert main(["train", "--config", "run.yaml", "--reward_timeout_seconds", timeout]) == 2
    error = capsys.readouterr().err
    assert f'imports {package}, which is not installed; run pip install "remax-rlhf[{extra}]".' in error
    assert not (tmp_path / name / RECIPES[name].settings["output_dir"]).exists()


def test_rewards_of_stories() -> None:
    rewards = module_of("several-rewards/rewards.py")
    assert rewards.variety(["The dog saw the Dog.", "one two", "", "a a a a"]) == [0.8, 1.0, 0.0, 0.25]
    assert rewards.ending(["It was fun. ", '"Yes!" ', "He said", ""]) == [1.0, 1.0, 0.0, 0.0]


def test_reasoning_gym_scores_its_own_answers(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym")
    prepare, rewards = module_of("reasoning-gym/prepare.py"), module_of("reasoning-gym/rewards.py")
    prepare.main(tmp_path, 60, 10)
    rows = [*lines(tmp_path / "train.jsonl"), *lines(tmp_path / "test.jsonl")]
    assert len({row["prompt"][0]["content"] for row in rows}) == 70
    entries = [row["entry"] for row in rows]
    assert {json.loads(entry)["metadata"]["source_dataset"] for entry in entries} == set(prepare.TASKS)

    def say(pattern: str) -> list[Any]:
        answers = [json.loads(entry)["answer"] for entry in entries]
        return [[{"role": "assistant", "content": pattern.format(answer)}] for answer in answers]

    assert rewards.solved(say("It is\n<answer>{}</answer>"), entries) == [1.0] * 70
    assert rewards.solved(say("It is {}"), entries) == [0.0] * 70
    assert sum(rewards.solved(say("<answer>no</answer>"), entries)) < 5
    other = tmp_path / "other"
    prepare.main(other, 60, 10, seed=1)
    assert lines(other / "train.jsonl") != lines(tmp_path / "train.jsonl")

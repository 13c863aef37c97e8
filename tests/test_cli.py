"""The command line: every command end to end on tiny models, and every mistake as one sentence with exit code 2."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

import remax
from remax.cli import main
from remax.commands import COMMANDS
from remax.config import ReMaxConfig
from tiny_models import tiny_model
from toy_tokenizers import CHATML, EOS, VOCAB_SIZE, toy_tokenizer

REWARD_FILE = """
def vowels(completions, **kwargs):
    return [sum(c in "aeiou" for c in text) for text in completions]

def short(completions):
    return [1.0]

def words(completions, **kwargs):
    return ["good"] * len(completions)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy, a reward model with another tokenizer, data and reward functions."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, eos_token_id=EOS)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder / "policy")
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(folder / "policy")
    config = LlamaConfig(
        **{**model.config.to_dict(), "num_labels": 1, "pad_token_id": 0, "architectures": None, "dtype": "float32"}
    )
    torch.manual_seed(0)
    for name, labels in (("reward", 1), ("two_labels", 2)):
        config.num_labels = labels
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / name)
        toy_tokenizer("<s> $A", bos_token="<s>", chat_template=CHATML).save_pretrained(folder / name)
    write_lines(folder / "prompts.jsonl", [{"prompt": f"{a} {b}"} for a in "abcd" for b in ("cat", "dog")])
    write_lines(folder / "long.jsonl", [{"prompt": "x" * 60}] * 8)
    write_lines(folder / "questions.jsonl", [{"question": "a"}])
    write_lines(folder / "blank.jsonl", [{"prompt": "a"}, {"prompt": "  "}])
    write_lines(folder / "empty.jsonl", [])
    write_lines(folder / "answers.jsonl", [{"prompt": f"{c}?", "completion": " yes."} for c in "abcdefgh"])
    write_lines(folder / "pairs.jsonl", [{"chosen": f"{c} good", "rejected": f"{c} bad"} for c in "abcdefgh"])
    (folder / "rewards.py").write_text(REWARD_FILE)
    broken = folder / "no_eos"
    model.save_pretrained(broken)
    toy_tokenizer("$A", eos_token=None).save_pretrained(broken)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_flags(world: Path, out: Path, **changes: Any) -> list[str]:
    """Flags of a small run; None leaves a flag out."""
    flags = {
        "model": world / "policy",
        "reward_funcs": f"{world / 'rewards.py'}:vowels",
        "train_dataset": world / "prompts.jsonl",
        "output_dir": out,
        "max_steps": 2,
        "batch_size": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "report_to": "none",
        **changes,
    }
    return [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]


def test_train_evaluate_and_chat(world: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    flags = train_flags(
        world, out, reward_model=world / "reward", eval_dataset=world / "answers.jsonl", report_to="tensorboard"
    )
    assert main(["train", *flags, "--reward_weights", "0.5", "2", "--gradient_checkpointing"]) == 0
    metrics = read_lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2]
    assert {"rewards/reward/mean", "rewards/vowels/mean", "kl", "entropy", "reward/gap"} <= set(metrics[0])
    expected = 0.5 * metrics[0]["rewards/reward/mean"] + 2 * metrics[0]["rewards/vowels/mean"]
    assert metrics[0]["reward"] == pytest.approx(expected, rel=1e-4)
    assert list(out.rglob("events.out.tfevents*"))
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.vocab_size == VOCAB_SIZE
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 2, "plain lines when there is no terminal"

    report = tmp_path / "report"
    evaluate = ["evaluate", "--model", out / "model", "--ref_model", world / "policy", "--output_dir", report]
    evaluate += ["--reward_model", world / "reward", "--eval_dataset", world / "answers.jsonl"]
    assert main([*map(str, evaluate), "--max_completion_length", "6", "--num_generations", "2"]) == 0
    results = json.loads((report / "evaluation.json").read_text())["results"]
    assert set(results) >= {"reward", "reward/greedy", "kl", "completions/mean_length", "perplexity"}
    for result in results.values():
        assert result["interval"][0] <= result["mean"] <= result["interval"][1]
    assert len(read_lines(report / "completions.jsonl")) == 16
    assert "perplexity" in capsys.readouterr().out

    bare = ["evaluate", "--model", world / "policy", "--eval_dataset", world / "answers.jsonl"]
    bare += ["--max_completion_length", 6, "--output_dir", tmp_path / "bare"]
    assert main([str(part) for part in bare]) == 0, "without rewards, length and perplexity are still measured"
    results = json.loads((tmp_path / "bare" / "evaluation.json").read_text())["results"]
    assert "perplexity" in results
    assert "reward" not in results

    inputs = iter(["hello", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(inputs))
    assert main(["chat", "--model", str(out / "model"), "--max_completion_length", "5"]) == 0
    assert "continues your text" in capsys.readouterr().out


def test_sft_and_reward(world: Path, tmp_path: Path) -> None:
    data = ["--report_to", "none", "--batch_size", "4", "--max_steps", "2"]
    common = ["--model", str(world / "policy"), *data]
    answers, pairs = str(world / "answers.jsonl"), str(world / "pairs.jsonl")
    sft = ["sft", *common, "--train_dataset", answers, "--eval_dataset", answers]
    assert main([*sft, "--output_dir", str(tmp_path / "sft")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model")
    reward = ["reward", *common, "--train_dataset", pairs, "--eval_dataset", pairs]
    assert main([*reward, "--output_dir", str(tmp_path / "rm")]) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm" / "model").config.num_labels == 1
    assert main(["train", *train_flags(world, tmp_path / "rl", model=tmp_path / "sft" / "model")]) == 0


def test_conversations_reach_a_reward_model_with_its_own_template(world: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(world / "policy").save_pretrained(chat)
    toy_tokenizer("$A", eos_token="<|im_end|>", chat_template=CHATML).save_pretrained(chat)
    rows = [{"prompt": [{"role": "user", "content": c}]} for c in "abcd"]
    write_lines(tmp_path / "chat.jsonl", rows)
    flags = train_flags(
        world,
        tmp_path / "out",
        model=chat,
        train_dataset=tmp_path / "chat.jsonl",
        reward_model=world / "reward",
        reward_funcs=None,
        system_prompt="Be kind.",
    )
    assert main(["train", *flags]) == 0
    record = read_lines(tmp_path / "out" / "completions.jsonl")[0]
    assert [message["role"] for message in record["prompt"]] == ["system", "user"]


def test_config_file_and_flags(world: Path, tmp_path: Path, capsys: Any) -> None:
    """YAML gives what flags do not; config.yaml of a run reads back; a run from it repeats the run."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", *train_flags(world, first, beta=0.3, top_p=0.8)]) == 0
    saved = yaml.safe_load((first / "config.yaml").read_text())
    assert saved["beta"] == 0.3
    of_a_start = {"resume", "allow_config_change"}  # A permission for one start is none for the next.
    assert set(saved) >= set(ReMaxConfig.__dataclass_fields__) - of_a_start
    assert not of_a_start & set(saved)
    config = str(first / "config.yaml")
    assert main(["train", "--config", config, "--output_dir", str(second)]) == 0
    assert (first / "completions.jsonl").read_bytes() == (second / "completions.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["train", "--config", config, "--beta", "0.5", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["beta"], printed["top_p"]) == (0.5, 0.8)
    assert main(["train", "--beta", "0.5", "--config", config, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["beta"] == 0.5, "a flag in front of the file wins too"


def test_module_and_script_start() -> None:
    for command in ([sys.executable, "-m", "remax"], [str(Path(sys.executable).parent / "remax")]):
        result = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        assert "train" in result.stdout


def test_processes_are_started_with_the_arguments_that_were_given(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("remax.launch.launch", lambda options, arguments: started.append(list(arguments)) or 0)
    flags = ["train", *train_flags(world, tmp_path / "out", accelerate_config="ddp", num_processes=2)]
    own = list(sys.argv)
    with pytest.raises(SystemExit):
        main(flags)
    assert started == [flags]
    assert sys.argv == own


def test_a_warning_is_one_line_without_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def dispatch(arguments: list[str]) -> None:
        for place in (remax.__file__, "/elsewhere.py"):
            lines.append(warnings.formatwarning("no luck\x1b[31m", UserWarning, place, 3))

    monkeypatch.setattr("remax.cli._dispatch", dispatch)
    assert main([]) == 0
    assert lines[0] == "remax: warning: no luck\N{REPLACEMENT CHARACTER}[31m\n"
    assert lines[1].startswith("/elsewhere.py:3: UserWarning: no luck")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_documents_every_flag(command: str, capsys: Any) -> None:
    assert main([command, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for settings in COMMANDS[command].settings:
        for name in settings.__dataclass_fields__:
            assert f"--{name}" in out
    assert "(type" not in out.replace(". (type", "").replace("` (type", ""), "a flag without a word of explanation"


def test_help_loads_no_torch() -> None:
    code = "import sys; from remax.cli import main; main(['train', '--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing dataset": ({"train_dataset": "nowhere.jsonl"}, ["--train_dataset", "nowhere.jsonl"]),
    "empty dataset": ({"train_dataset": "{world}/empty.jsonl"}, ["--train_dataset", "empty.jsonl"]),
    "no prompt column": ({"train_dataset": "{world}/questions.jsonl"}, ["--train_dataset", "question", "prompt"]),
    "blank prompt": ({"train_dataset": "{world}/blank.jsonl"}, ["--train_dataset", "1"]),
    "all too long": (
        {"train_dataset": "{world}/long.jsonl", "max_prompt_length": 20},
        ["--train_dataset", "20", "--max_prompt_length", "61"],
    ),
    "no EOS": ({"model": "{world}/no_eos"}, ["--model", "EOS"]),
    "two labels": ({"reward_model": "{world}/two_labels"}, ["--reward_model", "2 labels", "remax reward"]),
    "no reward head": ({"reward_model": "{world}/policy"}, ["--reward_model", "no reward head", "remax reward"]),
    "wrong number": ({"reward_funcs": "{world}/rewards.py:short"}, ["--reward_funcs", "short", "1 rewards", "8"]),
    "wrong type": ({"reward_funcs": "{world}/rewards.py:words"}, ["--reward_funcs", "words", "good"]),
    "no such function": ({"reward_funcs": "{world}/rewards.py:vowel"}, ["--reward_funcs", "did you mean vowels"]),
    "no such reward file": ({"reward_funcs": "{world}/nothing.py:f"}, ["--reward_funcs", "nothing.py"]),
    "no reward": ({"reward_funcs": None}, ["--reward_model", "--reward_funcs"]),
    "large batch": ({"batch_size": 9}, ["--batch_size is 9", "8 usable prompts", "set --batch_size 8"]),
    "unknown flag": ({"learning_rat": 1}, ["--learning_rat", "did you mean learning_rate"]),
    "foreign flag": ({"per_device_train_batch_size": 1}, ["--per_device_train_batch_size", "batch_size"]),
    "no number": ({"beta": "high"}, ["--beta is high", "a number"]),
    "no whole number": ({"max_steps": "1.5"}, ["--max_steps is 1.5", "a whole number"]),
    "no such choice": ({"kl_mode": "togo"}, ["--kl_mode is togo", "did you mean to_go"]),
    "impossible setting": ({"beta": -1}, ["--beta is -1", "set 0 or more"]),
    "no such model": ({"model": "./nothing"}, ["--model is ./nothing"]),
    "weights": ({"reward_weights": "1 2 3"}, ["--reward_weights", "3", "1 rewards"]),
    "no such tracker": ({"report_to": "tensorbord"}, ["--report_to", "tensorbord"]),
    "no model": ({"model": None}, ["--model must be set"]),
    "no such config": ({"config": "no.yaml"}, ["--config is no.yaml", "no such file"]),
    "short context": ({"max_completion_length": 300}, ["--max_completion_length is 300", "256"]),
    "system prompt for texts": ({"system_prompt": "x"}, ["--system_prompt"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    mistake: str, world: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, words = MISTAKES[mistake]
    changes = {name: str(v).format(world=world) if v is not None else None for name, v in changes.items()}
    monkeypatch.chdir(tmp_path)
    arguments = train_flags(world, tmp_path / "out", **changes)
    if mistake == "weights":
        arguments = [part for a in arguments for part in (a.split() if a == "1 2 3" else [a])]
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("remax: ")
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error, error
    assert ";" in error, "what follows, then what to do"
    assert not (tmp_path / "out").exists()


def test_a_taken_folder_is_refused_and_left_alone(world: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text("precious")
    assert main(["train", *train_flags(world, out)]) == 2
    assert "it already holds a run" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["metrics.jsonl"]
    assert (out / "metrics.jsonl").read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("beta: [1", ["not valid YAML", "line"]),
        ("just words", ["no settings"]),
        ("learn_rate: 3", ["learn_rate", "did you mean learning_rate"]),
    ],
)
def test_mistakes_in_a_config_file(content: str, words: list[str], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ["--config", "run.yaml", *words]), error


def test_unknown_commands_and_stray_words(capsys: Any) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train" in capsys.readouterr().err
    assert main(["train", "stray"]) == 2
    assert "stray is no flag" in capsys.readouterr().err
    assert main(["train", "-model", "x"]) == 2
    assert "did you mean --model" in capsys.readouterr().err
    for flags in (["--config"], ["--reward_weights"], ["--reward_weights", "[1,"]):
        assert main(["train", *flags]) == 2
        assert flags[0] in capsys.readouterr().err
    assert main(["train", "--beta"]) == 2
    assert "--beta has no value" in capsys.readouterr().err
    assert main([]) == 0
    assert main(["--version"]) == 0

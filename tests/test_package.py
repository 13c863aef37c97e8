"""What comes before any training: starting up, versions, shell completion, starter files, and the wheel."""

import importlib.metadata
import json
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

import remax
from remax.cli import main
from remax.commands import COMMANDS
from remax.completion import script
from remax.config import LaunchOptions, ReMaxConfig, TrainInputs
from remax.flags import docs_of, grouped, parse
from remax.recipes import RECIPES
from remax.starter import SETTINGS, starter
from remax.versions import version_lines
from tiny_models import tiny_model
from toy_tokenizers import EOS, VOCAB_SIZE, toy_tokenizer

ROOT = Path(__file__).resolve().parents[1]
STARTS = 5


# Starting up ----------------------------------------------------------------------------------------------------------


def seconds_of(*command: str) -> float:
    """Processor time, which a busy machine changes less than the time on the clock."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_starts_quickly() -> None:
    """Measured: 8 to 10 times what Python itself takes; with torch it would be some 200 times."""
    empty, overview = zip(
        *((seconds_of("-c", "pass"), seconds_of("-m", "remax", "--help")) for _ in range(STARTS)), strict=True
    )
    assert median(overview) < 25 * median(empty)


@pytest.mark.parametrize("flag", ["--help", "--version", "init"])
def test_what_needs_no_training_loads_none_of_its_libraries(flag: str) -> None:
    heavy = ["torch", "transformers", "datasets", "trl", "accelerate", "peft", "numpy", "matplotlib"]
    code = f"""
        import sys
        from remax.cli import main
        assert main(['{flag}']) == 0
        loaded = [name for name in {heavy} if name in sys.modules]
        assert not loaded, loaded
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True)


def test_version_names_what_matters(capsys: Any) -> None:
    import torch

    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == version_lines()
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert lines[0] == f"remax {declared[1]}" == f"remax {remax.__version__}"
    assert lines[1].startswith(f"python {sys.version.split()[0]} ")
    for name in ("torch", "transformers", "trl", "accelerate"):
        assert f"{name} {importlib.metadata.version(name)}" in lines
    assert lines[-1] == f"CUDA {torch.version.cuda or 'none (torch is built for the CPU)'}"


# Completion -----------------------------------------------------------------------------------------------------------


def completed_by_bash(tmp_path: Path, *words: str) -> list[str]:
    """Returns what bash offers for the last word; words are as bash has them, with = on its own."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    path = tmp_path / "completion.bash"
    path.write_text(script("bash", COMMANDS))
    quoted = " ".join(f"'{word}'" for word in ("remax", *words))
    run = f"source {path}; COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _remax; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    result = subprocess.run([bash, "-c", run], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stderr == ""
    return [line for line in result.stdout.split("\n") if line]


def test_bash_completes_commands_flags_and_values(tmp_path: Path) -> None:
    (tmp_path / "my prompts.jsonl").touch()
    assert completed_by_bash(tmp_path, "tr") == ["train"]
    assert set(completed_by_bash(tmp_path, "")) == {*COMMANDS, "--help", "--version"}
    assert completed_by_bash(tmp_path, "train", "--kl_m") == ["--kl_mode"]
    assert completed_by_bash(tmp_path, "train", "--kl_mode", "to") == ["to_go"]
    assert completed_by_bash(tmp_path, "train", "--kl_mode", "=", "one") == ["one_step"]
    assert completed_by_bash(tmp_path, "train", "--baseline", "m") == ["mixed", "moving_average"]
    assert completed_by_bash(tmp_path, "train", "--bf16", "") == ["true", "false"]
    assert completed_by_bash(tmp_path, "train", "--train_dataset", "my") == ["my prompts.jsonl"]
    assert completed_by_bash(tmp_path, "completion", "f") == ["fish"]
    assert completed_by_bash(tmp_path, "init", "su") == ["summarise"]
    assert completed_by_bash(tmp_path, "evaluate", "--kl_mode", "t") == [], "a flag of another command"


def test_bash_knows_every_flag_of_every_command(tmp_path: Path) -> None:
    for name, command in COMMANDS.items():
        flags = {f"--{field}" for settings in command.settings for field in settings.__dataclass_fields__}
        assert set(completed_by_bash(tmp_path, name, "--")) == flags | {"--config", "--print_config", "--help"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_their_scripts(shell: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert text == script(shell, COMMANDS)
    for words in (*COMMANDS, "to_go one_step loss none"):
        assert words in text
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"the rest needs {shell}")
    path = tmp_path / "completion"
    path.write_text(text)
    subprocess.run([program, "-n", str(path)], check=True, capture_output=True)
    if shell == "fish":
        ask = f"source {path}; complete -C 'remax train --kl_mode o'"
        result = subprocess.run([program, "--no-config", "-c", ask], check=True, capture_output=True, text=True)
        assert result.stdout.split() == ["one_step"]


# Starter files --------------------------------------------------------------------------------------------------------


def settings_of(path: Path) -> dict[str, Any]:
    parsed = parse("remax train", "", COMMANDS["train"].settings, ["--config", str(path)], example="")
    assert parsed is not None
    return {name: getattr(own, name) for own in parsed for name in own.__dataclass_fields__}


@pytest.mark.parametrize("name", RECIPES)
def test_a_starter_file_is_what_train_accepts(name: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run.yaml"
    assert main(["init", name, "--output", str(path)]) == 0
    assert f"  {RECIPES[name].command} {path}\n" in capsys.readouterr().out
    found = settings_of(path)
    for setting, value in RECIPES[name].settings.items():
        assert found[setting] == value
    text = path.read_text()
    assert max(len(line) for line in text.splitlines() if str(path) not in line) <= 104

    # Every setting stands there once, and taking the # away from one changes nothing.
    settings = [m[1] for m in re.finditer(r"^(?:# )?(\w+): .*$", text, re.MULTILINE) if m[1] in found]
    launch = set(LaunchOptions.__dataclass_fields__)
    assert sorted(settings) == sorted(set(found) - launch)
    everything = tmp_path / "everything.yaml"
    known = "|".join(found)
    everything.write_text(re.sub(rf"^# ((?:{known}): (?!null).*)$", r"\1", text, flags=re.MULTILINE))
    assert len(yaml.safe_load(everything.read_text())) > len(yaml.safe_load(text)) + 50
    assert settings_of(everything) == found


def test_comments_are_the_settings_own_words() -> None:
    lines = starter("gsm8k", RECIPES["gsm8k"]).splitlines()
    paragraphs = {}
    comment: list[str] = []
    for line in lines:
        match = re.match(r"(?:# )?(\w+): ", line)
        if match and match[1] in {**TrainInputs.__dataclass_fields__, **ReMaxConfig.__dataclass_fields__}:
            paragraphs[match[1]] = " ".join(comment)
            comment = []
        else:
            comment = [*comment, line[2:]] if line.startswith("# ") else []
    documented = {
        field.name: " ".join((docs_of(group)[field.name] or "").split())
        for settings in SETTINGS
        for group, fields in grouped(settings).items()
        for field in fields
    }
    assert paragraphs == documented


@pytest.mark.slow
def test_the_recipe_for_24_gb_fits_into_them(tmp_path: Path, capsys: Any) -> None:
    """By `remax plan`, with the shapes of Qwen2.5-7B and, as the reward model, of Qwen2.5-0.5B."""
    for name, kind, shape in (
        ("policy", "Qwen2ForCausalLM", (152064, 3584, 18944, 28, 28, 4, False)),
        ("reward", "Qwen2ForSequenceClassification", (151936, 896, 4864, 24, 14, 2, True)),
    ):
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        config = dict(zip((*names, "num_key_value_heads", "tie_word_embeddings"), shape, strict=True))
        config |= {"model_type": "qwen2", "architectures": [kind], "max_position_embeddings": 32768}
        config |= {"num_labels": 1} if name == "reward" else {}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    settings = dict(RECIPES["lora-24gb"].settings, model="", reward_model="")
    settings |= {"model": str(tmp_path / "policy"), "reward_model": str(tmp_path / "reward")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    flags = ["--device_memory", "24GB", "--output_file", str(tmp_path / "plan.json")]
    assert main(["plan", "--config", str(tmp_path / "run.yaml"), *flags]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert 7.6e9 < plan["parameters"]["policy"] < 7.8e9
    assert plan["fits"]
    assert plan["peak"] < 20 * 2**30


def test_init_lists_recipes_and_overwrites_nothing(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    listed = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        assert f"{name:15} {recipe.summary}" in listed
    assert not list(tmp_path.iterdir())
    assert main(["init", "gsm8"]) == 2
    assert "did you mean gsm8k" in capsys.readouterr().err
    Path("run.yaml").write_text("mine")
    assert main(["init", "gsm8k"]) == 2
    assert "run.yaml: that is there already and would be overwritten" in capsys.readouterr().err
    assert Path("run.yaml").read_text() == "mine"
    assert main(["init", "gsm8k", "--output", "no/folder/run.yaml"]) == 2
    assert "it cannot be written (No such file or directory)" in capsys.readouterr().err


# The wheel ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and the libraries of the one that runs the tests behind it."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools, with which the wheel is built")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = folder / "source"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True)
    # A line of a .pth file adds a folder, but does not follow the .pth files in it: no editable install comes along.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    return folder


def run_installed(installed: Path, *arguments: str) -> str:
    """Runs `python -m remax` of the wheel's environment, in a folder that is no source tree."""
    python = installed / "environment" / "bin" / "python"
    result = subprocess.run(
        [str(python), "-I", "-m", "remax", *arguments], capture_output=True, text=True, cwd=installed
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(installed: Path) -> None:
    (wheel,) = installed.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("remax/")}
    source = installed / "source" / "src"
    there = {str(path.relative_to(source)) for path in (source / "remax").rglob("*") if path.is_file()}
    assert inside == there


@pytest.mark.slow
def test_the_wheel_trains_outside_of_the_source_tree(installed: Path) -> None:
    python = installed / "environment" / "bin" / "python"
    where = subprocess.run(
        [str(python), "-I", "-c", "import remax; print(remax.__file__)"], check=True, capture_output=True, text=True
    )
    assert Path(where.stdout.strip()).is_relative_to(installed / "environment")
    assert run_installed(installed, "--version").splitlines() == version_lines()
    assert "--max_steps" in run_installed(installed, "demo", "--help")
    assert run_installed(installed, "init", "sentiment", "--output", "run.yaml")

    model = tiny_model("llama", vocab_size=VOCAB_SIZE, eos_token_id=EOS)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(installed / "policy")
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(installed / "policy")
    (installed / "prompts.jsonl").write_text("".join(json.dumps({"prompt": c}) + "\n" for c in "abcd"))
    (installed / "rewards.py").write_text("def length(completions, **_):\n    return [len(c) for c in completions]\n")
    settings = {
        "model": "policy",
        "train_dataset": "prompts.jsonl",
        "reward_funcs": "rewards.py:length",
        "batch_size": 2,
        "max_steps": 2,
        "max_completion_length": 4,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    run_installed(installed, "train", *flags, "--output_dir", "out")
    assert len((installed / "out" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (installed / "out" / "model" / "config.json").exists()


@pytest.mark.slow
def test_the_wheel_runs_the_demo_outside_of_the_source_tree(installed: Path) -> None:
    sizes = {"num_stories": 300, "sft_steps": 2, "num_pairs": 300, "reward_steps": 2, "max_steps": 2}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    run_installed(installed, "demo", *flags, "--num_eval_prompts", "8", "--output_dir", "demo")
    assert list((installed / "demo").rglob("metrics.jsonl"))

"""What SECURITY.md promises: nothing downloaded is run, nothing shown steers a terminal, no secret is written down."""

import io
import json
import os
import pickle
import stat
import unicodedata
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuzzing import check_sentence, fuzz
from remax import chat
from remax.cli import main
from remax.config import ModelOptions
from remax.data import load_records
from remax.demo import results
from remax.errors import UserError
from remax.markup import safe
from remax.models import load_policy, load_reward_model, load_tokenizer, new_reward_model
from remax.progress import LivePanel, PlainLines
from remax.untrusted import harmless_json, printable, shown
from test_cli import train_flags, world, write_lines  # noqa: F401

HOSTILE = "\x1b]8;;http://evil\x07link\x1b]8;;\x07\x1b[2J\x9b31m\u202egnp\u200b\u2066\x00\r[bold]x[/bold]<script>&\"'"
STEERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
CODE = """
from pathlib import Path
Path({marker!r}).write_text("it ran")
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizer
class Own(PretrainedConfig):
    model_type = "own"
class OwnModel(PreTrainedModel):
    config_class = Own
class OwnTokenizer(PreTrainedTokenizer):
    pass
def generate(*args, **kwargs):
    return None
"""


class Exploit:
    """What a pickle can be: anything at all, run when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.write_text, (self.marker, "it ran")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that hostile code would write."""
    return tmp_path / "marker"


def change_json(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def copy_of(folder: Path, to: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return to


AUTO_MAP = {
    "AutoConfig": "own.Own",
    "AutoModelForCausalLM": "own.OwnModel",
    "AutoModelForSequenceClassification": "own.OwnModel",
    "AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"],
}
LOADERS: dict[str, Callable[[str], Any]] = {
    "tokenizer": lambda name: load_tokenizer(name, flag="--model"),
    "policy": lambda name: load_policy(name, ModelOptions(), flag="--model"),
    "reward model": lambda name: load_reward_model(name, flag="--reward_model"),
    "new reward model": lambda name: new_reward_model(name, ModelOptions(), None, seed=0, flag="--model"),
}


# Nothing downloaded is run


@pytest.fixture
def with_code(world: Path, tmp_path: Path, marker: Path) -> Path:  # noqa: F811
    """A model of an architecture that only the Python file beside it knows."""
    folder = copy_of(world / "policy", tmp_path / "with_code")
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    change_json(folder / "config.json", model_type="own", auto_map=AUTO_MAP, architectures=["OwnModel"])
    change_json(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=AUTO_MAP)
    return folder


@pytest.mark.parametrize("kind", LOADERS)
def test_code_beside_a_model_is_never_run(kind: str, with_code: Path, marker: Path) -> None:
    with pytest.raises(UserError) as error:
        LOADERS[kind](str(with_code))
    check_sentence(str(error.value))
    assert not marker.exists()


def test_a_model_that_needs_its_own_code_is_refused_by_the_command(
    world: Path,  # noqa: F811
    with_code: Path,
    marker: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    AutoTokenizer.from_pretrained(world / "policy").save_pretrained(with_code)
    assert main(["train", *train_flags(world, tmp_path / "out", model=with_code)]) == 2
    error = capsys.readouterr().err
    assert "needs Python code that comes with the model, which is never run here" in error
    assert len(error.splitlines()) == 1
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_a_model_that_transformers_knows_is_loaded_without_the_code_beside_it(
    world: Path,  # noqa: F811
    tmp_path: Path,
    marker: Path,
) -> None:
    folder = copy_of(world / "policy", tmp_path / "known")
    for path in ("own.py", "custom_generate/generate.py"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(CODE.format(marker=str(marker)))
    (folder / "custom_generate" / "requirements.txt").write_text("")
    change_json(folder / "config.json", auto_map=AUTO_MAP)
    change_json(folder / "tokenizer_config.json", auto_map=AUTO_MAP)
    assert load_tokenizer(str(folder), flag="--model").eos_token_id is not None
    model = load_policy(str(folder), ModelOptions(), flag="--model")
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape[0] == 1
    assert not marker.exists()


def test_pickled_weights_are_never_read(world: Path, tmp_path: Path, marker: Path) -> None:  # noqa: F811
    folder = copy_of(world / "policy", tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save(Exploit(marker), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="could not be loaded"):
        load_policy(str(folder), ModelOptions(), flag="--model")
    honest = AutoModelForCausalLM.from_pretrained(world / "policy").state_dict()
    torch.save(honest, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_policy(str(folder), ModelOptions(), flag="--model")
    index = {"metadata": {}, "weight_map": dict.fromkeys(honest, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(Exploit(marker), folder / "pytorch_model.bin")
    with pytest.raises(UserError):
        load_policy(str(folder), ModelOptions(), flag="--model")
    assert not marker.exists()


def test_pickled_adapters_are_never_read(world: Path, tmp_path: Path, marker: Path) -> None:  # noqa: F811
    base = AutoModelForCausalLM.from_pretrained(world / "policy")
    folder = tmp_path / "adapter"
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])).save_pretrained(folder)
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(world / "policy"))
    assert load_policy(str(folder), ModelOptions(), flag="--model") is not None
    (folder / "adapter_model.safetensors").unlink()
    torch.save(Exploit(marker), folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors, and pickled weights are not read"):
        load_policy(str(folder), ModelOptions(), flag="--model")
    assert not marker.exists()


def test_an_adapter_that_is_no_change_of_weights_is_refused(world: Path, tmp_path: Path) -> None:  # noqa: F811
    """Its configuration could name a tokenizer to load, with the code beside that."""
    base = AutoModelForCausalLM.from_pretrained(world / "policy")
    folder = tmp_path / "prompt"
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(folder)
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(world / "policy"))
    with pytest.raises(UserError, match="is no change of weights that could be merged; set one such as LoRA"):
        load_policy(str(folder), ModelOptions(), flag="--model")


@pytest.mark.parametrize("name", ["data.py", "rows.py", "train.pkl", "train.pickle"])
def test_code_and_pickles_in_a_folder_of_data_are_never_run(name: str, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    content = CODE.format(marker=str(marker)).encode() if name.endswith(".py") else pickle.dumps(Exploit(marker))
    (folder / name).write_bytes(content)
    for source in (folder, folder / name):
        with pytest.raises(UserError):
            load_records(str(source), "train", flag="--train_dataset")
    assert not marker.exists()


# Nothing shown steers a terminal


def test_untrusted_text_is_shown_and_written_without_harm() -> None:
    def check(text: str) -> None:
        for c in printable(text):
            category = unicodedata.category(c)
            assert c in "\n\t" or (category[0] != "C" and category not in ("Zl", "Zp")), hex(ord(c))
        sentence = shown(text, 40)
        assert len(sentence) <= 40
        assert len(sentence.splitlines()) <= 1
        written = harmless_json(json.dumps({"text": text}, ensure_ascii=False))
        assert json.loads(written) == json.loads(json.dumps({"text": text}))
        assert not [c for c in written if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
        assert not [c for c in written if unicodedata.bidirectional(c) in STEERING]
        html = safe(text)
        assert not set(html) & set("<>\"'")
        assert unescape(html) == printable(text)

    hostile = st.sampled_from(
        ["\x1b[31m", "\x9b", "\x07", "\u202e", "\u2028", "\ud800", "\U000e0041", "&lt;", "<b>", "é", "🙂"]
    )
    anything = st.characters() | st.characters(categories=["Cc", "Cf", "Cs"])
    fuzz("untrusted text", st.lists(hostile | anything, max_size=12).map("".join), check)


def test_passwords_in_urls_are_not_shown() -> None:
    assert shown("https://me:secret@host/x and s3://key@bucket") == "https://***@host/x and s3://***@bucket"


def harmless(text: str) -> bool:
    return printable(text) == text and "gnp" in text


def test_a_sample_and_a_note_cannot_steer_the_terminal(capsys: Any) -> None:
    console = Console(file=io.StringIO(), width=300, color_system=None)
    LivePanel(console).note(HOSTILE)
    assert harmless(console.file.getvalue())  # type: ignore[attr-defined]
    assert "[bold]x[/bold]" in console.file.getvalue()  # type: ignore[attr-defined]
    PlainLines().note(HOSTILE)
    assert harmless(capsys.readouterr().out)


def test_an_answer_in_chat_cannot_steer_the_terminal(world: Path, capsys: Any) -> None:  # noqa: F811
    streamer = chat._PrintableStreamer(load_tokenizer(str(world / "policy"), flag="--model"))
    streamer.on_finalized_text(HOSTILE, stream_end=True)
    assert harmless(capsys.readouterr().out)


def test_typed_half_characters_reach_no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "a\ud83d")
    assert chat._read() == "a?"


def test_stories_of_the_demo_cannot_steer_the_terminal(capsys: Any) -> None:
    figures = results.Measurement(
        dict.fromkeys(results.UNITS, 0.0), dict.fromkeys(results.UNITS, (0.0, 0.0)), [HOSTILE]
    )
    results.print_results([HOSTILE], figures, figures)
    out = capsys.readouterr().out
    assert printable(out) == out


def test_what_a_dataset_says_cannot_steer_the_terminal(world: Path, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    for number, row in enumerate([{HOSTILE: "a"}, {"prompt": [{HOSTILE: 1}]}, {"prompt": [{"role": HOSTILE}]}]):
        path = tmp_path / f"{number}.jsonl"
        write_lines(path, [row])
        assert main(["train", *train_flags(world, tmp_path / "out", train_dataset=path)]) == 2
        error = capsys.readouterr().err.removesuffix("\n")
        check_sentence(error)


# No secret is written down, and nothing is written elsewhere


def test_secrets_of_the_environment_are_in_no_file(
    world: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    secrets = {
        name: f"s3cr3t-{number}-{name[:4]}"
        for number, name in enumerate(
            ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "REMAX_REWARD_TOKEN", "AWS_SECRET_ACCESS_KEY")
        )
    }
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    former = os.umask(0o022)
    out = tmp_path / "out"
    try:
        flags = train_flags(
            world, out, report_to="tensorboard", eval_dataset=world / "answers.jsonl", max_steps=1, save_steps=1
        )
        assert main(["train", *flags]) == 0
    finally:
        os.umask(former)
    shown_text = "".join(capsys.readouterr())
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"config.yaml", "README.md", "metrics.jsonl"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert not [name for name, secret in secrets.items() if secret.encode() in content], path
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == 0o644, (path, oct(mode))
    assert not [name for name, secret in secrets.items() if secret in shown_text]


def test_a_url_with_a_password_is_neither_shown_nor_written(world: Path, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    url = "https://me:s3cr3t@host/x.jsonl"
    for changes in ({"train_dataset": url}, {"eval_dataset": url}, {"model": url}, {"reward_model": url}):
        assert main(["train", *train_flags(world, tmp_path / "out", **changes)]) == 2
        output = "".join(capsys.readouterr())
        assert "s3cr3t" not in output, changes
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("label", ["../out", "a/b", "..", ".", " ", "a\nb", "\x1b[2J"])
def test_a_label_of_a_comparison_cannot_leave_its_folder(
    label: str,
    world: Path,  # noqa: F811
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [f"--{name}={world / name.split('_')[0]}" for name in ("reward_model",)]
    flags += [f"--model={world / 'policy'}", f"--train_dataset={world / 'prompts.jsonl'}"]
    flags += [f"--eval_dataset={world / 'prompts.jsonl'}", "--output_dir=out"]
    flags += [f"--methods={json.dumps({label: {'method': 'remax'}})}"]
    assert main(["compare", *flags]) == 2
    error = capsys.readouterr().err.removesuffix("\n")
    assert "a folder is named after it" in error
    check_sentence(error)
    assert list(tmp_path.iterdir()) == []

"""The recipes in examples/, run for a step or two on a tiny model, and the notebook."""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from example_files import EXAMPLES, lines, module_of
from remax.cli import main
from remax.recipes import RECIPES
from toy_tokenizers import CHATML

TINY = {
    "max_steps": 2,
    "batch_size": 4,
    "max_completion_length": 8,
    "num_eval_prompts": 2,
    "eval_steps": 0,
    "save_steps": -1,
    "report_to": "none",
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(tinystories: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the recipes of the story model want: the model, openings and a reward model."""
    folder = tmp_path_factory.mktemp("stories")
    (folder / "models").mkdir()
    (folder / "models/tinystories-260k").symlink_to(tinystories)
    module_of("sentiment/openings.py").main(folder / "openings")
    pairs = write(folder / "pairs.jsonl", pairs_of(shared, 8))
    flags = ["--model", str(tinystories), "--train_dataset", str(pairs), "--output_dir", str(folder / "reward")]
    assert main(["reward", *flags, *as_flags(max_steps=1, batch_size=4, save_steps=-1, report_to="none")]) == 0
    return folder


@pytest.fixture(scope="module")
def chatty(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The story model with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(tinystories, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    return folder


@pytest.fixture
def enter(tmp_path: Path, monkeypatch: Any) -> Callable[..., Path]:
    """Copies an example, with what lies in another folder beside it, and goes there as its README says."""

    def go(name: str, beside: Path | None = None) -> Path:
        folder = tmp_path / name
        shutil.copytree(EXAMPLES / name, folder)
        for path in beside.iterdir() if beside else ():
            (folder / path.name).symlink_to(path)
        monkeypatch.chdir(folder)
        return folder

    return go


def as_flags(**settings: Any) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def run(name: str, **changes: Any) -> Path:
    """Runs the recipe in this folder, shrunk, and returns its output folder, which holds what it should."""
    changes = TINY | changes
    assert main(["train", "--config", "run.yaml", *as_flags(**changes)]) == 0
    return ran(name, changes)


def ran(name: str, changes: dict[str, Any]) -> Path:
    expected = RECIPES[name].settings
    folder = Path(changes.get("output_dir", expected["output_dir"]))
    recorded = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    for setting, value in expected.items():
        if setting not in changes and setting in recorded:
            assert recorded[setting] == value, setting
    steps = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2]
    assert len(lines(folder / "completions.jsonl")) == 2 * TINY["batch_size"]
    assert len(lines(folder / "eval.jsonl")) == 2
    assert (folder / "model/config.json").is_file() or (folder / "model/adapter_config.json").is_file()
    return folder


def test_sentiment(stories: Path, enter: Callable[..., Path]) -> None:
    enter("sentiment", stories)
    run("sentiment", gold_reward_model="reward/model")
    evaluated = lines(Path("policy/eval.jsonl"))
    assert all(line["eval/gold"] == pytest.approx(line["eval/reward"]) for line in evaluated)


def test_several_rewards(stories: Path, enter: Callable[..., Path]) -> None:
    enter("several-rewards", stories)
    rewards = module_of("several-rewards/rewards.py")
    for record in lines(run("several-rewards") / "completions.jsonl"):
        parts = record["rewards"]
        assert parts["variety"] == pytest.approx(rewards.variety([record["completion"]])[0])
        assert parts["ending"] == pytest.approx(rewards.ending([record["completion"]])[0])
        weighted = parts["reward"] + 4 * parts["variety"] + 2 * parts["ending"]
        assert record["reward"] == pytest.approx(weighted, abs=1e-5)


def test_custom_engine(stories: Path, enter: Callable[..., Path]) -> None:
    """It draws the very completions of remax's own engine, so the runs are the same."""
    enter("custom-engine", stories)
    settings = TINY | {"report_to": ["none"]}
    module_of("custom-engine/train.py").main(Path("run.yaml"), **settings)
    mine = lines(ran("custom-engine", settings) / "completions.jsonl")
    theirs = lines(run("custom-engine", output_dir="theirs") / "completions.jsonl")
    texts = ("prompt", "completion", "greedy_completion", "truncated")
    assert [[record[name] for name in texts] for record in mine] == [[r[name] for name in texts] for r in theirs]
    assert [r["advantage"] for r in mine] == pytest.approx([r["advantage"] for r in theirs], abs=1e-4)


@pytest.fixture
def served() -> Iterator[tuple[str, ModuleType]]:
    """The address of the example's own reward server, and its module."""
    module = module_of("reward-server/server.py")
    server = module.ThreadingHTTPServer(("127.0.0.1", 0), module.Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", module
    server.shutdown()
    server.server_close()


def test_reward_server(stories: Path, enter: Callable[..., Path], served: tuple[str, ModuleType]) -> None:
    url, module = served
    enter("reward-server", stories)
    records = lines(run("reward-server", reward_url=url, max_completion_length=24) / "completions.jsonl")
    expected = module.score([], [record["completion"] for record in records], {})
    assert [record["reward"] for record in records] == pytest.approx(expected)
    assert module.score([], ["A happy, kind dog.", "", "no"], {}) == [5.0, None, 0.0]


@pytest.mark.slow
def test_reward_server_with_the_reference_server(stories: Path, enter: Callable[..., Path]) -> None:
    """As its README says: what `remax serve-reward` gives is what the model itself gives."""
    enter("reward-server", stories)
    command = [sys.executable, "-m", "remax", "serve-reward", "reward/model", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            url = next(m[1] for m in (re.search(r"served at (\S+);", line) for line in server.stdout) if m)
            served = lines(run("reward-server", reward_url=url) / "completions.jsonl")
        finally:
            server.terminate()
            server.communicate()
    enter("custom-engine", stories)  # The same settings, with the reward model in the run's own process.
    own = lines(run("custom-engine", output_dir="own") / "completions.jsonl")
    assert [record["reward"] for record in served] == [record["reward"] for record in own]


SHORT_QUESTION = 150


def gsm8k_source(shared: Path, folder: Path) -> Path:
    """A few short problems in the files of the dataset."""
    for split in ("train", "test"):
        rows = [row for row in lines(shared / f"data/gsm8k/{split}.jsonl") if len(row["question"]) < SHORT_QUESTION]
        write(folder / f"{split}.jsonl", rows[:12])
    return folder


@pytest.mark.parametrize("function", ["same_number", "correct"])
def test_gsm8k(function: str, shared: Path, chatty: Path, enter: Callable[..., Path], tmp_path: Path) -> None:
    if function == "correct":
        pytest.importorskip("math_verify", reason="needs math-verify")
    enter("gsm8k")
    source = gsm8k_source(shared, tmp_path / "source")
    module_of("gsm8k/prepare.py").main(Path("data"), source)
    asked, prepared = lines(source / "train.jsonl"), lines(Path("data/train.jsonl"))
    assert [row["prompt"][0]["content"] for row in prepared] == [row["question"] for row in asked]
    assert all(float(row["answer"]) == float(row["answer"]) for row in prepared), "plain numbers"
    file = "rewards.py" if function == "correct" else "plain_rewards.py"
    run("gsm8k", model=chatty, reward_funcs=f"{file}:{function}")
    rewards = getattr(module_of(f"gsm8k/{file}"), function)
    for record in lines(Path("gsm8k/completions.jsonl")):
        system, question = record["prompt"]
        assert system["content"] == RECIPES["gsm8k"].settings["system_prompt"]
        answers = [row["answer"] for row in prepared if row["prompt"] == [question]]
        assert record["reward"] == rewards([record["completion"]], answers)[0]


def test_reasoning_gym(chatty: Path, enter: Callable[..., Path]) -> None:
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym")
    enter("reasoning-gym")
    module_of("reasoning-gym/prepare.py").main(Path("data"), 8, 4)
    # Characters are tokens to this model: long puzzles are dropped, so the length of the run is set by steps.
    run("reasoning-gym", model=chatty, max_prompt_length=400)


def pairs_of(shared: Path, number: int) -> list[dict[str, str]]:
    rows = [row for row in lines(shared / "data/sentiment/train.jsonl") if len(str(row)) < 200]
    return [{"prompt": f"Human: Say it again. {n}\n\nAssistant:", **row} for n, row in enumerate(rows[:number])]


def stage(name: str, **changes: Any) -> None:
    """Runs a stage before the training, shrunk."""
    shrunk = {"max_steps": 1, "batch_size": 4, "save_steps": -1, "report_to": "none", "max_length": 256} | changes
    assert main([name, "--config", f"{name}.yaml", *as_flags(**shrunk)]) == 0


@pytest.fixture
def prepared_7b(shared: Path, enter: Callable[..., Path], tmp_path: Path) -> None:
    """The folder of rlhf-7b with data."""
    write(tmp_path / "pairs/train.jsonl", pairs_of(shared, 40))
    write(tmp_path / "pairs/test.jsonl", pairs_of(shared, 40)[30:])
    enter("rlhf-7b")
    module_of("rlhf-7b/prepare.py").main("data", str(tmp_path / "pairs"))


@pytest.mark.usefixtures("prepared_7b")
def test_rlhf_7b_splits_2_4_4(shared: Path) -> None:
    parts = {name: lines(Path(f"data/{name}.jsonl")) for name in ("sft", "reward", "rl")}
    assert {name: len(rows) for name, rows in parts.items()} == {"sft": 8, "reward": 16, "rl": 16}
    prompts = [row["prompt"] for rows in parts.values() for row in rows]
    given = {pair["prompt"]: pair for pair in pairs_of(shared, 40)}
    assert sorted(prompts) == sorted(given), "no pair is in two parts"
    assert prompts != list(given), "shuffled"
    assert all(row["completion"] == given[row["prompt"]]["chosen"] for row in parts["sft"])
    assert all(row == given[row["prompt"]] for row in parts["reward"])
    assert [set(row) for row in parts["rl"]] == [{"prompt"}] * 16
    assert [len(lines(Path(f"data/{name}_test.jsonl"))) for name in parts] == [2, 4, 4]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", pytest.param("adamw_torch_8bit", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("prepared_7b")
def test_rlhf_7b(optim: str, tinystories: Path) -> None:
    """Its own optimiser compiles itself, which takes a minute."""
    if optim == "adamw_torch_8bit":
        pytest.importorskip("torchao", reason="needs torchao")
    for name in ("sft", "reward"):
        assert yaml.safe_load(Path(f"{name}.yaml").read_text())["optim"] == "adamw_torch_8bit"
        stage(name, model=tinystories, optim=optim)
    run("rlhf-7b")


@pytest.mark.slow
def test_summarise(tinystories: Path, shared: Path, enter: Callable[..., Path]) -> None:
    enter("summarise")
    pairs = write(Path("preference.jsonl"), pairs_of(shared, 8))
    texts = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs_of(shared, 8)]
    data = write(Path("tldr.jsonl"), texts)
    stage("sft", model=tinystories, train_dataset=data, eval_dataset=data, micro_batch_size=2)
    stage("reward", train_dataset=pairs, eval_dataset=pairs, micro_batch_size=2)
    run("summarise", train_dataset=data, eval_dataset=data, max_prompt_length=256)


def test_lora_24gb(chatty: Path, shared: Path, enter: Callable[..., Path]) -> None:
    enter("lora-24gb")

    def says(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = pairs_of(shared, 8)
    prompts = write(Path("prompts.jsonl"), [{"prompt": says("user", row["prompt"])} for row in rows])
    pairs = [
        {name: says("user", row["prompt"]) + says("assistant", row[name]) for name in ("chosen", "rejected")}
        for row in rows
    ]
    data = write(Path("pairs.jsonl"), pairs)
    stage("reward", model=chatty, train_dataset=data, eval_dataset=data)
    folder = run("lora-24gb", model=chatty, train_dataset=prompts, eval_dataset=prompts, max_prompt_length=256)
    assert not (folder / "model/adapter_config.json").exists(), "the adapter is merged into the model"


# The notebook ---------------------------------------------------------------------------------------------------------


NOTEBOOK = EXAMPLES / "sentiment/sentiment.ipynb"


@pytest.fixture
def notebook_sizes(shared: Path, tinystories: Path, enter: Callable[..., Path], monkeypatch: Any) -> None:
    enter("sentiment")
    sizes = {"REWARD_STEPS": 2, "NUM_HELD_OUT": 8, "STEPS": 2, "STORY_MODEL": tinystories, "OUT": "notebook"}
    for split in ("train", "test"):
        write(Path(f"pairs/{split}.jsonl"), lines(shared / f"data/sentiment/{split}.jsonl")[:40])
    sizes |= {"SENTIMENT_PAIRS": "pairs"}
    for name, value in sizes.items():
        monkeypatch.setenv(name, str(value))


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.usefixtures("notebook_sizes")
def test_the_notebooks_cells_run(monkeypatch: Any, capsys: Any) -> None:
    """In this process: a kernel of its own would spend most of its time on imports."""
    monkeypatch.syspath_prepend(".")
    monkeypatch.setenv("MPLBACKEND", "agg")
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
    check_notebook(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.usefixtures("notebook_sizes")
def test_the_notebook_runs_in_jupyter() -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat, nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    check_notebook("".join(output.get("text", "") for output in outputs))


def check_notebook(printed: str) -> None:
    """The table at its end has the figures of the run in this folder."""
    before, after = lines(Path("notebook/policy/eval.jsonl"))
    for name in ("eval/reward", "eval/reward/greedy", "eval/kl"):
        assert f"{name:20} {before[name]:8.2f} {after[name]:8.2f}" in printed
    last = lines(Path("notebook/policy/completions.jsonl"))[-1]
    assert f"{last['prompt']}{last['completion']}  ({last['reward']:+.1f};" in printed

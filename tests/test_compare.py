"""`remax compare`: which runs there are, what makes them unequal, budgets, and going on after an interruption."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from remax.cli import main
from remax.compare.hyperparameters import added_hyperparameters
from remax.compare.spec import check_continues, describe, plan_runs
from remax.config import CompareConfig, CompareInputs, ReMaxConfig
from remax.errors import UserError
from tiny_models import tiny_model
from toy_tokenizers import EOS, VOCAB_SIZE, toy_tokenizer

QUICK = {"max_completion_length": 6, "batch_size": 4, "learning_rate": 1e-2, "num_eval_prompts": 4}
REWARD = "def letters(completions, **_):\n    return [len(set(text)) / 4 for text in completions]\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder / "model")
    toy_tokenizer("<s> $A", bos_token="<s>").save_pretrained(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    (folder / "gold.py").write_text(REWARD.replace("/ 4", "* 10"))
    prompts = ["ab", "a cat", "the dog sat", "x", "once upon", "hello there", "no", "tea at five"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return {
        "model": str(folder / "model"),
        "reward_funcs": [f"{folder / 'reward.py'}:letters"],
        "gold_reward_funcs": [f"{folder / 'gold.py'}:letters"],
        "train_dataset": str(folder / "prompts.jsonl"),
        "eval_dataset": str(folder / "prompts.jsonl"),
    }


def compare(folder: Path, inputs: dict[str, Any], **settings: Any) -> int:
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}.yaml"
    content = {"settings": QUICK, "budget_amount": 4, "seeds": [1], **inputs, **settings}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return main(["compare", "--config", str(path), "--output_dir", str(folder)])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_comparison_runs_resumes_and_grows(tmp_path: Path, inputs: dict[str, Any], capsys: Any) -> None:
    folder = tmp_path / "out"
    settings = {"seeds": [3], "budget_amount": 12}
    assert compare(folder, inputs, methods={"remax": {}}, **settings) == 0
    run = folder / "runs" / "remax" / "seed3"
    first = (run / "run.json").stat().st_mtime_ns
    summary = json.loads((run / "run.json").read_text())
    assert (summary["steps"], summary["prompts"], summary["method"], summary["seed"]) == (3, 12, "remax", 3)
    metrics = read(run / "metrics.jsonl")
    assert summary["tokens"] == metrics[-1]["num_tokens"]
    assert summary["seconds"] == pytest.approx(sum(m["time/step"] for m in metrics), rel=0.2)
    assert not (run / "model").exists()

    # The gold reward is forty times the learned one here, sample by sample, and training never saw it.
    evaluations = read(run / "evaluations.jsonl")
    assert [e["step"] for e in evaluations] == [0, 3]
    for evaluation in evaluations:
        assert evaluation["gold"] == pytest.approx(40 * evaluation["reward"], rel=1e-5)
        assert evaluation["gold/greedy"] == pytest.approx(40 * evaluation["reward/greedy"], rel=1e-5)
    assert (evaluations[0]["prompts"], evaluations[1]["tokens"]) == (0, summary["tokens"])
    samples = read(run / "final_samples.jsonl")
    assert sum(s["reward"] for s in samples) / len(samples) == pytest.approx(evaluations[-1]["reward"], rel=1e-5)
    assert all(s["gold"] == pytest.approx(40 * s["reward"]) for s in samples)
    initial = read(folder / "initial_samples.jsonl")
    assert sum(s["reward"] for s in initial) / len(initial) == pytest.approx(evaluations[0]["reward"], rel=1e-5)
    assert all("gold" not in m and "letters_2" not in m for m in metrics)

    # An interrupted run is repeated, a finished one is not, and a method can be added.
    assert (
        compare(folder, inputs, methods={"remax": {}, "k4": {"method": "rloo", "num_generations": 4}}, **settings) == 0
    )
    assert (run / "run.json").stat().st_mtime_ns == first
    assert "run 1/2: remax, seed 3: finished before" in capsys.readouterr().out
    added = folder / "runs" / "k4" / "seed3"
    figures = (added / "metrics.jsonl").read_text()
    (added / "run.json").unlink()
    assert (
        compare(folder, inputs, methods={"remax": {}, "k4": {"method": "rloo", "num_generations": 4}}, **settings) == 0
    )
    again = read(added / "metrics.jsonl")
    assert [m["reward"] for m in again] == [json.loads(line)["reward"] for line in figures.splitlines()]
    results = json.loads((folder / "results.json").read_text())
    assert list(results["methods"]) == ["remax", "k4"]
    assert results["methods"]["k4"]["hyperparameters"] == ["num_generations"]
    assert (folder / "report.html").exists()

    # What would not be comparable is refused, and the folder stays as it is.
    assert compare(folder, inputs, methods={"remax": {"learning_rate": 1.0}}, **settings) == 2
    assert "its runs have another settings of the methods" in capsys.readouterr().err
    assert compare(folder, inputs, methods={"remax": {}}, seeds=[3], budget_amount=16) == 2
    assert "its runs have another budget" in capsys.readouterr().err
    assert (run / "run.json").stat().st_mtime_ns == first


def test_a_budget_of_tokens_stops_the_first_step_that_reaches_it(tmp_path: Path, inputs: dict[str, Any]) -> None:
    folder = tmp_path / "out"
    assert compare(folder, inputs, methods={"remax": {}}, budget="tokens", budget_amount=100) == 0
    tokens = [m["num_tokens"] for m in read(folder / "runs" / "remax" / "seed1" / "metrics.jsonl")]
    assert tokens[-2] < 100 <= tokens[-1]


def test_a_run_is_like_one_of_remax_train(tmp_path: Path, inputs: dict[str, Any]) -> None:
    folder = tmp_path / "out"
    methods = {"ppo": {"num_ppo_epochs": 2}}
    assert compare(folder, inputs, methods=methods, seeds=[5], budget_amount=8, keep_models=True) == 0
    own = {**QUICK, "lr_scheduler_type": "constant", "seed": 5, "max_steps": 2, "num_ppo_epochs": 2}
    flags = [f"--{name}={value}" for name, value in own.items()]
    data = ["--train_dataset", inputs["train_dataset"], "--model", inputs["model"]]
    data += ["--reward_funcs", inputs["reward_funcs"][0], "--report_to", "none", "--method", "ppo"]
    assert main(["train", *data, *flags, "--output_dir", str(tmp_path / "alone")]) == 0
    compared = read(folder / "runs" / "ppo" / "seed5" / "metrics.jsonl")
    for ours, alone in zip(compared, read(tmp_path / "alone" / "metrics.jsonl"), strict=True):
        for name in ("reward", "kl", "entropy", "grad_norm", "value/loss", "num_tokens"):
            assert ours[name] == alone[name], name
    assert (folder / "runs" / "ppo" / "seed5" / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": {"pppo": {}}}, "--methods has pppo, which is no method and sets none.*remax, reinforce, rloo"),
        ({"methods": {"a": {"method": "pppo"}}}, "--method is pppo: that is not one of remax"),
        ({"methods": {"rloo": {"num_generations": 1}}}, "--num_generations is 1: the leave_one_out baseline"),
        ({"methods": {"remax": {"model": "x"}}}, "--methods sets model for remax: .*equal conditions; set it for all"),
        ({"methods": {"remax": {"temperature": 0.5}}}, "--methods sets temperature for remax"),
        ({"methods": {"remax": {"betta": 0.5}}}, "has betta: no run has such a setting; did you mean beta"),
        ({"methods": {"remax": 3}}, "--methods has remax: 3: that is no mapping"),
        ({"methods": {"../x": {"method": "ppo"}}}, "--methods has the label '../x': a folder is named after it"),
        ({"methods": {" ": {"method": "ppo"}}}, "--methods has the label ' '"),
        ({"methods": {1: {"method": "ppo", "cliprange": -1.0}}}, "1 of --methods: --cliprange is -1.0"),
        ({"settings": {"method": "ppo"}}, "--settings has method: it is what is compared"),
        ({"settings": {"reward_weights": 0.5}}, "--reward_weights is 0.5: that is no list"),
        ({"settings": {"reward_weights": ["x"]}}, "--reward_weights is 'x': that is not a number"),
        ({"seeds": 3}, "--seeds is 3: that is no list"),
        ({"budget_amount": math.inf}, "--budget_amount is inf: no run would end"),
        ({"methods": {}}, "there is nothing to compare"),
        ({"settings": {"seed": 1}}, "--settings has seed: that holds for the whole comparison; set it as --seeds"),
        ({"settings": {"max_steps": 1}}, "--settings has max_steps: .*--budget"),
        ({"settings": {"push_to_hub": True}}, "has push_to_hub: every run would upload a model, one over the other"),
        ({"methods": {"ppo": {"push_to_hub": True}}}, "has push_to_hub: every run would upload a model"),
        ({"settings": {"run_name": "mine"}}, "has run_name mine: trackers would show several runs under one name"),
        ({"seeds": [1, 1]}, "--seeds is .*: a run would be there twice"),
        ({"seeds": []}, "there is nothing to run"),
        ({"budget_amount": 0}, "--budget_amount is 0"),
        (
            {"budget": "seconds", "settings": {"lr_scheduler_type": "linear"}},
            "--settings has lr_scheduler_type linear: with --budget seconds nobody knows",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_runs(CompareConfig(**settings))


def test_trackers_show_every_run_under_a_name_of_its_own(tmp_path: Path, inputs: dict[str, Any]) -> None:
    long = {"x" * 200: {"method": "ppo"}}
    shared = {"report_to": ["wandb"], "project": "study", "push_to_hub": False}
    args = CompareConfig(methods={"remax": {}, "ppo": {}, **long}, seeds=[0, 1], settings=shared)
    runs = plan_runs(args)
    assert [run.args.run_name for run in runs[:3]] == ["remax-seed0", "ppo-seed0", f"{'x' * 100}-seed0"]
    assert len({run.args.run_name for run in runs}) == 6
    assert {(*run.args.report_to, run.args.project) for run in runs} == {("wandb", "study")}
    assert plan_runs(CompareConfig())[0].args.report_to == ["none"]

    # A comparison may go on with other trackers: they change no number.
    (tmp_path / "runs" / "remax" / "seed0").mkdir(parents=True)
    (tmp_path / "runs" / "remax" / "seed0" / "run.json").write_text("{}")
    (tmp_path / "comparison.json").write_text(json.dumps(describe(CompareInputs(**inputs), args, runs)))
    untracked = CompareConfig(methods=args.methods, seeds=[0, 1, 2])
    check_continues(tmp_path, describe(CompareInputs(**inputs), untracked, plan_runs(untracked)))


def test_mistakes_in_the_inputs_are_found_before_anything_is_written(
    tmp_path: Path, inputs: dict[str, Any], capsys: Any
) -> None:
    mistakes = {
        "there is no such folder": {"model": "./nowhere"},
        "a plain language model": {"gold_reward_model": inputs["model"]},
        "--eval_dataset is not set": {"eval_dataset": None},
        "--report_to is wandbb: that is no tracker": {"settings": {**QUICK, "report_to": ["wandbb"]}},
        "batch_size 64": {"settings": {**QUICK, "batch_size": 64}},
        "--eval_dataset": {"eval_dataset": "nowhere.jsonl"},
    }
    for message, change in mistakes.items():
        assert compare(tmp_path / "out", {**inputs, **change}) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_another_model_or_reward_is_another_comparison(tmp_path: Path, inputs: dict[str, Any]) -> None:
    args = CompareConfig(methods={"remax": {}})
    description = describe(CompareInputs(**inputs), args, plan_runs(args))
    (tmp_path / "comparison.json").write_text(json.dumps({**description, "model": "before any run was finished"}))
    check_continues(tmp_path, description)
    (tmp_path / "comparison.json").write_text(json.dumps(description))
    (tmp_path / "runs" / "remax" / "seed0").mkdir(parents=True)
    (tmp_path / "runs" / "remax" / "seed0" / "run.json").write_text("{}")
    check_continues(tmp_path, description)
    smaller = CompareConfig(methods={"remax": {}}, settings={"micro_batch_tokens": 64})
    check_continues(tmp_path, describe(CompareInputs(**inputs), smaller, plan_runs(smaller)))
    for name in ("model", "train_dataset", "reward_funcs", "gold_reward_funcs"):
        changed = describe(
            CompareInputs(**{**inputs, name: ["b:c"] if "funcs" in name else "b"}), args, plan_runs(args)
        )
        with pytest.raises(UserError, match="its runs have another"):
            check_continues(tmp_path, changed)


def test_the_hyperparameters_that_methods_add() -> None:
    assert added_hyperparameters(ReMaxConfig()) == added_hyperparameters(ReMaxConfig(method="reinforce")) == []
    assert added_hyperparameters(ReMaxConfig(method="rloo")) == ["num_generations"]
    assert added_hyperparameters(ReMaxConfig(baseline="mixed")) == ["num_generations", "baseline"]
    assert len(added_hyperparameters(ReMaxConfig(method="ppo"))) == 8
    assert len(added_hyperparameters(ReMaxConfig(method="ppo", target_kl=5.0))) == 10


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path, inputs: dict[str, Any], capsys: Any) -> None:
    folder = tmp_path / "out"
    methods = {
        "remax": {},
        "wild": {"method": "reinforce", "learning_rate": 9e18, "max_skipped_steps": 0},
        "reinforce": {},
    }
    assert compare(folder, inputs, methods=methods, budget_amount=16) == 2
    output = capsys.readouterr()
    assert "1 of 3 runs failed and are missing from the results: wild, seed 1: 1 step skipped" in output.err
    assert "run 3/3: reinforce" in output.out
    results = json.loads((folder / "results.json").read_text())
    assert results["missing"] == [{"label": "wild", "seed": 1}]
    assert results["methods"]["reinforce"]["metrics"]["reward"]["mean"] is not None

"""What a comparison consists of: its runs, checked before the first one starts."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remax.config import CompareConfig, CompareInputs, ReMaxConfig
from remax.config.objective import BASELINES
from remax.errors import UserError
from remax.options import nearest
from remax.untrusted import shown

UNLIMITED = 1_000_000
"""Steps of a run that tokens or seconds will stop."""
LONGEST_LABEL_SHOWN = 100
"""Characters of a label in a run's name, which trackers want short."""
DEFAULTS = {"lr_scheduler_type": "constant", "save_best_model": False, "report_to": ["none"], "save_steps": -1}
"""Settings of every run unless the comparison sets them."""
COMMON = (
    *("model", "reward_model", "reward_funcs", "reward_url", "train_dataset", "eval_dataset", "output_dir"),
    *(
        "seed",
        "max_steps",
        "num_train_epochs",
        "dataset_split",
        "eval_split",
        "max_prompt_length",
        "overlong_prompts",
        "system_prompt",
    ),
    *("max_completion_length", "temperature", "top_p", "top_k", "reward_weights", "num_eval_prompts"),
)
"""What cannot differ between methods: otherwise they would not be compared under equal conditions."""
OWN_FLAGS = (
    *("model", "reward_model", "reward_funcs", "reward_url"),
    *("train_dataset", "eval_dataset", "output_dir", "seed"),
)
"""What the comparison sets itself, outside of `settings`."""


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    label: str
    seed: int
    args: ReMaxConfig
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether it ran to its end in this or a former call."""
        return (self.folder / "run.json").exists()


def plan_runs(args: CompareConfig) -> list[Run]:
    """Returns all runs, seed by seed, so that an interrupted comparison has all methods for its first seeds.

    Raises:
        UserError: a method or setting cannot be, or methods would not be compared under equal conditions.
    """
    for name in args.settings:
        if name in ("method", "baseline"):
            raise UserError(f"--settings has {name}: it is what is compared; set it for each of --methods.")
        if name in OWN_FLAGS or name in ("max_steps", "num_train_epochs"):
            where = "--budget and --budget_amount" if name in ("max_steps", "num_train_epochs") else f"--{name}"
            where = "--seeds" if name == "seed" else where
            raise UserError(f"--settings has {name}: that holds for the whole comparison; set it as {where}.")
    return [_plan_run(args, str(label), seed) for seed in args.seeds for label in args.methods]


def _plan_run(args: CompareConfig, label: str, seed: int) -> Run:
    own = args.methods[label] or {}
    if not isinstance(own, Mapping):
        raise UserError(f"--methods has {label}: {own}: that is no mapping of settings; write `name: value` lines.")
    if "method" not in own and label not in BASELINES:
        raise UserError(
            f"--methods has {label}, which is no method and sets none: nothing says how to train; name it after one of "
            f"{', '.join(BASELINES)}, or set its `method`."
        )
    if label.strip() in ("", ".", "..") or "/" in label or not label.isprintable():
        raise UserError(f"--methods has the label {label!r}: a folder is named after it; use a plain name.")
    for name in own:
        if name in COMMON:
            raise UserError(
                f"--methods sets {name} for {label}: the methods would not be compared under equal conditions; set it "
                f"for all of them, {'outside of' if name in OWN_FLAGS else 'in'} --settings."
            )
    folder = Path(args.output_dir) / "runs" / label / f"seed{seed}"
    settings = {**DEFAULTS, **args.settings, "method": label, **own, "seed": seed, "output_dir": str(folder)}
    _check_sharing(settings)
    settings["run_name"] = f"{label[:LONGEST_LABEL_SHOWN]}-seed{seed}"
    known = [field.name for field in dataclasses.fields(ReMaxConfig)]
    for name in settings:
        if name not in known:
            raise UserError(f"--settings or --methods has {name}: no run has such a setting; {nearest(name, known)}.")
    try:
        batch_size = ReMaxConfig(**settings).batch_size
        max_steps = math.ceil(args.budget_amount / batch_size) if args.budget == "prompts" else UNLIMITED
        config = ReMaxConfig(**settings, max_steps=max_steps)
    except UserError as error:
        raise UserError(f"{label} of --methods: {error}") from None
    if args.budget != "prompts" and not config.lr_scheduler_type.startswith("constant"):
        raise UserError(
            f"--settings has lr_scheduler_type {config.lr_scheduler_type}: with --budget {args.budget} nobody knows "
            "the number of steps that it would be spread over; set constant, or --budget prompts."
        )
    return Run(label, seed, config, folder)


def _check_sharing(settings: Mapping[str, Any]) -> None:
    """Raises UserError if all runs would push their models, or be called the same by trackers."""
    if settings.get("push_to_hub"):
        raise UserError(
            "--settings or --methods has push_to_hub: every run would upload a model, one over the other; leave it "
            "out, compare with --keep_models, and upload the model that you choose with `hf upload`."
        )
    if settings.get("run_name"):
        raise UserError(
            f"--settings or --methods has run_name {shown(settings['run_name'])}: trackers would show several runs "
            "under one name; leave it out (they are called after label and seed), and set project."
        )


def describe(inputs: CompareInputs, args: CompareConfig, runs: list[Run]) -> dict[str, Any]:
    """Returns what has to be the same when a comparison goes on: everything but more methods and seeds."""
    by_label = {run.label: dataclasses.asdict(run.args) for run in runs}
    for settings in by_label.values():
        del settings["seed"], settings["output_dir"], settings["run_name"]
    return {
        "model": inputs.model,
        "reward": [
            *([inputs.reward_model] if inputs.reward_model else []),
            *inputs.reward_funcs,
            *([inputs.reward_url] if inputs.reward_url else []),
        ],
        "gold": [inputs.gold_reward_model] * bool(inputs.gold_reward_model) + inputs.gold_reward_funcs,
        "train_dataset": inputs.train_dataset,
        "eval_dataset": inputs.eval_dataset,
        "budget": {"unit": args.budget, "amount": args.budget_amount},
        "shared": {**DEFAULTS, **args.settings},
        "methods": by_label,
        "seeds": args.seeds,
    }


NUMBERS_STAY = (
    *("micro_batch_tokens", "rollout_batch_size", "reward_batch_size", "log_completions", "logging_steps"),
    *("save_steps", "save_total_limit", "report_to", "project", "run_name"),
)
"""Settings that may change between the runs of a comparison: memory, speed and what is written."""


def check_continues(folder: Path, description: Mapping[str, Any]) -> None:
    """Raises UserError if the folder holds another comparison, whose runs cannot stand beside these."""
    path = folder / "comparison.json"
    if not path.exists() or not any(folder.glob("runs/*/*/run.json")):
        return
    former = json.loads(path.read_text(encoding="utf-8"))
    for name, value in description.items():
        before = former[name]
        if name == "shared":  # part of every method's settings
            continue
        if name == "methods":
            value = {label: _deciding(settings) for label, settings in value.items() if label in before}
            before = {label: _deciding(settings) for label, settings in before.items() if label in value}
        if name != "seeds" and json.loads(json.dumps(value)) != before:
            what = "settings of the methods" if name == "methods" else name
            raise UserError(
                f"--output_dir is {folder}: its runs have another {what} and cannot be compared with new ones; set a "
                "new folder, or the former settings."
            )


def _deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in NUMBERS_STAY}

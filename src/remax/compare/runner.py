"""`remax compare`: all runs one after the other, each in a process of its own, then tables, plots and a page."""

import datetime
import json
import multiprocessing
import shlex
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from remax import models
from remax.assembly import check_cheaply
from remax.compare import worker
from remax.compare.accounting import account
from remax.compare.analysis import analyse
from remax.compare.hyperparameters import added_hyperparameters
from remax.compare.spec import Run, check_continues, describe, plan_runs
from remax.compare.tables import print_table
from remax.config import CompareConfig, CompareInputs
from remax.errors import UserError
from remax.loading import load_prompts
from remax.provenance import commit, hardware, versions
from remax.recording import RunFolder, write_json
from remax.rewards.named import named_function, named_rewards, wait_until_ready
from remax.trackers import Trackers
from remax.untrusted import printable


def run_comparison(inputs: CompareInputs, args: CompareConfig, command: list[str]) -> dict[str, Any]:
    """Runs what is not finished yet, and returns and prints the results; with --accounting, accounts for a step.

    Raises:
        UserError: a setting, model, dataset or reward cannot be used; found before the first run where that is cheap.
    """
    folder = Path(args.output_dir)
    runs = plan_runs(args)
    description = describe(inputs, args, runs)
    if not (folder / "comparison.json").exists():
        RunFolder(args.output_dir)
    check_continues(folder, description)
    _check_parts(inputs, runs)
    folder.mkdir(parents=True, exist_ok=True)
    description |= {
        "hyperparameters": {run.label: added_hyperparameters(run.args) for run in runs},
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join(command),
        "date": datetime.date.today().isoformat(),
    }
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    # The server imports what takes seconds once, computes nothing, and every run is a fork of it.
    context.set_forkserver_preload(["remax.compare.worker"])
    if args.accounting:
        return account(inputs, runs, folder, context, description)
    write_json(folder / "comparison.json", description)
    failures = []
    for number, planned in enumerate(runs, start=1):
        try:
            _run(context, inputs, planned, args, f"run {number}/{len(runs)}: {planned.label}, seed {planned.seed}")
        except UserError as error:
            print(printable(f"{planned.label}, seed {planned.seed}: {error}"), flush=True)
            failures.append(f"{planned.label}, seed {planned.seed}: {error}")
            if not (planned.folder / "metrics.jsonl").exists():  # it did not get to its first step: others will not
                raise
    results = analyse(folder)
    print_table(results)
    if failures:
        raise UserError(f"{len(failures)} of {len(runs)} runs failed and are missing from the results: {failures[0]}")
    print(f"The report is {folder / 'report.html'}, the figures are in {folder / 'results.json'}.")
    return results


def _run(context: Any, inputs: CompareInputs, planned: Run, args: CompareConfig, title: str) -> None:
    if planned.finished:
        print(f"{title}: finished before", flush=True)
        return
    shutil.rmtree(planned.folder, ignore_errors=True)
    started = time.perf_counter()
    log = planned.folder.with_suffix(".log")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            pool.submit(worker.run, inputs, planned, args.budget, args.budget_amount, args.keep_models).result()
    except BrokenProcessPool:
        raise UserError(
            f"{title}: its process was killed, perhaps for lack of memory; see {log}, free memory or set a smaller "
            "--settings micro_batch_tokens, and run the same command again to go on."
        ) from None
    last = json.loads((planned.folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    figures = "  ".join(f"{name} {last[name]:.3g}" for name in ("reward", "gold", "kl", "length") if name in last)
    print(f"{title}: {time.perf_counter() - started:.0f} s  {figures}", flush=True)


def _check_parts(inputs: CompareInputs, runs: list[Run]) -> None:
    """Finds, before the first run, what is wrong with models, rewards and data for any of them."""
    timeout_seconds = runs[0].args.reward_timeout_seconds
    rewards = named_rewards(inputs, timeout_seconds)
    if inputs.gold_reward_model is not None:
        models.check_model_exists(inputs.gold_reward_model, flag="--gold_reward_model")
        models.require_reward_model(inputs.gold_reward_model, flag="--gold_reward_model")
    for spec in inputs.gold_reward_funcs:
        wait_until_ready([named_function(spec, timeout_seconds)])
    if inputs.reward_model is not None:
        models.require_reward_model(inputs.reward_model, flag="--reward_model")
    for run in {run.label: run for run in runs}.values():
        _, _, tokenizer, _ = check_cheaply(run.args, inputs.model, rewards, None)
        Trackers(run.args, RunFolder(str(run.folder), resumes=True), say=print)  # Nothing is started: it only checks.
    args = runs[0].args
    prompts = load_prompts(inputs.train_dataset, args.dataset_split, tokenizer, args, flag="--train_dataset")
    load_prompts(inputs.eval_dataset, args.eval_split, tokenizer, args, flag="--eval_dataset")
    largest = max(run.args.batch_size for run in runs)
    if largest > len(prompts):
        raise UserError(
            f"--settings has batch_size {largest}: --train_dataset has only {len(prompts)} usable prompts, which do "
            "not fill one step; set it to that or less."
        )

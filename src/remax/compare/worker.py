"""One run of a comparison, in a process of its own: training under a budget, with measurements on held-out prompts."""

import contextlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from remax.compare.spec import Run
from remax.config import CompareInputs
from remax.errors import GuardStop, UserError
from remax.evaluate import Evaluation
from remax.progress import PlainLines
from remax.recording import write_json
from remax.rewards.named import named_gold_rewards, named_rewards
from remax.trainer import ReMaxTrainer


@dataclass
class Spent:
    """What a run has used up."""

    prompts: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Observer(TrainerCallback):  # type: ignore[misc]
    """Counts what a run uses up, stops it at its budget, and writes down what evaluations show."""

    def __init__(self, unit: str, amount: float, final_samples: Path) -> None:
        self.unit, self.amount, self.final_samples = unit, amount, final_samples
        self.spent = Spent()
        self.evaluations: list[dict[str, float]] = []
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock: evaluations do not count."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops a run whose budget is used up."""
        self.spent.seconds += time.perf_counter() - self.started
        self.spent.prompts += args.batch_size
        self.spent.tokens = kwargs["num_tokens"]
        comparison = multiprocessing.parent_process()
        if comparison is not None and not comparison.is_alive():
            raise SystemExit("The comparison was killed, so its run ends too.")
        if getattr(self.spent, self.unit) >= self.amount:
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes down what the held-out prompts show."""
        evaluation: Evaluation = kwargs["evaluation"]
        means = evaluation.means()
        record = {"step": state.global_step, **asdict(self.spent)}
        record |= {name: means[name] for name in ("reward", "reward/greedy", "kl", "entropy") if name in means}
        record |= {"length": means["completions/mean_length"], "clipped_ratio": means["completions/clipped_ratio"]}
        samples = evaluation.rollout.samples
        golden = [None] * len(samples) if evaluation.gold is None else evaluation.gold.tolist()
        if evaluation.gold is not None:
            record |= {name: means.get(name, math.nan) for name in ("gold", "gold/greedy")}
        self.evaluations.append(record)
        lines = [
            {"prompt_index": c.prompt.index, "length": len(c.token_ids), "reward": reward, "gold": gold}
            for c, reward, gold in zip(samples, evaluation.rewards.sampled.tolist(), golden, strict=True)
        ]
        self.final_samples.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        initial = self.final_samples.parents[3] / "initial_samples.jsonl"
        if state.global_step == 0 and not initial.exists():
            initial.write_text(self.final_samples.read_text(encoding="utf-8"), encoding="utf-8")


def run(inputs: CompareInputs, planned: Run, unit: str, amount: float, keep_model: bool) -> None:
    """Trains and leaves in the run's folder what `remax.compare.records` reads; run.json comes last.

    Raises:
        UserError: something cannot be used.
    """
    planned.folder.parent.mkdir(parents=True, exist_ok=True)
    log = planned.folder.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file, _output_to(file):
        rewards = named_rewards(inputs, planned.args.reward_timeout_seconds)
        observer = Observer(unit, amount, planned.folder / "final_samples.jsonl")
        trainer = ReMaxTrainer(
            inputs.model,
            rewards,
            planned.args,
            train_dataset=inputs.train_dataset,
            eval_dataset=inputs.eval_dataset,
            callbacks=[observer],
            view=PlainLines(),
            gold_reward_funcs=named_gold_rewards(inputs, planned.args.reward_timeout_seconds),
        )
        trainer.save_final_model = keep_model
        try:
            trainer.train()
        except torch.OutOfMemoryError:
            raise UserError(
                "the memory of the device did not suffice; set a smaller --settings micro_batch_tokens, or compare on "
                "a larger device."
            ) from None
        except GuardStop as stop:
            raise UserError(str(stop)) from None
        except SystemExit:
            # The pool would catch it, and this process wait for work that nobody is left to send.
            os._exit(1)
    records = "".join(json.dumps(record) + "\n" for record in observer.evaluations)
    (planned.folder / "evaluations.jsonl").write_text(records, encoding="utf-8")
    summary: Mapping[str, Any] = {
        "label": planned.label,
        "method": planned.args.method,
        "seed": planned.seed,
        "settings": asdict(planned.args),
        "finished": True,
        "steps": trainer.state.global_step,
        **asdict(observer.spent),
        "parameters": sum(p.numel() for p in trainer.parts.policy.parameters()),
    }
    write_json(planned.folder / "run.json", summary)


@contextlib.contextmanager
def _output_to(file: Any) -> Iterator[None]:
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield
    sys.stdout.flush()

"""A set-up for the checks of `remax doctor`, and what they find."""

import json
import shutil
from pathlib import Path
from typing import Any

from remax.config import DoctorOptions, ReMaxConfig, TrainInputs
from remax.doctor.context import Context
from remax.doctor.findings import Finding, run_check
from toy_tokenizers import CHATML, EOS, say, toy_tokenizer
from toy_training import PROMPTS, lively, policy

TEXTS = [{"prompt": f"{start} {word}"} for start in PROMPTS for word in ("one", "two")]
QUESTIONS = [{"prompt": say(row["prompt"])} for row in TEXTS]


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def set_up(
    folder: Path,
    rows: list[Any] = TEXTS,
    *,
    eval_rows: list[Any] | None = None,
    model: Any = None,
    tokens: Any = None,
    rewards: Any = (lively,),
    num_prompts: int = 8,
    **settings: Any,
) -> Context:
    """Returns a set-up with a toy policy in a folder; sound unless changed."""
    shutil.rmtree(folder / "policy", ignore_errors=True)
    (model or policy(eos_token_id=EOS)).save_pretrained(folder / "policy")
    (tokens or toy_tokenizer("<s> $A", bos_token="<s>")).save_pretrained(folder / "policy")
    inputs = TrainInputs(
        model=str(folder / "policy"),
        train_dataset=write_lines(folder / "train.jsonl", rows),
        eval_dataset=None if eval_rows is None else write_lines(folder / "eval.jsonl", eval_rows),
        reward_funcs=["functions.py:of_the_test"],
    )
    args = ReMaxConfig(**{"output_dir": str(folder / "out"), "batch_size": 4, "max_completion_length": 8, **settings})
    return Context(inputs, args, DoctorOptions(num_prompts=num_prompts), lambda: list(rewards))


def statuses(findings: list[Finding]) -> list[str]:
    return [finding.status for finding in findings]


def only(check: Any, context: Context) -> Finding:
    (finding,) = run_check(check, context)
    return finding


def chat_tokens(**kwargs: Any) -> Any:
    return toy_tokenizer("<s> $A", bos_token="<s>", chat_template=CHATML, **kwargs)

"""The command: all checks, cheap ones first, as a table and as JSON."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from remax.config import DoctorOptions, ReMaxConfig, TrainInputs
from remax.doctor.context import Context
from remax.doctor.findings import Check, Finding, counts, name_of, run_check
from remax.doctor.machine import check_device, check_disk_space, check_memory, check_versions
from remax.doctor.prompts import check_duplicates, check_leakage, check_prompt_lengths, check_room
from remax.doctor.reward import (
    check_reward_padding,
    check_reward_pairs,
    check_reward_position,
    check_reward_sources,
    check_reward_template,
    check_reward_tokenizer,
)
from remax.doctor.rollout import check_log_probabilities, check_policy, check_rewards, check_signal, check_stopping
from remax.doctor.tokenizer import check_bos, check_chat_template, check_eos, check_pad, check_vocabulary
from remax.errors import UserError
from remax.recording import write_json

CHECKS: tuple[Check, ...] = (
    *(check_versions, check_device),
    *(check_eos, check_pad, check_vocabulary, check_chat_template),
    *(check_prompt_lengths, check_room, check_bos, check_duplicates, check_leakage),
    *(check_memory, check_disk_space),
    # From here on models are loaded.
    *(check_reward_tokenizer, check_reward_sources, check_reward_template, check_reward_padding, check_reward_position),
    *(check_reward_pairs, check_policy, check_stopping, check_rewards, check_signal, check_log_probabilities),
)
STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
WIDTH = 120


def run_doctor(
    inputs: TrainInputs, args: ReMaxConfig, options: DoctorOptions, *, load_rewards: Callable[[], list[Any]]
) -> list[Finding]:
    """Runs all checks, prints their findings, writes them with --json, and returns them.

    load_rewards: returns the rewards as ReMaxTrainer takes them. Nothing that a check raises gets out.

    Raises:
        UserError: --json cannot be written.
    """
    if options.json and (Path(options.json).is_dir() or not Path(options.json).absolute().parent.is_dir()):
        raise UserError(f"--json is {options.json}: no file can be written there; set one in a folder that exists.")
    findings = examine(Context(inputs, args, options, load_rewards))
    print_findings(findings)
    if options.json:
        write_json(Path(options.json), {"counts": counts(findings), "findings": [asdict(own) for own in findings]})
    return findings


def examine(context: Context, console: Console | None = None) -> list[Finding]:
    """Returns the findings of all checks, in their order."""
    console = console or Console()
    found: list[Finding] = []
    for check in CHECKS:
        with console.status(f"checking: {name_of(check)}"):
            found += run_check(check, context)
    return found


def print_findings(findings: list[Finding], console: Console | None = None) -> None:
    """Prints one row per finding, and how many there are of each kind."""
    console = console or Console(width=max(Console().width, WIDTH))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", "check", "finding", "what to do"):
        table.add_column(title, no_wrap=title in ("", "check"), ratio={"finding": 3, "what to do": 2}.get(title))
    for own in findings:
        cells = (Text(own.status, STYLES[own.status]), *map(Text, (own.check, own.finding, own.fix)))
        table.add_row(*cells)
    console.print(table)
    number = counts(findings)
    listed = f"{number['pass']} passed, {number['warn']} to look at, {number['fail']} failed"
    console.print(f"\n{listed}" + (f", {number['skip']} not looked at." if number["skip"] else "."))

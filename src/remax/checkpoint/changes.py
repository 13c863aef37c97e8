"""Which settings differ from those a run has."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remax.errors import UserError

NUMBERS_STAY = frozenset(
    {"output_dir", "report_to", "logging_steps", "log_completions", "project", "run_name"}
    | {"push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"}
    | {"save_steps", "save_total_limit", "resume", "allow_config_change"}
    | {"max_skipped_steps", "max_missing_rewards", "alarms", "alarm_window", "gold_evaluations"}
    | {"max_kl", "max_truncated", "max_length_ratio", "min_entropy_ratio", "max_logprob_gap"}
    | {"vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"}
    | {"vllm_gpu_memory_utilization", "vllm_enable_sleep_mode", "vllm_max_model_length"}
)
"""Settings that cannot change what is learned."""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns `name: old -> new` for every setting of both that differs, but for NUMBERS_STAY."""
    before, now = (json.loads(json.dumps(dict(settings), default=str)) for settings in (before, now))
    names = [name for name in now if name in before and name not in NUMBERS_STAY and before[name] != now[name]]
    return [f"{name}: {before[name]} -> {now[name]}" for name in names]


def refuse_changes(found: list[str], folder: Path, resume: str, *, allowed: bool) -> None:
    """Raises UserError for changes, unless they are allowed: then they are printed."""
    if found and not allowed:
        raise UserError(
            f"--resume is {resume}: the run in {folder} has other settings ({'; '.join(found)}) and would go on as "
            "another one; set them as they were, or --allow_config_change."
        )
    for change in found:
        print(f"Changed in the run in {folder}: {change}.")

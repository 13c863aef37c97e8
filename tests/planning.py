"""What the tests of `remax plan` share: a published config, settings, a step."""

import json
from pathlib import Path
from typing import Any

from remax.config import PlanConfig, PlanInputs, ReMaxConfig
from remax.plan.command import make_plan
from remax.plan.phases import Workload

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
P7 = 6_738_415_616
"""Its parameters, as published."""
GIB = 2**30
STEP = Workload(prompts=4, prompt_length=256, completion_length=256)


def settings(**changes: Any) -> ReMaxConfig:
    return ReMaxConfig(report_to=["none"], **changes)


def plan_of(folder: Path, *, args: dict[str, Any] | None = None, **inputs: Any) -> Any:
    return make_plan(PlanInputs(**{"model": str(folder), **inputs}), PlanConfig(**(args or {})))


def write_seven(folder: Path) -> Path:
    """Returns the folder, with the config of Llama-2-7B and nothing else."""
    (folder / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return folder

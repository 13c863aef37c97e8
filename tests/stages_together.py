"""Supervised stages in several processes; run by torchrun for test_stages_together.py, and by the test itself alone.

python -m torch.distributed.run --nproc_per_node 2 stages_together.py FOLDER CASE ...
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from remax.config import DPOConfig, RewardConfig, SFTConfig
from remax.processes import join_processes
from remax.stages import batches, sft
from remax.stages.dpo import run_dpo
from remax.stages.reward import run_reward
from remax.stages.sft import run_sft
from toy_tokenizers import EOS, PAD, VOCAB_SIZE, toy_tokenizer

ANSWERS = [{"prompt": f"{c}?", "completion": f" {c * n}."} for n, c in enumerate("abcdefghi", start=1)]
PAIRS = [{"prompt": f"{c}?", "chosen": f" {c * n}.", "rejected": f" {c}!"} for n, c in enumerate("abcdefghi", start=1)]
CONFIG = LlamaConfig(
    **{"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    **{"num_hidden_layers": 2, "max_position_embeddings": 96, "initializer_range": 0.2},
    **{"eos_token_id": EOS, "pad_token_id": PAD, "num_labels": 1},
)
STAGES: dict[str, tuple[Any, Any, Any, list[dict[str, str]]]] = {
    "sft": (run_sft, SFTConfig, LlamaForCausalLM, ANSWERS),
    "reward": (run_reward, RewardConfig, LlamaForSequenceClassification, PAIRS),
    "dpo": (run_dpo, DPOConfig, LlamaForCausalLM, PAIRS),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "whole shares": {},
    "small parts": {"micro_batch_size": 1},
    "uneven shares": {"batch_size": 5, "micro_batch_size": 2},
    "lora": {"use_peft": True, "lora_r": 2, "micro_batch_size": 1},
    "checkpointing": {"gradient_checkpointing": True, "use_peft": True, "lora_r": 2},
    "bf16": {"bf16": True},
    "fused": {"micro_batch_size": 1},
    "dropout": {"batch_size": 5, "micro_batch_size": 2, "use_peft": True, "lora_r": 2, "lora_dropout": 0.5},
}
"""Nine examples in steps of four: the third step has one, of which the second process has none."""


class Fused(sft._Trainer):
    """With the loss that TRL computes on accelerators."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return trl.SFTTrainer.compute_loss(self, *args, **kwargs)


def run(folder: Path, case: str, *, out: str | None = None, **changes: Any) -> Path:
    """Runs "STAGE: SETTINGS" in this process and those beside it, and returns its folder."""
    stage, _, name = case.partition(": ")
    function, config, model_class, rows = STAGES[stage]
    torch.manual_seed(0)
    model = model_class(CONFIG)
    target = folder / (out or case.replace(" ", "_").replace(":", ""))
    settings = {
        **{"max_steps": 5, "batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_steps": -1},
        # With AdamW's own epsilon, what is only rounding would be as large a step as everything else.
        **{"adam_epsilon": 0.1, "max_grad_norm": 0.5, "logging_steps": 2},
        **{"output_dir": str(target), "report_to": "none", **SETTINGS[name], **changes},
    }
    trainer = sft._Trainer
    sft._Trainer = Fused if name == "fused" else trainer  # type: ignore[misc]
    try:
        held_out = Dataset.from_list(rows[:3])
        tokenizer = toy_tokenizer("<s> $A </s>", bos_token="<s>")
        function(config(**settings), model, Dataset.from_list(rows), held_out, tokenizer)
    finally:
        sft._Trainer = trainer  # type: ignore[misc]
    return target


def outcome(folder: Path) -> dict[str, Any]:
    """Returns what a run has left."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "lines": lines,
        "quality": json.loads((folder / "eval.json").read_text()),
        "weights": torch.cat(
            [t.flatten() for _, t in sorted(load_file(folder / "model" / "model.safetensors").items())]
        ),
    }


if __name__ == "__main__":
    processes = join_processes()
    where = Path(sys.argv[1])
    assert processes.num == 2
    assert batches.MicroBatches(9, 4, 0, 0, processes).per_step == 1
    for argument in sys.argv[2:]:
        name, _, continued = argument.partition(" in ")
        if continued:
            run(where, name, out=continued, resume="auto", save_steps=2, allow_config_change=True)
        elif name.endswith(" to 2"):
            run(
                where, name.removesuffix(" to 2"), out=f"{name[:-5].partition(':')[0]}_begun", max_steps=2, save_steps=2
            )
        else:
            run(where, name)

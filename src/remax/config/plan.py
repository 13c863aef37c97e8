"""Settings of `remax plan`."""

import re
from dataclasses import dataclass, field
from typing import Literal

from remax.config.commands import ReMaxConfig
from remax.errors import UserError
from remax.options import Options

Sharding = Literal["none", "ddp", "zero2", "zero3", "fsdp2"]
UNITS = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}


@dataclass(frozen=True)
class PlanInputs(Options):
    """Models and device"""

    model: str
    """The policy: a folder, a config.json or a hub name; only its config is read."""
    reward_model: str | None = None
    """Likewise; by default a reward model of the policy's shape, and none with --reward_funcs."""
    reward_funcs: list[str] = field(default_factory=list)
    """Reward functions as file.py:function; they take no memory here."""
    prompt_length: int = 0
    """Tokens of the longest prompt; 0 for --max_prompt_length."""
    device_memory: str | None = None
    """Memory of one card, as its maker names it: 80GB, 40960MB (GB: 2^30 bytes). By default that of this machine's GPU,
    and without one what is free of its main memory."""
    num_devices: int = 1
    """How many of them; they share out a step's prompts evenly."""
    sharding: Sharding = "none"
    """What several devices split, by the names of --accelerate_config: nothing (ddp), gradients and optimiser (zero2),
    and the weights of all models too (zero3, fsdp2)."""

    def _check(self) -> None:
        self._require(self.num_devices > 0, "num_devices", "there is nothing to train on", "1 or more")
        self._require(self.prompt_length >= 0, "prompt_length", "no prompt is that short", "tokens, or 0")
        self._require(
            self.sharding == "none" or self.num_devices > 1,
            "sharding",
            "with --num_devices 1 there is nothing to split",
            "more --num_devices, or none",
        )
        self._require(
            self.sharding != "none" or self.num_devices == 1,
            "num_devices",
            "--sharding none does not say what they split",
            "--sharding ddp, zero2, zero3 or fsdp2",
        )
        if self.device_memory is not None:
            parse_bytes(self.device_memory, flag="--device_memory")


@dataclass(frozen=True)
class PlanConfig(ReMaxConfig):
    """Settings of `remax plan`: those of `remax train`."""

    output_dir: str = ""
    """Folder for plan.json; by default the tables are only printed."""


def parse_bytes(text: str, *, flag: str) -> int:
    """Returns the bytes that a text such as 80GB, 40960 MB or 1.5TiB stands for; units are powers of 1024.

    Raises:
        UserError: it is no such text, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)I?B?\s*", text.upper())
    num_bytes = int(float(found[1]) * UNITS[f"{found[2]}B"]) if found else 0
    if not num_bytes:
        raise UserError(f"{flag} is {text}: that is no size of a memory; set one such as 80GB.")
    if num_bytes < UNITS["MB"]:
        raise UserError(f"{flag} is {text}: nothing fits in {num_bytes} bytes; set a unit too, such as {found[1]}GB.")  # type: ignore[index]
    return num_bytes

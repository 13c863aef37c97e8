"""Settings of `remax plan`."""

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from remax.config.commands import ReMaxConfig
from remax.config.inputs import check_reward_url
from remax.config.launch import LaunchOptions
from remax.errors import UserError
from remax.options import Options

Sharding = Literal["none", "ddp", "zero2", "zero3", "fsdp2"]
UNITS = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}


@dataclass(frozen=True)
class PlanInputs(Options):
    """Models and devices"""

    model: str
    """The policy: a folder, a config.json or a hub name; only its config is read."""
    reward_model: str | None = None
    """Likewise; by default a reward model of the policy's shape, and none with --reward_funcs or --reward_url."""
    reward_funcs: list[str] = field(default_factory=list)
    """Reward functions as file.py:function; they take no memory here."""
    reward_url: str | None = None
    """Address of a reward server; it takes no memory here."""
    gold_reward_model: str | None = None
    """A second reward model that judges the evaluations; between them it rests in the CPU's memory."""
    prompt_length: int = 0
    """Tokens of the longest prompt; 0 for --max_prompt_length, or what the model's context leaves of it."""
    device_memory: str | None = None
    """Memory of one card, as its maker names it: 80GB, 40960MB (GB: 2^30 bytes). By default that of this machine's GPU,
    and without one what is free of its main memory."""
    num_devices: int = None  # type: ignore[assignment]
    """How many of them; they share out a step's prompts evenly. By default --num_processes, or one."""
    sharding: Sharding = None  # type: ignore[assignment]
    """What several devices split, by the names of --accelerate_config: nothing (ddp), gradients and optimiser (zero2),
    and the weights of all models too (zero3, fsdp2). By default what --accelerate_config says."""
    accelerate_config: str | None = None
    """As for `remax train`: ddp, fsdp2, zero2 or zero3; --sharding says the same."""
    num_processes: int | None = None
    """As for `remax train`: one on each device; --num_devices says the same."""

    def _check(self) -> None:
        LaunchOptions(accelerate_config=self.accelerate_config, num_processes=self.num_processes)
        check_reward_url(self.reward_url)
        self._fill_in()
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

    def _fill_in(self) -> None:
        """Takes from --accelerate_config and --num_processes what is not set by the names of a plan."""
        named = self.accelerate_config
        if self.num_devices is None:
            self._require(
                named is None or self.num_processes is not None,
                "accelerate_config",
                "it does not say how many devices there are",
                "--num_devices too",
            )
            object.__setattr__(self, "num_devices", self.num_processes or 1)
        if self.sharding is None:
            self._require(
                named is None or named in get_args(Sharding) or self.num_devices == 1,
                "accelerate_config",
                "a plan reads no such files, so it cannot tell what the devices split",
                "--sharding ddp, zero2, zero3 or fsdp2 too",
            )
            object.__setattr__(self, "sharding", named if named and self.num_devices > 1 else "none")


@dataclass(frozen=True)
class UnusedInputs(Options):
    """Settings of `remax train` that take no memory of the device: a plan reads its files, and ignores these"""

    train_dataset: str | None = None
    """Prompts; see --prompt_length."""
    eval_dataset: str | None = None
    """Held-out prompts."""
    gold_reward_funcs: list[str] = field(default_factory=list)
    """Functions that judge the evaluations."""


@dataclass(frozen=True)
class PlanConfig(ReMaxConfig):
    """Plan"""

    output_file: str | None = None
    """File for the plan as JSON; by default the tables are only printed."""


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

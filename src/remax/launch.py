"""Starting a training in several processes through Accelerate's launcher, and what the processes ask of a launcher.

How the work is divided is the launcher's config; how a training trains is set by flags. A config that sets something of
the latter is refused, since one of the two would be ignored.
"""

import difflib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from remax.config import DPOConfig, LaunchOptions, ReMaxConfig, RewardConfig, SFTConfig
from remax.errors import UserError
from remax.untrusted import shown

NAMES = ("ddp", "fsdp2", "zero2", "zero3")
"""The configs in accelerate_configs/."""
OWN = "REMAX_LAUNCHED"
"""Set in the processes that `launch` starts."""
STOP_SECONDS = 3600
"""A training that is told to stop finishes its step and saves; a second Ctrl-C does not wait for that."""
DEADLY = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""What ends a process by surprise; those that are left get other signals from their launcher."""


# Starting -------------------------------------------------------------------------------------------------------------


def starts_others(options: LaunchOptions) -> bool:
    """Whether this process is only to start those that train.

    Raises:
        UserError: a launcher started this one already.
    """
    if options.accelerate_config is None or OWN in os.environ:
        return False
    if "RANK" in os.environ:
        raise UserError(
            f"--accelerate_config is {shown(options.accelerate_config)}: a launcher has started this process already, "
            "and its own config counts; leave the flag out, or run remax without that launcher."
        )
    return True


def check_replicates(options: LaunchOptions) -> None:
    """Raises UserError if the config would divide weights among processes, which TRL's trainers are not tried with."""
    if options.accelerate_config is not None:
        kind = str(_read(_path(options.accelerate_config))["distributed_type"])
        if kind in ("FSDP", "DEEPSPEED"):
            _refuse_sharding(f"--accelerate_config is {shown(options.accelerate_config)}")


def launch(options: LaunchOptions, arguments: Sequence[str]) -> int:
    """Runs `remax ARGUMENTS` in several processes, as options say, and returns the exit code of the first that ended.

    That is 0 if all end well, and 128 and the signal's number if a signal ends it.

    Raises:
        UserError: the config cannot be used, or not here.
    """
    check_launch(options)

    import logging

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    path = _path(str(options.accelerate_config))
    num_processes = options.num_processes or _read(path).get("num_processes") or max(1, _num_devices())
    flags = ["--config_file", str(path), "--num_processes", str(num_processes)]
    if options.accelerate_config in NAMES:
        flags += ["--main_process_port", "0"]  # any that is free: another training may run beside this one
    os.environ[OWN] = "1"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(STOP_SECONDS))
    logging.disable(logging.ERROR)  # What the launcher would log is told by the processes, or below.
    try:
        launch_command(launch_command_parser().parse_args([*flags, "--module", "remax", *arguments]))
    except ChildFailedError as error:
        return exit_code({rank: (failure.timestamp, failure.exitcode) for rank, failure in error.failures.items()})
    except SignalException as error:
        return 128 + error.sigval
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[OWN]
    return 0


def exit_code(failures: Mapping[int, tuple[int, int]]) -> int:
    """Returns the exit code of the process that failed first, and tells if a signal ended it.

    failures: by rank, when it ended, in whole seconds, and its exit code, or minus the number of a signal.
    """

    def place(rank: int) -> tuple[int, int]:
        second, code = failures[rank]
        # Within a second: those that died, that said why, that failed, that were stopped since another had ended.
        return second, 0 if -code in DEADLY else 1 if code > 1 else 2 if code == 1 else 3

    first = min(failures, key=place)
    code = failures[first][1]
    if code > 0:
        return code
    cause = " (Linux does that when memory is used up)" if -code == signal.SIGKILL else ""
    print(
        f"remax: process {first} was ended by {signal.Signals(-code).name}{cause}, and the others were stopped; go on "
        "from the last checkpoint with --resume auto.",
        file=sys.stderr,
    )
    return 128 - code


def _path(name: str) -> Path:
    if name in NAMES:
        return Path(str(files("remax") / "accelerate_configs" / f"{name}.yaml"))
    if not Path(name).is_file():
        close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
        advice = f"did you mean {close[0]}" if close else "set one of these"
        raise UserError(f"--accelerate_config is {shown(name)}: that is no file, nor {' or '.join(NAMES)}; {advice}.")
    return Path(name)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise UserError(
            f"--accelerate_config is {shown(path)}: that is no Accelerate config, a YAML file with distributed_type; "
            f"set one that `accelerate config` wrote, or one of {', '.join(NAMES)}."
        )
    return content


def check_launch(options: LaunchOptions) -> None:
    """Raises UserError if the processes cannot be started as options say, on this machine."""
    if options.accelerate_config is None:
        return
    config, num_devices = _read(_path(options.accelerate_config)), _num_devices()
    kind, name = str(config["distributed_type"]), shown(options.accelerate_config)
    if kind not in ("NO", "FSDP", "DEEPSPEED") and not kind.startswith("MULTI_"):
        raise UserError(
            f"--accelerate_config is {name}: its distributed_type is {shown(kind)}, with which remax does not train; "
            f"set one of {', '.join(NAMES)}, or a file like them."
        )
    if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise UserError(
            f"--accelerate_config is {name}: DeepSpeed is not installed; run pip install "
            '"remax-rlhf[deepspeed]", or set fsdp2, which needs nothing else.'
        )
    if kind == "FSDP" and not num_devices:
        raise UserError(
            f"--accelerate_config is {name}: without a GPU Accelerate would leave every process with all weights; set "
            "ddp."
        )
    if kind == "NO" and (options.num_processes or 1) > 1:
        raise UserError(
            f"--num_processes is {options.num_processes}: the distributed_type of {name} is NO, so one would be "
            "started; set --accelerate_config ddp."
        )
    if num_devices and (options.num_processes or 1) > num_devices:
        raise UserError(
            f"--num_processes is {options.num_processes}: there are {num_devices} GPUs, and processes cannot share "
            f"one; set {num_devices} or less."
        )


def _num_devices() -> int:
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return 0 if device is None or device.type == "mps" else torch.accelerator.device_count()


# Started --------------------------------------------------------------------------------------------------------------


def check_launcher(args: ReMaxConfig | SFTConfig | RewardConfig | DPOConfig) -> None:
    """Raises UserError if what a launcher has set contradicts the settings, or would be ignored.

    Accelerate's launcher hands its config over in environment variables.
    """
    if not isinstance(args, ReMaxConfig):
        for kind in ("FSDP", "DEEPSPEED"):
            if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true":
                _refuse_sharding(f"distributed_type is {kind} in the Accelerate config")
    for variable, neutral, said, instead in _CONFLICTS:
        value = os.environ.get(variable, "").lower()
        if value and value not in neutral and not (said == "mixed_precision" and args.bf16 and value == "bf16"):
            instead = instead if isinstance(args, ReMaxConfig) else _OF_STAGES.get(said, instead)
            raise UserError(f"{said} is {shown(value)} in the Accelerate config: {instead}.")
    if isinstance(args, ReMaxConfig) and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        _check_deepspeed(args)


_CONFLICTS = (
    ("ACCELERATE_MIXED_PRECISION", ("no",), "mixed_precision", "--bf16 decides on that; set the flag, and 'no' there"),
    ("ACCELERATE_DYNAMO_BACKEND", ("no",), "dynamo_backend", "--torch_compile decides on that; set it to 'NO'"),
    (
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        ("1", "auto"),
        "gradient_accumulation_steps",
        "--micro_batch_tokens decides on that; leave it out there",
    ),
    (
        "ACCELERATE_GRADIENT_CLIPPING",
        ("none",),
        "gradient_clipping",
        "--max_grad_norm decides on that; leave it out there",
    ),
    (
        "FSDP_ACTIVATION_CHECKPOINTING",
        ("false",),
        "fsdp_activation_checkpointing",
        "--gradient_checkpointing decides on that; set it to false",
    ),
    (
        "FSDP_CPU_RAM_EFFICIENT_LOADING",
        ("false",),
        "fsdp_cpu_ram_efficient_loading",
        "only one process would have the weights, of which each needs a reference; set it to false",
    ),
    ("FSDP_VERSION", ("2",), "fsdp_version", "remax trains with FSDP2 alone; set fsdp_version: 2"),
    (
        "ACCELERATE_DEEPSPEED_ZERO3_INIT",
        ("false",),
        "zero3_init_flag",
        "remax copies and checks models before they are divided; set it to false",
    ),
    (
        "ACCELERATE_DEEPSPEED_ZERO_STAGE",
        ("2", "3"),
        "zero_stage",
        "that is not supported; set 2 or 3, or distributed_type: MULTI_GPU",
    ),
    (
        "ACCELERATE_DEEPSPEED_CONFIG_FILE",
        ("none",),
        "deepspeed_config_file",
        "what it says of optimisers and batches would be ignored; write the stage and offloading into the YAML instead",
    ),
    (
        "ACCELERATE_USE_MEGATRON_LM",
        ("false",),
        "use_megatron_lm",
        "remax does not train with it; use distributed_type MULTI_GPU, FSDP or DEEPSPEED",
    ),
    (
        "ACCELERATE_USE_PARALLELISM_CONFIG",
        ("false",),
        "use_parallelism_config",
        "remax divides prompts among all processes; leave it out",
    ),
)
"""Of every variable: which values change nothing, its name in the config, and what counts instead."""
_OF_STAGES = {
    "dynamo_backend": "nothing is compiled in this command; set it to 'NO'",
    "gradient_accumulation_steps": "--micro_batch_size decides on that; leave it out there",
}
"""What counts instead in `remax sft`, `reward` and `dpo`, where that differs."""


def _refuse_sharding(what: str) -> None:
    raise UserError(
        f"{what}: remax sft, reward and dpo train with all of the weights in each process; set --accelerate_config "
        "ddp, and --use_peft true if memory is short."
    )


def _check_deepspeed(args: ReMaxConfig) -> None:
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if args.optim in ("adamw_torch_8bit", "adafactor"):
        raise UserError(
            f"--optim is {args.optim}: it looks at matrices, of which DeepSpeed (ZeRO-{stage}) makes one long vector; "
            "set adamw_torch or adamw_torch_fused, or --accelerate_config ddp."
        )

"""remax: align language models with ReMax, REINFORCE whose baseline is the reward of the greedy completion."""

from typing import TYPE_CHECKING, Any

from remax.logs import hush

if TYPE_CHECKING:
    from remax.config import DPOConfig, ReMaxConfig, RewardConfig, SFTConfig
    from remax.errors import UserError
    from remax.stages.dpo import run_dpo
    from remax.stages.reward import run_reward
    from remax.stages.sft import run_sft
    from remax.trainer import ReMaxTrainer

hush()

_HOMES = {
    "DPOConfig": "remax.config",
    "ReMaxConfig": "remax.config",
    "RewardConfig": "remax.config",
    "SFTConfig": "remax.config",
    "UserError": "remax.errors",
    "run_dpo": "remax.stages.dpo",
    "run_reward": "remax.stages.reward",
    "run_sft": "remax.stages.sft",
    "ReMaxTrainer": "remax.trainer",
}

__all__ = [
    "DPOConfig",
    "ReMaxConfig",
    "ReMaxTrainer",
    "RewardConfig",
    "SFTConfig",
    "UserError",
    "run_dpo",
    "run_reward",
    "run_sft",
]


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used: `remax --help` must not wait for torch."""
    if name == "__version__":
        from remax.versions import own_version

        return own_version()
    if name not in _HOMES:
        raise AttributeError(f"module 'remax' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

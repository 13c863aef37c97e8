"""Every setting of every command: frozen dataclasses, checked when they are made. Imports no torch.

The string beneath a field is its documentation and its `--help`. Names are those of TRL and transformers wherever
they have the setting. A configuration is the union of the groups it inherits from, and each group is a section of
the command's help.
"""

from remax.config.commands import ChatConfig, DPOConfig, EvaluateConfig, ReMaxConfig, RewardConfig, SFTConfig
from remax.config.compare import CompareConfig, CompareInputs
from remax.config.groups import (
    ModelOptions,
    OptimiserOptions,
    PlacementOptions,
    PrecisionOptions,
    PromptOptions,
    SamplingOptions,
    ScoringOptions,
    StageOptions,
)
from remax.config.inputs import ChatInputs, EvaluateInputs, StageInputs, TrainInputs
from remax.config.lab import LabConfig, LabInputs
from remax.config.objective import ObjectiveOptions, PPOOptions
from remax.config.plan import PlanConfig, PlanInputs

__all__ = [
    "ChatConfig",
    "ChatInputs",
    "CompareConfig",
    "CompareInputs",
    "DPOConfig",
    "EvaluateConfig",
    "EvaluateInputs",
    "LabConfig",
    "LabInputs",
    "ModelOptions",
    "ObjectiveOptions",
    "OptimiserOptions",
    "PPOOptions",
    "PlacementOptions",
    "PlanConfig",
    "PlanInputs",
    "PrecisionOptions",
    "PromptOptions",
    "ReMaxConfig",
    "RewardConfig",
    "SFTConfig",
    "SamplingOptions",
    "ScoringOptions",
    "StageInputs",
    "StageOptions",
    "TrainInputs",
]

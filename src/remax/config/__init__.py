"""Every setting of every command: frozen dataclasses, checked when they are made. Imports no torch.

The string beneath a field is its documentation and its `--help`. Names are those of TRL and transformers wherever
they have the setting. A configuration is the union of the groups it inherits from, and each group is a section of
the command's help.
"""

from remax.config.checkpoint import CheckpointOptions
from remax.config.commands import ChatConfig, DPOConfig, EvaluateConfig, ReMaxConfig, RewardConfig, SFTConfig
from remax.config.compare import CompareConfig, CompareInputs
from remax.config.doctor import DoctorOptions
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
from remax.config.guards import GuardOptions, ReplayConfig
from remax.config.init import CompletionConfig, InitConfig
from remax.config.inputs import ChatInputs, EvaluateInputs, StageInputs, TrainInputs
from remax.config.lab import LabConfig, LabInputs
from remax.config.launch import LaunchOptions
from remax.config.objective import ObjectiveOptions, PPOOptions
from remax.config.plan import PlanConfig, PlanInputs, UnusedInputs
from remax.config.report import ReportConfig
from remax.config.serve import ServeConfig, ServeInputs
from remax.config.sharing import SharingOptions
from remax.config.vllm import ServeVLLMConfig, ServeVLLMInputs, VLLMOptions
from remax.config.winrate import WinrateConfig, WinrateInputs

__all__ = [
    "ChatConfig",
    "ChatInputs",
    "CheckpointOptions",
    "CompareConfig",
    "CompareInputs",
    "CompletionConfig",
    "DPOConfig",
    "DoctorOptions",
    "EvaluateConfig",
    "EvaluateInputs",
    "GuardOptions",
    "InitConfig",
    "LabConfig",
    "LabInputs",
    "LaunchOptions",
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
    "ReplayConfig",
    "ReportConfig",
    "RewardConfig",
    "SFTConfig",
    "SamplingOptions",
    "ScoringOptions",
    "ServeConfig",
    "ServeInputs",
    "ServeVLLMConfig",
    "ServeVLLMInputs",
    "SharingOptions",
    "StageInputs",
    "StageOptions",
    "TrainInputs",
    "UnusedInputs",
    "VLLMOptions",
    "WinrateConfig",
    "WinrateInputs",
]

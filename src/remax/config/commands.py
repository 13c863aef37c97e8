"""The settings of every command, as unions of the groups."""

from dataclasses import dataclass

from remax.config.checkpoint import CheckpointOptions
from remax.config.groups import (
    DatasetOptions,
    LengthOptions,
    LoopOptions,
    ModelOptions,
    OptimiserOptions,
    OutputOptions,
    PlacementOptions,
    PrecisionOptions,
    PromptOptions,
    SamplingOptions,
    Scheduler,
    ScoringOptions,
    StageOptions,
)
from remax.config.guards import GuardOptions
from remax.config.objective import ObjectiveOptions, PPOOptions
from remax.config.sharing import SharingOptions
from remax.config.vllm import VLLMOptions


@dataclass(frozen=True)
class ReMaxConfig(
    OutputOptions,
    SharingOptions,
    CheckpointOptions,
    DatasetOptions,
    PromptOptions,
    SamplingOptions,
    ScoringOptions,
    ObjectiveOptions,
    LengthOptions,
    LoopOptions,
    OptimiserOptions,
    ModelOptions,
    PlacementOptions,
    GuardOptions,
    PPOOptions,
    VLLMOptions,
):
    """Settings of `remax train` and of ReMaxTrainer."""

    def _check(self) -> None:
        self._require(
            self.reference_placement == "resident" or self.needs_reference,
            "reference_placement",
            f"with --beta {self.beta} and --kl_mode {self.kl_mode} there is no reference",
            "resident",
        )
        self._require(
            self.reference_placement == "resident" or not self.needs_exact_kl,
            "reference_placement",
            "the exact KL of --kl_mode loss reads the reference in every micro-batch",
            "resident, or --kl_estimator k2",
        )


@dataclass(frozen=True)
class SFTConfig(
    OutputOptions,
    SharingOptions,
    CheckpointOptions,
    DatasetOptions,
    LengthOptions,
    StageOptions,
    OptimiserOptions,
    ModelOptions,
):
    """Settings of `remax sft`."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    lr_scheduler_type: Scheduler = "cosine"
    """Schedule of the learning rate over the run."""


@dataclass(frozen=True)
class RewardConfig(
    OutputOptions,
    SharingOptions,
    CheckpointOptions,
    DatasetOptions,
    LengthOptions,
    StageOptions,
    OptimiserOptions,
    ModelOptions,
):
    """Settings of `remax reward`."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    lr_scheduler_type: Scheduler = "cosine"
    """Schedule of the learning rate over the run."""


@dataclass(frozen=True)
class DPOConfig(
    OutputOptions,
    SharingOptions,
    CheckpointOptions,
    DatasetOptions,
    LengthOptions,
    StageOptions,
    OptimiserOptions,
    ModelOptions,
):
    """Settings of `remax dpo`."""

    beta: float = 0.1
    """Coefficient of KL(policy || reference) in the objective whose optimum the loss is made from."""

    def _check(self) -> None:
        self._require(self.beta > 0, "beta", "the loss would be the same for every policy", "a positive number")


@dataclass(frozen=True)
class EvaluateConfig(PromptOptions, SamplingOptions, ScoringOptions, PrecisionOptions):
    """Settings of `remax evaluate`."""

    num_generations: int = 1
    """Sampled completions per prompt."""
    seed: int = 42
    """Seed of the sampling noise."""
    output_dir: str | None = None
    """Folder for evaluation.json and completions.jsonl; by default the table is only printed."""


@dataclass(frozen=True)
class ChatConfig(SamplingOptions, PrecisionOptions):
    """Settings of `remax chat`."""

    temperature: float = 0.7
    """Sampling temperature."""
    system_prompt: str | None = None
    """Put in front of the conversation."""
    seed: int = 42
    """Seed of the sampling."""

"""Groups of settings that several commands share; each is a section of their help."""

from dataclasses import dataclass, field
from typing import Literal

from remax.options import Options

DType = Literal["float32", "bfloat16"]
Optimiser = Literal["adamw_torch_fused", "adamw_torch", "adamw_torch_8bit", "adafactor"]
Placement = Literal["resident", "offload"]
EngineName = Literal["auto", "embedded", "paged", "vllm"]
LONGEST_TIMEOUT_SECONDS = 1_000_000
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]


@dataclass(frozen=True)
class OutputOptions(Options):
    """Run"""

    output_dir: str = "remax-output"
    """Folder for everything the run writes; unless the run is resumed, it must not hold one already."""
    seed: int = 42
    """Seed of the data order, the sampling noise and the initial weights of anything new."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers, as Accelerate names them (tensorboard, wandb, mlflow, ...); 'none' for none."""
    logging_steps: int = 1
    """Steps between two lines of metrics on the terminal (metrics.jsonl has every step)."""

    def _check(self) -> None:
        self._require(0 <= self.seed < 2**32, "seed", "no generator takes it", "a number from 0 to 2^32 - 1")
        self._require(self.logging_steps > 0, "logging_steps", "nothing would be logged", "1 or more")
        self._require(
            "none" not in self.report_to or len(self.report_to) == 1,
            "report_to",
            "nothing and something cannot both be tracked",
            "trackers, or none alone",
        )


@dataclass(frozen=True)
class OptimiserOptions(Options):
    """Optimiser"""

    optim: Optimiser = "adamw_torch_fused"
    """adamw_torch_fused or adamw_torch (two states of the weights' type per weight), adamw_torch_8bit (two of one byte,
    needs torchao; rounds bfloat16 weights stochastically, so that small updates do not vanish), or adafactor (a row and
    a column of states per matrix)."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    lr_scheduler_type: Scheduler = "linear"
    """Schedule of the learning rate over the run."""
    warmup_steps: float = 0
    """Steps of linear warm-up; below 1, a fraction of the run."""
    weight_decay: float = 0.0
    """Decoupled weight decay, not applied to biases and norms."""
    adam_beta1: float = 0.9
    """AdamW's first moment decay."""
    adam_beta2: float = 0.999
    """AdamW's second moment decay (the paper's authors use 0.95)."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 for no clipping."""

    def _check(self) -> None:
        self._require(self.learning_rate > 0, "learning_rate", "nothing would be learned", "a rate such as 1e-6")
        self._require(self.max_grad_norm >= 0, "max_grad_norm", "no norm is negative", "a bound, or 0 for no clipping")
        self._require(self.warmup_steps >= 0, "warmup_steps", "no warm-up is negative", "steps, or a fraction below 1")
        self._require(
            not self.warmup_steps or self.lr_scheduler_type != "constant",
            "warmup_steps",
            "--lr_scheduler_type constant would ignore it",
            "--lr_scheduler_type constant_with_warmup",
        )
        self._require(self.weight_decay >= 0, "weight_decay", "weights would grow", "0 or more")
        self._require(self.adam_epsilon > 0, "adam_epsilon", "a step could divide by zero", "a small positive number")
        for name in ("adam_beta1", "adam_beta2"):
            self._require(0 <= getattr(self, name) < 1, name, "no average has such a decay", "a number in [0, 1)")


@dataclass(frozen=True)
class PrecisionOptions(Options):
    """Precision"""

    dtype: DType = "float32"
    """Type of the weights that are loaded and trained. Small updates vanish in bfloat16; see --bf16."""
    bf16: bool = False
    """Forward and backward in bfloat16 autocast over the weights of --dtype (the usual mixed precision). In RL the
    reference and a --reward_model are then held in bfloat16, and rewards have about three digits."""
    attn_implementation: str | None = None
    """Attention kernel as transformers names it (sdpa, eager, flash_attention_2, ...); by default its choice."""


@dataclass(frozen=True)
class ModelOptions(PrecisionOptions):
    """Memory and adapters"""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    use_peft: bool = False
    """Train a LoRA adapter; the reference is then the same model with the adapter off."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapter, in SFT and reward training; always off in RL and DPO."""
    lora_target_modules: list[str] = field(default_factory=list)
    """Modules that get an adapter; by default all linear layers."""

    def _check(self) -> None:
        self._require(self.lora_r > 0, "lora_r", "the adapter would have no weights", "1 or more")
        self._require(self.lora_alpha > 0, "lora_alpha", "the adapter would have no effect", "1 or more")
        self._require(0 <= self.lora_dropout < 1, "lora_dropout", "no such probability exists", "a number in [0, 1)")


@dataclass(frozen=True)
class DatasetOptions(Options):
    """Data"""

    dataset_split: str = "train"
    """Split of --train_dataset, when it has several."""
    eval_split: str = "test"
    """Split of --eval_dataset, when it has several."""


@dataclass(frozen=True)
class PromptOptions(Options):
    """Prompts"""

    max_prompt_length: int = 512
    """Longest prompt in tokens, BOS and chat template included."""
    overlong_prompts: Literal["filter", "truncate"] = "filter"
    """What happens to longer ones: dropped with a count, or cut on the left, keeping BOS and template."""
    system_prompt: str | None = None
    """Put in front of conversational prompts that have no system message."""

    def _check(self) -> None:
        self._require(self.max_prompt_length > 0, "max_prompt_length", "every prompt would be too long", "1 or more")


@dataclass(frozen=True)
class SamplingOptions(Options):
    """Rollout"""

    max_completion_length: int = 256
    """Longest completion in tokens, EOS included."""
    temperature: float = 1.0
    """Sampling temperature; the log-probabilities of policy and reference take the same."""
    top_p: float = 1.0
    """Nucleus sampling; the policy is then the truncated distribution, in the gradient too."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 for no limit. In the gradient too."""

    def _check(self) -> None:
        self._require(self.max_completion_length > 0, "max_completion_length", "nothing is generated", "1 or more")
        self._require(self.temperature > 0, "temperature", "nothing can be sampled (greedy rows come anyway)", "1.0")
        self._require(0 < self.top_p <= 1, "top_p", "there is no such nucleus", "a number in (0, 1]")
        self._require(self.top_k >= 0, "top_k", "there is no such limit", "0 for no limit")


@dataclass(frozen=True)
class ScoringOptions(Options):
    """Rewards and batches"""

    reward_weights: list[float] = field(default_factory=list)
    """Weights of the rewards, --reward_model first, then --reward_funcs in order, then --reward_url; by default all
    1."""
    reward_batch_size: int = 64
    """Completions scored at once by a reward model."""
    reward_timeout_seconds: float = 300.0
    """Longest call of a reward function, or of --reward_url; beyond it the call is stopped, and its completions have no
    reward. To that end --reward_funcs run in processes of their own; 0 for no limit, and functions in this process."""
    rollout_batch_size: int = 0
    """Most rows decoded at once; 0 for all of a step's rows together. Changes memory and speed, not the result."""
    rollout_engine: EngineName = "auto"
    """Who draws the completions: embedded (the model decodes for itself, anywhere), paged (transformers' continuous
    batching, on CUDA), vllm (a program of its own, see docs/vllm.md), or auto (the one expected to be the fastest here;
    never vllm)."""
    micro_batch_tokens: int = 16384
    """Most tokens, padding included, in one pass of policy or reference; changes memory and speed, not the result."""
    num_eval_prompts: int = 256
    """Prompts of --eval_dataset that are used, from its start."""

    def _check(self) -> None:
        self._require(self.rollout_batch_size >= 0, "rollout_batch_size", "no row can be decoded", "0 for no limit")
        self._require(
            self.rollout_engine != "vllm" or hasattr(self, "vllm_mode"),
            "rollout_engine",
            "only a training draws with vLLM",
            "auto, embedded or paged",
        )
        self._require(
            0 <= self.reward_timeout_seconds <= LONGEST_TIMEOUT_SECONDS,
            "reward_timeout_seconds",
            "no call can be timed so",
            f"seconds up to {LONGEST_TIMEOUT_SECONDS}, or 0 for no limit",
        )
        for name in ("micro_batch_tokens", "reward_batch_size", "num_eval_prompts"):
            self._require(getattr(self, name) > 0, name, "nothing would be processed", "1 or more")


@dataclass(frozen=True)
class PlacementOptions(Options):
    """Placement and compilation"""

    reference_placement: Placement = "resident"
    """Where the reference is between the phases that use it: resident on the device, or offload to the CPU's memory."""
    reward_placement: Placement = "resident"
    """Likewise for a --reward_model."""
    torch_compile: bool = False
    """Compile the policy's forward and backward pass with torch.compile (the first steps take minutes)."""


@dataclass(frozen=True)
class LengthOptions(Options):
    """Length of the run"""

    max_steps: int = -1
    """Optimiser steps; -1 for --num_train_epochs passes over the data."""
    num_train_epochs: float = 1.0
    """Passes over the data when --max_steps is -1."""

    def _check(self) -> None:
        self._require(
            self.max_steps > 0 or self.max_steps == -1,
            "max_steps",
            "no step would be taken",
            "1 or more, or -1 to count by --num_train_epochs",
        )
        self._require(self.num_train_epochs > 0, "num_train_epochs", "no step would be taken", "a positive number")


@dataclass(frozen=True)
class LoopOptions(Options):
    """Training loop"""

    batch_size: int = 32
    """Prompts per step, over all processes."""
    eval_steps: int = 0
    """Steps between two evaluations on --eval_dataset; 0 for one before and one after training."""
    save_best_model: bool = True
    """With --eval_dataset: keep the weights with the best evaluation in OUT/best_model."""
    metric_for_best_model: str = "eval/reward"
    """The evaluation metric that decides; larger is better."""
    max_missing_rewards: float = 0.5
    """Largest fraction of a step's completions, greedy ones included, that may be without a reward; the step that
    exceeds it is not taken, and the run saves its state and stops. 1 to go on whatever happens."""
    log_completions: bool = True
    """Write every completion with its rewards to completions.jsonl."""

    def _check(self) -> None:
        self._require(self.batch_size > 0, "batch_size", "nothing would be processed", "1 or more")
        self._require(
            0 <= self.max_missing_rewards <= 1,
            "max_missing_rewards",
            "there is no such fraction",
            "a number from 0 to 1",
        )
        self._require(self.eval_steps >= 0, "eval_steps", "no interval is negative", "a number of steps, or 0")


@dataclass(frozen=True)
class StageOptions(Options):
    """Training loop"""

    batch_size: int = 32
    """Examples (for `remax reward` and `remax dpo`: pairs) per step, over all processes."""
    micro_batch_size: int = 0
    """Most examples in one forward-backward pass of one process; 0 for its whole share of the batch."""
    max_length: int = 1024
    """Longest example in tokens; longer ones are cut (sft) or dropped with a count (reward, dpo)."""

    def _check(self) -> None:
        for name in ("batch_size", "max_length"):
            self._require(getattr(self, name) > 0, name, "nothing would be processed", "1 or more")
        self._require(self.micro_batch_size >= 0, "micro_batch_size", "no batch is negative", "0 for no limit")

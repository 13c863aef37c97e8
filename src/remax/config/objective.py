"""What is maximised, and by which method: the settings that change the gradient."""

from dataclasses import dataclass, fields
from typing import Literal

from remax.errors import UserError
from remax.options import Options

Method = Literal["remax", "reinforce", "rloo", "grpo", "dr_grpo", "ppo"]
Baseline = Literal["greedy", "leave_one_out", "mixed", "none", "moving_average", "group_mean", "value"]
KLMode = Literal["to_go", "one_step", "loss", "none"]
KLEstimator = Literal["exact", "k2"]
Aggregation = Literal["sequence", "token"]
ClipMode = Literal["raw", "difference"]

BASELINES: dict[str, tuple[str, ...]] = {
    "remax": ("greedy", "leave_one_out", "mixed"),
    "reinforce": ("none", "moving_average"),
    "rloo": ("leave_one_out",),
    "grpo": ("group_mean",),
    "dr_grpo": ("group_mean",),
    "ppo": ("value",),
}
"""What each method subtracts from the reward; the first is its default."""
GROUP_BASELINES = ("leave_one_out", "mixed", "group_mean")
"""Those that compare the samples of a prompt with each other."""


@dataclass(frozen=True)
class ObjectiveOptions(Options):
    """Objective"""

    method: Method = "remax"
    """remax, reinforce, rloo (leave-one-out), grpo (advantages over the group's standard deviation, sequences averaged
    over their tokens), dr_grpo (GRPO without both) or ppo (a value model, clipped ratios, several epochs)."""
    baseline: Baseline | None = None
    """What is subtracted from the reward. remax: greedy (default), leave_one_out, or mixed (of both, weighted for least
    variance by past batches). reinforce: none (default) or moving_average. The other methods have one each."""
    greedy_every: int = 1
    """Draw a prompt's greedy completion at every k-th visit of the prompt and keep its reward in between: fewer tokens,
    an older baseline, no bias."""
    num_generations: int = None  # type: ignore[assignment]
    """Sampled completions per prompt: by default 1, and 2 for baselines that compare samples of a prompt (rloo, grpo,
    dr_grpo)."""
    beta: float = 0.05
    """Coefficient of KL(policy || reference), in reward per nat; 0 loads no reference."""
    kl_mode: KLMode = "to_go"
    """Where the KL enters: to_go (in a token's return, the log-ratios from it on: the unbiased gradient), one_step (its
    own log-ratio alone, as in the authors' code), loss (as a term of the loss), none (no reference is loaded)."""
    kl_estimator: KLEstimator = "exact"
    """With --kl_mode loss: exact over the vocabulary at each position, or k2 (half the squared log-ratio)."""
    gamma: float = 1.0
    """Discount of the reward difference, gamma^(T-t) at t = 0..T-1 of T tokens; the KL is not discounted. With ppo, the
    discount of GAE."""
    loss_aggregation: Aggregation = "sequence"
    """sequence: sum over tokens, mean over sequences (Algorithm 1). token: mean over the batch's tokens (biased)."""
    reward_clip: float | None = None
    """Bound c: what --reward_clip_mode names is clipped to [-c, c]; by default nothing is (the authors' code: 5)."""
    reward_clip_mode: ClipMode = "raw"
    """With --reward_clip: raw (each reward, before the baseline is subtracted) or difference (the reward less its
    baseline, as in the authors' code)."""

    def _check(self) -> None:
        self._check_method()
        self._require(self.beta >= 0, "beta", "the policy would be driven away from the reference", "0 or more")
        self._require(0 < self.gamma <= 1, "gamma", "there is no such discount", "a number in (0, 1]")
        self._require(
            self.reward_clip is None or self.reward_clip > 0,
            "reward_clip",
            "every reward would become 0",
            "a positive bound or leave it out",
        )

    def _check_method(self) -> None:
        """Fills in what the method decides and refuses what it cannot do."""
        allowed = BASELINES[self.method]
        if self.baseline is None:
            object.__setattr__(self, "baseline", allowed[0])
        consequence = f"--method {self.method} has no such baseline"
        self._require(self.baseline in allowed, "baseline", consequence, " or ".join(allowed))
        compares = self.baseline in GROUP_BASELINES
        if self.num_generations is None:
            object.__setattr__(self, "num_generations", 2 if compares else 1)
        self._require(self.num_generations > 0, "num_generations", "there is nothing to learn from", "1 or more")
        self._require(
            self.num_generations > 1 or not compares,
            "num_generations",
            f"the {self.baseline} baseline of --method {self.method} compares samples of the same prompt",
            "2 or more",
        )
        self._require(self.greedy_every > 0, "greedy_every", "there would be no baseline", "1 or more")
        self._require(
            self.greedy_every == 1 or self.needs_greedy,
            "greedy_every",
            f"the {self.baseline} baseline of --method {self.method} draws no greedy completions",
            "1, or --baseline greedy or mixed of --method remax",
        )
        self._require(
            self.method != "grpo" or self.loss_aggregation == "sequence",
            "loss_aggregation",
            "--method grpo averages every sequence over its own tokens",
            "sequence, or --method dr_grpo",
        )
        if self.method == "ppo":
            instead = "to_go or none"
            self._require(self.kl_mode in ("to_go", "none"), "kl_mode", "ppo takes the KL as reward per token", instead)
            self._require(
                self.reward_clip is None or self.reward_clip_mode == "raw",
                "reward_clip_mode",
                "ppo subtracts no baseline from the reward of a completion",
                "raw",
            )

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model has to be held at all."""
        return self.kl_mode != "none" and self.beta > 0

    @property
    def needs_exact_kl(self) -> bool:
        """Whether the loss has the exact KL, for which the reference runs beside the policy in every micro-batch."""
        return self.needs_reference and self.kl_mode == "loss" and self.kl_estimator == "exact"

    @property
    def needs_greedy(self) -> bool:
        """Whether greedy completions are drawn."""
        return self.baseline in ("greedy", "mixed")


@dataclass(frozen=True)
class PPOOptions(Options):
    """Proximal policy optimisation (--method ppo)"""

    num_ppo_epochs: int = 4
    """Passes over each batch of completions."""
    num_mini_batches: int = 1
    """Updates per pass: the batch is cut into this many parts."""
    cliprange: float = 0.2
    """The ratio of new to old probability is clipped to 1 +- this."""
    lam: float = 0.95
    """lambda of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Give the advantages of a batch's tokens mean 0 and variance 1."""
    value_model: str | None = None
    """Folder or hub name that the value model starts from; by default the reward model, and the policy without one."""
    value_learning_rate: float | None = None
    """Peak learning rate of the value model; by default that of the policy."""
    cliprange_value: float = 0.2
    """Values are clipped to the old value +- this in the value loss."""
    target_kl: float | None = None
    """Adapt beta so that the KL approaches this, in nats per sequence; by default beta stays as it is."""
    kl_horizon: int = 10000
    """Completions over which beta adapts, with --target_kl."""

    def _check(self) -> None:
        for name in ("num_ppo_epochs", "num_mini_batches", "kl_horizon"):
            self._require(getattr(self, name) > 0, name, "nothing would be done", "1 or more")
        for name in ("cliprange", "cliprange_value"):
            self._require(getattr(self, name) > 0, name, "nothing would be learned", "a positive number such as 0.2")
        self._require(0 <= self.lam <= 1, "lam", "there is no such average", "a number in [0, 1]")
        for name in ("value_learning_rate", "target_kl"):
            value = getattr(self, name)
            self._require(value is None or value > 0, name, "nothing would be learned", "a positive number")
        method = getattr(self, "method", "ppo")
        changed = [f.name for f in fields(PPOOptions) if getattr(self, f.name) != f.default]
        if method != "ppo" and changed:
            raise UserError(
                f"--{changed[0]} is {getattr(self, changed[0])}: --method {method} has no such step and would ignore "
                "it; leave it out, or set --method ppo."
            )
        batch_size, num_generations = getattr(self, "batch_size", None), getattr(self, "num_generations", None)
        if batch_size and num_generations:
            rows = batch_size * num_generations
            consequence = f"a step has only {rows} completions"
            self._require(self.num_mini_batches <= rows, "num_mini_batches", consequence, f"{rows} or less")
            consequence = f"beta would jump with the {rows} completions of a step"
            self._require(
                self.target_kl is None or self.kl_horizon >= rows, "kl_horizon", consequence, f"{rows} or more"
            )
        needs_reference = getattr(self, "needs_reference", True)
        instead = "a positive --beta with --kl_mode to_go, or leave it out"
        self._require(self.target_kl is None or needs_reference, "target_kl", "there is no KL to adapt to", instead)

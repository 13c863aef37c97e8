"""Settings of the estimator laboratory, `remax lab`."""

from dataclasses import dataclass, field, fields
from typing import Any

from remax.config.commands import ReMaxConfig
from remax.config.groups import PrecisionOptions, PromptOptions, SamplingOptions, ScoringOptions
from remax.config.inputs import check_reward_url
from remax.config.objective import BASELINES, GROUP_BASELINES, KLMode
from remax.errors import UserError
from remax.options import Options


@dataclass(frozen=True)
class LabInputs(Options):
    """Models, rewards and data"""

    model: str
    """The checkpoint at which gradients are measured: a folder or a hub name."""
    train_dataset: str
    """Prompts: a json, jsonl, parquet or csv file or a hub name, with a column `prompt` of texts or messages."""
    reward_model: str | None = None
    """A reward model with one label, usually the output of `remax reward`."""
    reward_funcs: list[str] = field(default_factory=list)
    """Reward functions as file.py:function; several may follow, or the flag may be repeated."""
    reward_url: str | None = None
    """Address of a reward server (docs/reward-server.md), as http://127.0.0.1:8000; its token, if it has one, is in the
    environment variable REMAX_REWARD_TOKEN."""
    ref_model: str | None = None
    """The reference of the KL; by default the checkpoint itself, as at the first step of a training."""
    dataset_split: str = "train"
    """Split of --train_dataset, when it has several."""

    def _check(self) -> None:
        if not (self.reward_model or self.reward_funcs or self.reward_url):
            raise UserError(
                "neither --reward_model nor --reward_funcs is set, nor --reward_url: no gradient has anything to "
                "follow; set a model, file.py:function, or the address of a reward server."
            )
        check_reward_url(self.reward_url)


@dataclass(frozen=True)
class LabConfig(PromptOptions, SamplingOptions, ScoringOptions, PrecisionOptions):
    """Settings of `remax lab`."""

    output_dir: str = "remax-lab"
    """Folder for lab.json and lab.png; it must not hold a run already. While measuring, two sets of gradients are kept
    there (2 x num_gradients x weights x 4 bytes)."""
    methods: list[str] = field(default_factory=lambda: list(BASELINES))
    """What is measured: remax, reinforce, rloo, grpo, dr_grpo, ppo, each with another baseline than its default as
    remax:mixed, remax:leave_one_out, reinforce:moving_average. Ratios are to the first."""
    num_gradients: int = 100
    """Independent gradients per method, K."""
    batch_size: int = 32
    """Prompts of a gradient: the first batch of a training with this seed, the same for all gradients."""
    num_generations: int | None = None
    """Sampled completions per prompt, for all methods; by default what each would take in `remax train`: 1, and 2 where
    the samples of a prompt are compared."""
    reward_offset: float = 0.0
    """Measure once more with a fixed random number added to all rewards of each prompt: its standard deviation, in
    units of the reward's own."""
    beta: float = 0.05
    """Coefficient of KL(policy || reference), in reward per nat. Without --ref_model the KL is 0, and so is its part of
    the gradient, unless --top_p or --top_k cut the policy."""
    kl_mode: KLMode = "to_go"
    """Where the KL enters, as in `remax train`; ppo takes to_go or none."""
    value_model: str | None = None
    """Folder or hub name of ppo's value model, taken as it is; by default the reward model, and a value of 0 without
    one."""
    seed: int = 42
    """Seed of the choice of prompts, the sampling noise and the offsets."""

    def _check(self) -> None:
        self._require(self.num_gradients > 1, "num_gradients", "one gradient has no variance", "2 or more, such as 100")
        self._require(self.batch_size > 0, "batch_size", "there is nothing to learn from", "1 or more")
        self._require(self.reward_offset >= 0, "reward_offset", "no standard deviation is negative", "0 or more")
        self._require(0 <= self.seed < 2**32, "seed", "no generator takes it", "a number from 0 to 2^32 - 1")
        self._require(
            self.num_eval_prompts == LabConfig.num_eval_prompts,
            "num_eval_prompts",
            "the lab evaluates nothing and would ignore it",
            "--batch_size for the number of prompts, and leave it out",
        )
        measured = [self._split(entry) for entry in self.methods]
        if len(set(measured)) < len(measured) or not measured:
            given = " ".join(self.methods) or "empty"
            raise UserError(f"--methods is {given}: one is named twice, or none is; set different ones.")
        uses_ppo = ("ppo", "value") in measured
        self._require(self.value_model is None or uses_ppo, "value_model", "only ppo has one", "ppo in --methods too")
        self._require(
            self.kl_mode in ("to_go", "none") or not uses_ppo,
            "kl_mode",
            "ppo takes the KL as reward per token",
            "to_go or none, or --methods without ppo",
        )
        for entry, (_, baseline) in zip(self.methods, measured, strict=True):
            self._require(
                self.num_generations != 1 or baseline not in GROUP_BASELINES,
                "num_generations",
                f"{entry} of --methods compares samples of the same prompt",
                f"2 or more, or --methods without {entry}",
            )
            self.training(entry)

    @staticmethod
    def _split(entry: str) -> tuple[str, str]:
        """Returns method and baseline of an entry of --methods."""
        method, _, baseline = entry.partition(":")
        if method not in BASELINES:
            raise UserError(
                f"--methods has {entry}: there is no such method; set some of {', '.join(BASELINES)}, with another "
                "baseline as in remax:mixed."
            )
        if baseline and baseline not in BASELINES[method]:
            choices = " or ".join(f"{method}:{name}" for name in BASELINES[method])
            raise UserError(f"--methods has {entry}: {method} has no such baseline; set {choices}.")
        return method, baseline or BASELINES[method][0]

    def training(self, entry: str, **changes: Any) -> ReMaxConfig:
        """Returns the settings with which `remax train` would use the same gradient, for an entry of --methods."""
        method, baseline = self._split(entry)
        names = {f.name for f in fields(ReMaxConfig)} & {f.name for f in fields(self)}
        settings = {name: getattr(self, name) for name in names}
        if method != "ppo":
            settings.pop("value_model")
        changes = {"report_to": ["none"], **changes}
        return ReMaxConfig(**{**settings, "method": method, "baseline": baseline, **changes})

"""Settings of `remax compare`."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from remax.config.inputs import TrainInputs
from remax.errors import UserError
from remax.options import Options


@dataclass(frozen=True)
class CompareInputs(TrainInputs):
    """Settings of `remax compare`: those of `remax train`, with held-out prompts."""

    def _check(self) -> None:
        if not self.eval_dataset:
            raise UserError(
                "--eval_dataset is not set: methods are compared on held-out prompts; set a file or a hub name."
            )


@dataclass(frozen=True)
class CompareConfig(Options):
    """Comparison"""

    output_dir: str = "remax-comparison"
    """Folder for all runs, results.json, plots and the page; the same command again goes on where it stopped."""
    methods: dict[str, Any] = field(
        default_factory=lambda: {name: {} for name in ("remax", "reinforce", "rloo", "grpo", "ppo")}
    )
    """What is compared: by label, the settings of `remax train` in which one differs from --settings. A label that is a
    method's name (remax, rloo, ...) needs none; any other sets `method`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of `remax train` that all methods share."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """One run per method and seed."""
    budget: Literal["prompts", "tokens", "seconds"] = "prompts"
    """What every run may use up: prompts, generated tokens (sampled and greedy), or seconds of training."""
    budget_amount: float = 3200.0
    """How much of it."""
    keep_models: bool = False
    """Keep the trained models; only measurements are kept otherwise."""
    accounting: bool = False
    """Instead of training, measure a step's bytes by kind and phase for every method, beside what is predicted."""

    def _check(self) -> None:
        self._require(len(self.methods) > 0, "methods", "there is nothing to compare", "one or more")
        self._require(len(self.seeds) > 0, "seeds", "there is nothing to run", "one or more")
        self._require(len(set(self.seeds)) == len(self.seeds), "seeds", "a run would be there twice", "different ones")
        self._require(math.isfinite(self.budget_amount), "budget_amount", "no run would end", "a number")
        self._require(self.budget_amount > 0, "budget_amount", "there is nothing to run", "a positive number")

"""What differs between the methods: whose greedy completions are drawn, the advantages, the update.

baselines.py    what critic-free methods subtract from the reward
critic_free.py  ReMax, REINFORCE, RLOO, GRPO: one update per batch
ppo.py          values, clipped ratios, epochs
within_memory.py  what their updates do when something goes wrong
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from remax.components import Components, Rewards
from remax.config import ReMaxConfig
from remax.critic import ValueModel, load_value_model
from remax.interfaces import Prompt, Rollout
from remax.learner import Learner
from remax.loading import check_context
from remax.methods.critic_free import CriticFree
from remax.methods.ppo import PPO
from remax.methods.within_memory import OnSkip
from remax.metrics import Credit, StepRecord
from remax.sharding import shards_weights

__all__ = ["PPO", "CriticFree", "Method", "make_method", "make_value_model"]


class Method(Protocol):
    """How rewards become a better policy."""

    on_skip: OnSkip
    """Called for each update that is not taken, since its loss or gradient is not finite."""

    def greedy_wanted(self, prompts: Sequence[Prompt]) -> list[bool]:
        """Returns for which prompts this step needs a greedy completion."""
        ...

    def credit(self, rollout: Rollout, rewards: Rewards) -> Credit:
        """Returns the advantage of every sample."""
        ...

    def losses(self, record: StepRecord, rows: Sequence[int]) -> Iterator[Tensor]:
        """Yields the policy's losses of a first update on these samples; their gradients add up to the estimate."""
        ...

    def update(self, record: StepRecord) -> None:
        """Takes the step's updates on the samples that have an advantage, and completes the record."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next steps depend on beside weights and optimisers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        ...


def make_value_model(parts: Components, args: ReMaxConfig) -> ValueModel | None:
    """Returns the value model that --method trains beside the policy; None if it trains none.

    Raises:
        UserError: it cannot be used.
    """
    if args.method != "ppo":
        return None
    value_model = load_value_model(args, parts.policy, parts.tokenizer, parts.reward_functions)
    prompts = [*parts.prompts, *parts.eval_prompts]
    check_context(value_model.body, prompts, args.max_completion_length, of="the value model")
    return value_model


def make_method(
    parts: Components, args: ReMaxConfig, policy: Learner, value_model: ValueModel | None, *, max_steps: int
) -> Method:
    """Returns the method of --method, which trains policy and, for PPO, a value model of its own."""
    if value_model is None:
        return CriticFree(parts, args, policy)
    rate = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
    if not shards_weights(parts.accelerator):
        value_model.to(parts.accelerator.device)
    critic = Learner(
        value_model,
        replace(args, learning_rate=rate),
        parts.accelerator,
        max_steps=max_steps,
        rate_flag="value_learning_rate",
    )
    return PPO(parts, args, policy, critic)

"""How many settings a method adds to what all methods share: the models, the data, the policy's optimiser, the KL."""

from remax.config import ReMaxConfig
from remax.config.objective import BASELINES


def added_hyperparameters(args: ReMaxConfig) -> list[str]:
    """Returns the settings that only some methods have and that change what is learned."""
    if args.method == "ppo":
        optional = ["target_kl", "kl_horizon"] if args.target_kl is not None else []
        return [
            *("value_model", "value_learning_rate", "lam", "cliprange", "cliprange_value", "num_ppo_epochs"),
            *("num_mini_batches", "whiten_advantages"),
            *optional,
        ]
    groups = ["num_generations"] if args.num_generations > 1 else []
    groups += ["baseline"] if args.baseline != BASELINES[args.method][0] else []
    return groups + (["greedy_every"] if args.greedy_every > 1 else [])

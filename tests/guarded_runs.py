"""What the tests of guards share."""

from typing import Any

import torch

PPO = {"method": "ppo", "num_ppo_epochs": 2, "num_mini_batches": 2, "batch_size": 8}


def weights(trainer: Any) -> torch.Tensor:
    networks = [trainer.parts.policy] + ([trainer.method.critic.network] if trainer.args.method == "ppo" else [])
    return torch.cat([p.detach().flatten() for network in networks for p in network.parameters()])

"""Trains with a rollout engine of one's own: `python train.py run.yaml`.

The engine is the simplest that keeps every promise of remax.interfaces.RolloutEngine: it reads the whole text again for
each new token. Start from it when completions have to come from somewhere else.

Legend: R rows, one per completion, of which the first S are sampled and the others greedy; V vocabulary.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from remax import ReMaxConfig, ReMaxTrainer
from remax.interfaces import Completion, Prompt, Rollout, Sampling
from remax.rollout.draw import choose
from remax.rollout.noise import uniforms


class PlainEngine:
    """Draws completions without a cache of keys and values."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy  # The tensors that are trained: there are no weights to keep up to date.

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        num_samples: int,
        greedy: bool | Sequence[bool],
        seed: int,
        step: int,
    ) -> Rollout:
        """Returns num_samples sampled and, if asked, one greedy completion of every prompt."""
        wanted = [greedy] * len(prompts) if isinstance(greedy, bool) else greedy
        samples = [Completion(p, k, [], [], truncated=True) for p in prompts for k in range(num_samples)]
        greedy_rows = [
            Completion(p, -1, [], [], truncated=True) for p, also in zip(prompts, wanted, strict=True) if also
        ]
        was_training = self.policy.training
        self.policy.eval()  # Dropout would draw from another distribution than the one that is trained.
        for position in range(sampling.max_completion_length):
            # A completion ends with its first EOS, which belongs to it.
            sampled_left = [row for row in samples if row.truncated]
            left = sampled_left + [row for row in greedy_rows if row.truncated]
            if not left:
                break
            noise = self._noise(sampled_left, position, seed, step)
            tokens, logprobs = choose(self._next_logits(left), sampling, noise)
            for row, token, logprob in zip(left, tokens.tolist(), logprobs.tolist(), strict=True):
                row.token_ids.append(token)
                row.logprobs.append(logprob)
                row.truncated = token not in sampling.eos_token_ids
        self.policy.train(was_training)
        return Rollout(samples, greedy_rows)

    def _next_logits(self, rows: list[Completion]) -> torch.Tensor:
        """Returns the logits of the next token, [R, V]."""
        texts = [row.prompt.token_ids + row.token_ids for row in rows]
        longest = max(map(len, texts))
        # Filled up on the right, which a causal model does not see from the left.
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=self.policy.device)
        last = torch.tensor([len(text) - 1 for text in texts], device=self.policy.device)
        return self.policy(input_ids=ids).logits[torch.arange(len(rows), device=ids.device), last]

    def _noise(self, rows: list[Completion], position: int, seed: int, step: int) -> torch.Tensor:
        """Returns one number of [0, 1) per sampled row, [S], which nothing else in the batch changes."""
        prompt_index = torch.tensor([row.prompt.index for row in rows], dtype=torch.long, device=self.policy.device)
        sample_index = torch.tensor([row.sample_index for row in rows], dtype=torch.long, device=self.policy.device)
        return uniforms(seed, step, prompt_index, sample_index, position)


def main(config: Path, **changes: Any) -> None:
    """Trains with the settings of a file; changes win, as flags do."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) | changes
    inputs = {name: settings.pop(name) for name in ("model", "train_dataset", "eval_dataset")}
    trainer = ReMaxTrainer(
        reward_funcs=settings.pop("reward_model"),
        args=ReMaxConfig(**settings),
        rollout_engine=PlainEngine,
        **inputs,
    )
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

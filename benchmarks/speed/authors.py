"""The schedule of the paper's authors (Li et al., arXiv 2310.10505; their code of 2023), on transformers alone.

Sampled and greedy completions come from two calls of generate(), one after the other; the policy runs forward once more
without gradients for the log-probabilities of its own samples; every forward makes the logits of all positions and
their log-softmax. The gradient is ReMax's with the KL of one step and gamma 0.99.
"""

from typing import Any

import torch
from benchmarks.speed.cases import BETA, Setting
from benchmarks.speed.process import Steps
from torch import Tensor
from transformers import AutoModelForCausalLM

GAMMA = 0.99


def train(steps: Steps, setting: Setting) -> None:
    """Trains until steps.begin() raises Stopped."""
    schedule = AuthorsSchedule(setting, steps.reward)
    while True:
        steps.begin()
        schedule.step()
        steps.end()


class AuthorsSchedule:
    """A policy, its reference, and a step."""

    def __init__(self, setting: Setting, reward: Any) -> None:
        self.policy = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.float32)
        self.reference = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.float32).eval()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        self.tokenizer, self.texts, self.reward = setting.tokenizer(), setting.prompts(), reward
        self.length = setting.case.max_completion_length
        self.plan = setting.plan()
        self.plan.attach(self.policy)

    def step(self) -> None:
        """Takes one step on all prompts."""
        prompts = self.tokenizer(self.texts, padding=True, return_tensors="pt")
        self.policy.eval()
        with torch.no_grad():
            sequences, mask, completion_mask = self._generate(prompts, row=0, do_sample=True, top_k=0, top_p=1.0)
            greedy, _, greedy_mask = self._generate(prompts, row=1, do_sample=False)
            logprobs = self._logprobs(self.policy, sequences, mask, completion_mask)
            ref_logprobs = self._logprobs(self.reference, sequences, mask, completion_mask)
        length = completion_mask.shape[1]
        completions = [*_ragged(sequences, completion_mask), *_ragged(greedy, greedy_mask)]
        self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        rewards = torch.tensor(self.reward(completion_ids=completions))
        sampled_rewards, greedy_rewards = rewards.chunk(2)

        remaining = completion_mask.sum(-1, keepdim=True) - torch.arange(length)
        returns = (sampled_rewards - greedy_rewards)[:, None] * GAMMA**remaining - BETA * (logprobs - ref_logprobs)
        self.policy.train()
        new_logprobs = self._logprobs(self.policy, sequences, mask, completion_mask)
        loss = -(new_logprobs * returns * completion_mask).sum() / completion_mask.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _generate(self, prompts: Any, *, row: int, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Returns sequences [B, P + T], their mask, and the mask [B, T] of the completions."""
        self.plan.row = row
        sequences = self.policy.generate(
            **prompts, max_new_tokens=self.length, pad_token_id=self.tokenizer.pad_token_id, **how
        )
        completions = sequences[:, prompts["input_ids"].shape[1] :]
        is_eos = (completions == self.tokenizer.eos_token_id).long()
        completion_mask = is_eos.cumsum(-1) - is_eos == 0
        return sequences, torch.cat([prompts["attention_mask"], completion_mask.long()], dim=1), completion_mask

    def _logprobs(self, model: Any, sequences: Tensor, mask: Tensor, completion_mask: Tensor) -> Tensor:
        """Returns [B, T], 0 outside the completions."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits
        logprobs: Tensor = logits[:, :-1].log_softmax(-1).gather(-1, sequences[:, 1:, None])[..., 0]
        return logprobs[:, -completion_mask.shape[1] :] * completion_mask


def _ragged(sequences: Tensor, completion_mask: Tensor) -> list[list[int]]:
    completions = sequences[:, -completion_mask.shape[1] :]
    return [row[mask].tolist() for row, mask in zip(completions, completion_mask, strict=True)]

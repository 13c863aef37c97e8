"""Completions of planned lengths, the same for every library: EOS is forced where the plan has it, forbidden elsewhere.

A hook on the model does it in a few small operations for every decoded token, whoever decodes: it changes the logits
of calls with a key-value cache and of no others.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

CERTAIN = 1e4
"""Added to no finite logit: it takes its place. The softmax gives probability 1 beside it and 0 at its negative."""


def planned_lengths(num_prompts: int, limit: int, mean: float | None) -> list[tuple[int, int]]:
    """Returns for every prompt the lengths of two completions; one above the limit is cut by it.

    They are the quantiles of a geometric distribution over 2, 3, ... with that mean before the limit cuts, shuffled:
    all first rows together have the same lengths as all second ones, so it does not matter which are trained on.
    (From 2: both rows of a prompt may share the logits of their first token, so neither can end there alone.) Without
    a mean, no completion ends by itself.
    """
    if mean is None:
        return [(limit + 1, limit + 1)] * num_prompts
    levels = (np.arange(num_prompts) + 0.5) / num_prompts
    quantiles = 1 + np.ceil(np.log1p(-levels) / np.log1p(-1 / (mean - 1))).astype(int)
    generator = np.random.default_rng(0)
    first, second = generator.permutation(quantiles).tolist(), generator.permutation(quantiles).tolist()
    return list(zip(first, second, strict=True))


class LengthPlan:
    """When the rows of each prompt end."""

    def __init__(self, prompts: Sequence[Sequence[int]], lengths: Sequence[tuple[int, int]], eos_token_id: int) -> None:
        self.number = {tuple(ids): number for number, ids in enumerate(prompts)}
        assert len(self.number) == len(prompts), "two prompts are the same"
        self.lengths = torch.tensor(lengths)
        self.eos_token_id = eos_token_id
        self.row = 0
        """Which of a prompt's lengths its first row takes, when its rows are decoded in separate calls."""
        self.prompts = self.ends = torch.empty(0, dtype=torch.long)
        """Of the rows [N] that are decoded: which prompt each continues, and at which token it ends."""
        self.num_drawn = 0
        self.cache: Callable[[], Any] = lambda: None
        """The one that is filled, held weakly: it must not live longer than without a plan."""

    def attach(self, model: Any) -> None:
        """Applies the plan to everything that this model decodes."""
        model.register_forward_hook(self._after_forward, with_kwargs=True)

    def _after_forward(self, model: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None or not kwargs.get("use_cache", True):
            return
        if cache is not self.cache():
            self._start(cache, kwargs)
        self.num_drawn += 1
        due = self.ends == self.num_drawn
        logits: Tensor = outputs.logits
        logits[:, -1, self.eos_token_id] = torch.where(due, CERTAIN, -CERTAIN)

    def _start(self, cache: Any, kwargs: dict[str, Any]) -> None:
        """A prefill: finds out which prompts the rows are, and follows the cache when rows are copied or leave."""
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask  # generate() leaves out a mask that hides nothing
        rows = [tuple(own[real.bool()].tolist()) for own, real in zip(ids, mask, strict=True)]
        self.cache, self.num_drawn = weakref.ref(cache), 0
        self._number_rows(torch.tensor([self.number[row] for row in rows]))
        select, this = type(cache).batch_select_indices, self.cache

        def followed(indices: Tensor) -> None:
            if len(indices) > len(self.ends):
                self._number_rows(self.prompts[indices])
            else:
                self.prompts, self.ends = self.prompts[indices], self.ends[indices]
            select(this(), indices)

        cache.batch_select_indices = followed

    def _number_rows(self, prompts: Tensor) -> None:
        """Gives the rows [N] of these prompts their lengths, the first row of a prompt its first one."""
        same = prompts[:, None] == prompts[None, :]
        number = same.long().tril(-1).sum(1) + self.row
        self.prompts, self.ends = prompts, self.lengths[prompts, number]

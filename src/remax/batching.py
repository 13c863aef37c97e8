"""From ragged completions to padded micro-batches.

Legend: B rows, L tokens of the longest prompt with its completion, T tokens of the longest completion, N completion
tokens in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from remax.interfaces import Completion, Prompt


@dataclass(frozen=True)
class Batch:
    """Prompts with their completions, padded on the right.

    Padding on the right keeps every position id what it is without padding, and no token of a causal model sees what
    follows it, so nothing depends on which id the padding has, and no model needs an attention mask. With one,
    attention would take a slower kernel, and repeat the keys of grouped heads.
    """

    input_ids: Tensor
    """[B, L] prompt, completion, padding."""
    target_mask: Tensor
    """[B, L - 1] True where the next token belongs to the completion; N True in all."""
    completion_mask: Tensor
    """[B, T] True at the tokens of the completion, its EOS included."""

    @property
    def targets(self) -> Tensor:
        """The N completion tokens, row by row."""
        return self.input_ids[:, 1:][self.target_mask]

    def scatter(self, values: Tensor) -> Tensor:
        """Returns N values, one per completion token, as [B, T] with 0 outside the completions."""
        padded = values.new_zeros(self.completion_mask.shape)
        return padded.masked_scatter(self.completion_mask, values)


def collate(completions: Sequence[Completion], pad_token_id: int, device: torch.device) -> Batch:
    """Returns the batch of these completions, in their order."""
    prompt_lengths = [len(c.prompt.token_ids) for c in completions]
    completion_lengths = [len(c.token_ids) for c in completions]
    rows = [c.prompt.token_ids + c.token_ids for c in completions]
    length = max(map(len, rows))
    input_ids = torch.tensor([row + [pad_token_id] * (length - len(row)) for row in rows])
    starts = torch.tensor(prompt_lengths).unsqueeze(1)
    counts = torch.tensor(completion_lengths).unsqueeze(1)
    positions = torch.arange(length)
    batch = Batch(
        input_ids,
        (positions[1:] >= starts) & (positions[1:] < starts + counts),
        torch.arange(max(completion_lengths)) < counts,
    )
    return Batch(*(tensor.to(device) for tensor in vars(batch).values()))


def split_by_tokens(lengths: Sequence[int], max_tokens: int, num_parts: int = 1) -> list[list[int]]:
    """Returns the row numbers grouped so that a group padded to its longest row has at most max_tokens tokens.

    Rows of similar length share a group, which keeps padding small; a single row longer than max_tokens is a group of
    its own. The longest group comes first, so that a run that does not fit in memory fails at once. num_parts: how many
    share the groups, which then are small enough that all of them find work, unless a few rows are most of it.
    """
    if num_parts > 1 and lengths:
        max_tokens = min(max_tokens, max(max(lengths), sum(lengths) // num_parts))
    groups: list[list[int]] = []
    width = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not groups or (len(groups[-1]) + 1) * width > max_tokens:
            groups.append([])
            width = lengths[row]
        groups[-1].append(row)
    return groups


class PromptOrder:
    """Which prompts each step takes: a new permutation every epoch, whole batches only.

    A pure function of (seed, step), so a run can be continued from any step without replaying the steps before it.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, seed: int) -> None:
        self.prompts = prompts
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = len(prompts) // batch_size

    def batch(self, step: int) -> list[Prompt]:
        """Returns the prompts of a step, counted from 1."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        permutation = torch.randperm(len(self.prompts), generator=generator)
        rows = permutation[position * self.batch_size : (position + 1) * self.batch_size]
        return [self.prompts[row] for row in rows.tolist()]

"""Learned rewards: a sequence classification model with one label scores texts."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from remax.config.groups import Placement
from remax.interfaces import Completion
from remax.placement import Placed
from remax.rewards.text import reward_input_ids

MISSING = float("nan")


class RewardModel:
    """Scores completions with a reward model, in evaluation mode and without gradients.

    Texts are tokenised anew: the policy may have another tokenizer. A score does not depend on what else is scored.

    It scores in float32 or, when `bf16` is set, under bfloat16 autocast with the scalar head in float32: scores then
    have about three digits, and what else is scored moves them by no more than that.

    A completion that is longer, with its prompt, than the positions the model was trained on has no reward (NaN), and
    a warning is given once: cut to fit, it would lose its prompt or its end, and its score would mean something else.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "reward_model",
        batch_size: int = 64,
        device: torch.device | str | None = None,
        placement: Placement = "resident",
        own: bool = False,
    ) -> None:
        """Takes a model with one label and its tokenizer.

        device: where it scores, None for where the model is at that time. placement: where the model is otherwise,
        see Placed. own: nobody else uses the model, so its weights may be held in bfloat16.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.placed = Placed(model, device, placement)
        self.own = own
        self.bf16 = False
        self.num_passes: Callable[[int], int] = lambda number: number
        """From the batches that there are to the passes that are taken: a sharded model is gathered by all processes
        together, so each of them has to pass through it as often as the others."""
        config = model.config.get_text_config()
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self.num_overlong = 0
        # The model reads its scalar at the last token that is not config.pad_token_id: padding must be that token,
        # whatever the tokenizer says, and without one every row must stand alone.
        self.pad_token_id: int = config.pad_token_id if config.pad_token_id is not None else 0
        self.batch_size = batch_size if config.pad_token_id is not None else 1
        self.kwargs = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def __call__(self, completions: Sequence[Completion]) -> list[float | None]:
        """Returns one reward per completion, in order; NaN for those that are too long.

        Raises:
            UserError: the prompts are conversations and the tokenizer has no chat template.
        """
        inputs = [
            reward_input_ids(self.tokenizer, c.prompt.content, c.content, finished=not c.truncated) for c in completions
        ]
        return list(self.score_ids(inputs))

    @torch.inference_mode()
    def score_ids(self, inputs: Sequence[Sequence[int]]) -> list[float]:
        """Returns one reward per token sequence, in order, having scored equal ones once."""
        was_training = self.model.training
        self.model.eval()
        rewards: dict[tuple[int, ...], float] = {tuple(ids): MISSING for ids in inputs}
        fitting = [ids for ids in rewards if ids and (self.max_length is None or len(ids) <= self.max_length)]
        fitting.sort(key=len)
        with self.placed.on_device():
            batches = [fitting[start : start + self.batch_size] for start in range(0, len(fitting), self.batch_size)]
            num_passes = self.num_passes(len(batches))  # Before the first one: in a pass nothing else can be exchanged.
            for batch in batches:
                rewards.update(zip(batch, self._score_batch(batch).tolist(), strict=True))
            for _ in range(len(batches), num_passes):
                self._score_batch([(self.pad_token_id,)])
        self.model.train(was_training)
        self._count_overlong(len(rewards) - len(fitting))
        return [rewards[tuple(ids)] for ids in inputs]

    def _score_batch(self, batch: Sequence[Sequence[int]]) -> Tensor:
        """Returns rewards [B] of token sequences, padded on the right to [B, L]."""
        length = max(map(len, batch))
        device = next(self.model.parameters()).device
        input_ids = torch.full((len(batch), length), self.pad_token_id)
        attention_mask = torch.zeros(len(batch), length, dtype=torch.long)
        for row, ids in enumerate(batch):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits: Tensor = self.model(
                input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), **self.kwargs
            ).logits
        return logits.float().view(len(batch)).cpu()

    def _count_overlong(self, number: int) -> None:
        if number and not self.num_overlong:
            warnings.warn(
                f"{self.name}: a text is longer than the {self.max_length} tokens that the reward model can read; "
                "it and later ones get no reward and are left out.",
                stacklevel=4,
            )
        self.num_overlong += number

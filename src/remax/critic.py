"""PPO's value model: V(x, y_<t) at every token of a completion, from a model body and a head with one output.

Legend: B rows, T tokens of the longest completion, N completion tokens, H hidden size.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from remax import models
from remax.batching import Batch
from remax.config import ModelOptions, ReMaxConfig
from remax.errors import UserError
from remax.interfaces import RewardFunction
from remax.rewards import RewardModel


class ValueModel(nn.Module):
    """A transformer body with a scalar head, read at every position from which a completion token is drawn."""

    def __init__(self, body: Any, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head.float()

    @property
    def _no_split_modules(self) -> Any:
        """The layers that are sharded each by itself, as Accelerate asks for them."""
        return self.body._no_split_modules

    def forward(self, batch: Batch) -> Tensor:
        """Returns V(x, y_<t), [B, T], float32, 0 outside the completions."""
        states = self.body(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # No mask: see Batch.
        chosen = states[:, :-1][batch.target_mask]
        with torch.autocast(chosen.device.type, enabled=False):
            values: Tensor = self.head(chosen.to(self.head.weight.dtype)).squeeze(-1)
        return batch.scatter(values)


def check_value_model(args: ReMaxConfig, tokenizer: Any, rewards: list[Any]) -> None:
    """Raises UserError if the value model would read other tokens than the policy; told before weights are read.

    rewards: names or models, before they are loaded.
    """
    names = [reward for reward in rewards if isinstance(reward, str)]
    source = args.value_model or (names[0] if names else None)
    if source is None:
        return
    flag = "--value_model" if args.value_model else "--reward_model"
    models.check_model_exists(source, flag=flag)
    _require_same_tokens(models.load_tokenizer(source, flag=flag), tokenizer, source, args)


def load_value_model(args: ReMaxConfig, policy: Any, tokenizer: Any, rewards: list[RewardFunction]) -> ValueModel:
    """Returns the value model to train: from --value_model, else a copy of the reward model, else of the policy.

    Of a reward model it takes the head too; a language model gets a head of zeros, so that V starts at 0.

    Raises:
        UserError: it cannot be loaded, or reads other tokens than the policy.
    """
    options = ModelOptions(dtype=args.dtype, attn_implementation=args.attn_implementation)
    learned = [reward for reward in rewards if isinstance(reward, RewardModel)]
    if args.value_model is not None and models.is_reward_model(args.value_model, flag="--value_model"):
        dtype = getattr(torch, args.dtype)
        value_model = _of_classifier(models.load_reward_model(args.value_model, flag="--value_model", dtype=dtype))
    elif args.value_model is not None:
        value_model = _of_language_model(models.load_policy(args.value_model, options, flag="--value_model"))
    elif learned:
        _require_same_tokens(learned[0].tokenizer, tokenizer, learned[0].name, args)
        value_model = _of_classifier(copy.deepcopy(learned[0].model).to(getattr(torch, args.dtype)))
    else:
        as_given = copy.deepcopy(policy)
        value_model = _of_language_model(
            as_given.merge_and_unload() if hasattr(as_given, "merge_and_unload") else as_given
        )
    value_model.requires_grad_(True)
    if args.use_peft:
        value_model.body = models.add_adapter(value_model.body, args)
    models.disable_dropout(value_model.body)
    value_model.train(args.gradient_checkpointing)
    if args.gradient_checkpointing:
        models.recompute_activations(value_model.body)
    return value_model


def _of_classifier(model: Any) -> ValueModel:
    head = next(module for module in model.children() if isinstance(module, nn.Linear))
    return ValueModel(model.base_model, head)


def _of_language_model(model: Any) -> ValueModel:
    # Not the config's hidden size: what the last layer gives may be projected first (OPT).
    head = nn.Linear(model.get_output_embeddings().weight.shape[1], 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return ValueModel(model.base_model, head.to(model.device))


def _require_same_tokens(theirs: Any, ours: Any, source: str, args: ReMaxConfig) -> None:
    vocabulary = theirs.get_vocab()
    if any(vocabulary.get(token) != token_id for token, token_id in ours.get_vocab().items()):
        setting = f"--value_model is {source}" if args.value_model else f"--value_model is not set and {source} is used"
        raise UserError(
            f"{setting}: its tokenizer gives other ids than that of --model, so its values would be of other texts; "
            "set a --value_model with the policy's tokenizer, such as the policy itself."
        )

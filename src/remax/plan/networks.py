"""Networks in numbers: parameters, shapes and widths, of real models or of models without weights (device meta)."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from remax import models, precision
from remax.components import Components
from remax.config import ReMaxConfig
from remax.critic import ValueModel
from remax.errors import UserError
from remax.rewards import RewardModel


@dataclass(frozen=True)
class TrainedTensor:
    """A weight that is trained."""

    shape: tuple[int, ...]
    always_float32: bool
    """Whatever --dtype: adapters and a value head."""

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Counts:
    """A network in numbers of parameters."""

    parameters: int
    trained_tensors: tuple[TrainedTensor, ...]
    castable: int
    """Held in bfloat16 where the network is frozen and --bf16 is set."""
    linear: int
    """Multiplied with every token."""
    trained_linear: int
    head: int
    """Of the language-model head, multiplied with completion tokens only."""
    embedding: int
    """Of the input embedding, of which a token reads one row."""

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(tensor.elements for tensor in self.trained_tensors)

    @property
    def always_float32(self) -> int:
        """Those of them that are float32 whatever --dtype."""
        return sum(tensor.elements for tensor in self.trained_tensors if tensor.always_float32)


@dataclass(frozen=True)
class Widths:
    """A transformer's config in numbers."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    """heads x head_dim"""
    keys: int
    """key-value heads x head_dim"""
    vocabulary: int

    @classmethod
    def of(cls, network: Any) -> "Widths":
        """Reads the config of a model."""
        config = network.config.get_text_config()
        hidden, heads = config.hidden_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        names = ("intermediate_size", "ffn_dim", "n_inner")
        intermediate = next((getattr(config, name) for name in names if getattr(config, name, None)), 4 * hidden)
        return cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            intermediate=intermediate,
            queries=heads * head_dim,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
            vocabulary=config.vocab_size,
        )


@dataclass(frozen=True)
class Network:
    """What formulas need to know of a network."""

    counts: Counts
    widths: Widths


def measure_networks(networks: Mapping[str, nn.Module], args: ReMaxConfig) -> dict[str, Network]:
    """Returns networks in numbers, by name: policy, reference, reward, reward_2, gold, value."""
    return {
        name: Network(
            count_network(name, network, args),
            Widths.of(network.body if isinstance(network, ValueModel) else network),
        )
        for name, network in networks.items()
    }


def networks_of(parts: Components, value_model: nn.Module | None = None) -> dict[str, nn.Module]:
    """Returns the networks of a run that hold weights of their own, by name."""
    found: dict[str, nn.Module] = {"policy": parts.policy}
    if parts.reference is not None and parts.reference.model is not parts.policy:
        found["reference"] = parts.reference.model
    learned = [function for function in parts.reward_functions if isinstance(function, RewardModel)]
    for number, function in enumerate(learned, start=1):
        found["reward" if number == 1 else f"reward_{number}"] = function.model
    if value_model is not None:
        found["value"] = value_model
    return found


def head(network: Any) -> Any:
    """Returns the language-model head of a network, or None."""
    return network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None


def count_network(name: str, network: nn.Module, args: ReMaxConfig) -> Counts:
    """Returns a network in numbers of parameters; tied weights count once."""
    own_head = head(network)
    linear = [m for m in network.modules() if isinstance(m, nn.Linear | Conv1D) and m is not own_head]
    castable = precision.castable_layers(network)
    scalar_head = {id(p) for p in network.head.parameters()} if isinstance(network, ValueModel) else set()
    is_trained = name in ("policy", "value")
    body: Any = network.body if isinstance(network, ValueModel) else network
    return Counts(
        parameters=sum(p.numel() for p in network.parameters()),
        trained_tensors=tuple(
            TrainedTensor(tuple(p.shape), args.use_peft or id(p) in scalar_head)
            for p in network.parameters()
            if p.requires_grad and is_trained
        ),
        castable=sum(p.numel() for layer in castable for p in layer.parameters()),
        linear=sum(m.weight.numel() for m in linear),
        trained_linear=sum(m.weight.numel() for m in linear if m.weight.requires_grad),
        head=own_head.weight.numel() if own_head is not None else 0,
        embedding=body.get_input_embeddings().weight.numel(),
    )


# From configs alone ---------------------------------------------------------------------------------------------------


def networks_of_configs(
    model: Any, reward_model: Any, args: ReMaxConfig, value_model: Any = None, gold_model: Any = None
) -> dict[str, nn.Module]:
    """Returns the networks that a run would hold, on the meta device: they have shapes and no weights.

    Args:
        model: the policy's config.
        reward_model: that of the reward model; None if functions give the reward.
        args: the settings of the run.
        value_model: what PPO's value model starts from; by default the reward model, and the policy without one.
        gold_model: that of a reward model for evaluations.

    Raises:
        UserError: a config is none of a language model.
    """
    build, classify = AutoModelForCausalLM, AutoModelForSequenceClassification
    policy = _on_meta(build, model, flag="--model")
    networks = {"policy": models.add_adapter(policy, args) if args.use_peft else policy}
    if args.needs_reference and not args.use_peft:
        networks["reference"] = _on_meta(build, model, flag="--model").requires_grad_(False)
    if reward_model is not None:
        networks["reward"] = _on_meta(classify, reward_model, flag="--reward_model").requires_grad_(False)
    if gold_model is not None:
        networks["gold"] = _on_meta(classify, gold_model, flag="--gold_reward_model").requires_grad_(False)
    if args.method == "ppo":
        source, flag = (value_model, "--value_model") if value_model is not None else (reward_model or model, "--model")
        body = _on_meta(classify, source, flag=flag).base_model
        with torch.device("meta"):
            # Not the config's hidden size: what the last layer gives may be projected first (OPT).
            width = getattr(source.get_text_config(), "word_embed_proj_dim", source.get_text_config().hidden_size)
            value = ValueModel(body, nn.Linear(width, 1))
            value.body = models.add_adapter(body, args) if args.use_peft else body
        networks["value"] = value
    return networks


def read_config(name_or_path: str, *, flag: str) -> Any:
    """Returns the config of a folder, a config.json or a hub name; reads no weights.

    Raises:
        UserError: there is none.
    """
    path = Path(name_or_path)
    if not path.is_file():
        models.check_model_exists(name_or_path, flag=flag)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{flag} is {name_or_path}: that is an adapter without its model; set its base model.")
    try:
        with models.quiet():
            return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{flag} is {name_or_path}: its config could not be read ({models.short_reason(error)}); set a folder with "
            "a config.json, such a file, or the name of a model on the hub."
        ) from error


def _on_meta(auto_class: Any, config: Any, *, flag: str) -> Any:
    config = copy.deepcopy(config)
    if auto_class is AutoModelForSequenceClassification:
        config.num_labels = 1
    try:
        with torch.device("meta"), models.quiet():
            return auto_class.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise UserError(
            f"{flag} is of type {config.model_type}: its network could not be built "
            f"({models.short_reason(error)}); set a causal language model's config."
        ) from error

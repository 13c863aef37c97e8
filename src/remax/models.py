"""Models: loading policies and reward models, adapters, the reference, and dropout; saving.py writes them.

A user's mistake shows before any weights are read wherever the files tell it.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from remax.config import ModelOptions
from remax.errors import UserError
from remax.untrusted import shown

T = TypeVar("T")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OUTPUTS = ("model", "best_model")
"""The folders that a run leaves with models."""
PAD_TOKEN = "<|pad|>"


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers and peft (progress bars, reports on new heads): what matters is an error of ours."""
    logging = transformers.utils.logging
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # peft and TRL use names that transformers gave up; peft corrects itself for GPT-2's layers.
            warnings.filterwarnings("ignore", message=r"`(is_)?gradient_checkpointing\w*` is deprecated")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def short_reason(error: Exception) -> str:
    """Returns the first line of an error's message, short enough for a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown(lines[0] if lines else type(error).__name__, 200).rstrip(".: ")


# Loading --------------------------------------------------------------------------------------------------------------


def check_model_exists(name_or_path: str, *, flag: str) -> None:
    """Raises UserError if a model cannot be there, without reading it: the cheap check before anything else.

    A folder must hold a model or an adapter, and what can only be a path must exist. Whether a name exists on the
    Hugging Face hub shows when it is loaded.
    """
    path = Path(name_or_path)
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:  # too long, or not allowed
        raise UserError(f"{flag} is {shown(name_or_path)}: {error.strerror}; set the path of a model.") from None
    if is_folder:
        if not any((path / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
            inside = path / "model"
            advice = str(inside) if (inside / "config.json").exists() else "a folder in Hugging Face format"
            raise UserError(
                f"{flag} is {shown(name_or_path)}: that folder holds no model (no config.json); set {shown(advice)}."
            )
    elif is_there:
        raise UserError(f"{flag} is {shown(name_or_path)}: that is a file; set the folder that holds the model.")
    elif not name_or_path.strip():
        raise UserError(f"{flag} is empty: there is no model to load; set a folder or a hub name (owner/name).")
    elif (
        name_or_path.startswith((".", "/", "~"))
        or name_or_path.endswith("/")
        or name_or_path.count("/") > 1
        # What a run leaves, or something beside it: no name on the hub.
        or ("/" in name_or_path and (path.name in OUTPUTS or (path.parent / "model").is_dir()))
    ):
        beside = [name for name in OUTPUTS if (path.parent / name).is_dir()]
        advice = f"did you mean {shown(path.parent / beside[0])}" if beside else "set the path of a model"
        raise UserError(f"{flag} is {shown(name_or_path)}: there is no such folder; {advice}.")


def load_tokenizer(name_or_path: str, *, flag: str) -> Any:
    """Returns the tokenizer beside a model; an adapter's folder without one gives that of its base.

    Raises:
        UserError: there is none that can be loaded.
    """
    if _is_adapter(name_or_path) and not (Path(name_or_path) / "tokenizer_config.json").exists():
        name_or_path = _adapter_base(name_or_path, flag)
    return _load("tokenizer", name_or_path, flag, lambda: AutoTokenizer.from_pretrained(name_or_path, **_SAFE))


def load_policy(name_or_path: str, config: ModelOptions, *, flag: str) -> Any:
    """Returns a causal language model as config wants it: a PreTrainedModel, or a PeftModel with a new LoRA adapter.

    A folder with an adapter gives its base model with the adapter merged, also under config.use_peft: the reference,
    which is the model with the new adapter off, is then the policy as it was given. New adapters draw from torch's
    global generator.

    Raises:
        UserError: it cannot be loaded, is a reward model, or lacks weights that would be random.
    """
    base = _adapter_base(name_or_path, flag) if _is_adapter(name_or_path) else name_or_path
    architectures = _load_config(base, flag).architectures or []
    if any("ForSequenceClassification" in name for name in architectures):
        raise UserError(
            f"{flag} is {name_or_path}: that is a reward model ({architectures[0]}), which cannot write; "
            "set a language model."
        )
    kwargs = {"dtype": getattr(torch, config.dtype), "attn_implementation": config.attn_implementation}
    model = _load_weights(AutoModelForCausalLM, base, flag, **kwargs)
    if base != name_or_path:
        _require_safe_adapter(name_or_path, flag)
        adapted = _load("adapter", name_or_path, flag, lambda: PeftModel.from_pretrained(model, name_or_path))
        model = adapted.merge_and_unload()
    return add_adapter(model, config) if config.use_peft else model


def is_reward_model(name_or_path: str, *, flag: str) -> bool:
    """Whether a checkpoint is a sequence classification model."""
    return "ForSequenceClassification" in ((_load_config(name_or_path, flag).architectures or [""])[0])


def require_reward_model(name_or_path: str, *, flag: str) -> None:
    """Raises UserError unless a checkpoint is a sequence classification model with one label; reads no weights."""
    refuse_adapter(name_or_path, flag=flag)
    config = _load_config(name_or_path, flag)
    architecture = (config.architectures or ["unknown architecture"])[0]
    advice = "train one with `remax reward` and set its folder"
    if "ForSequenceClassification" not in architecture:
        raise UserError(
            f"{flag} is {name_or_path}: a plain language model ({architecture}, num_labels {config.num_labels}) has no "
            f"reward head, so every reward would be random; {advice}."
        )
    if config.num_labels != 1:
        raise UserError(
            f"{flag} is {name_or_path}: it has {config.num_labels} labels ({architecture}), and a reward model has "
            f"one; {advice}."
        )


def load_reward_model(name_or_path: str, *, flag: str, dtype: torch.dtype = torch.float32) -> Any:
    """Returns a trained sequence classification model with one label, in evaluation mode and frozen.

    Raises:
        UserError: it cannot be loaded, has not one label or no trained head; told before its weights are read.
    """
    require_reward_model(name_or_path, flag=flag)
    model = _load_weights(AutoModelForSequenceClassification, name_or_path, flag, dtype=dtype)
    return model.requires_grad_(False).eval()


def new_reward_model(name_or_path: str, config: ModelOptions, tokenizer: Any, *, seed: int, flag: str) -> Any:
    """Returns a sequence classification model with one label to train, without dropout but LoRA's.

    Its head is drawn from the seed, unless the checkpoint is a reward model already. See `give_own_pad_token` for
    what happens to the tokenizer. A LoRA adapter trains the head in full.

    Raises:
        UserError: it cannot be loaded, or lacks weights beside the head.
    """
    refuse_adapter(name_or_path, flag=flag)
    kwargs = {"dtype": getattr(torch, config.dtype), "attn_implementation": config.attn_implementation}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _load_weights(
            AutoModelForSequenceClassification, name_or_path, flag, new_head=True, num_labels=1, **kwargs
        )
    give_own_pad_token(model, tokenizer)
    disable_dropout(model)
    return add_adapter(model, config) if config.use_peft else model


def give_own_pad_token(model: Any, tokenizer: Any) -> None:
    """Gives tokenizer and model, in place, a pad token that is neither EOS nor BOS.

    A sequence classification model reads its scalar at the last token that differs from the pad token. If that were
    EOS, the score would be read before it: a finished completion and one that was cut would get the same reward.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            with quiet():
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def refuse_adapter(name_or_path: str, *, flag: str) -> None:
    """Raises UserError if the folder holds a bare adapter, which has no place for a reward head."""
    if _is_adapter(name_or_path) and not (Path(name_or_path) / "config.json").exists():
        raise UserError(
            f"{flag} is {name_or_path}: that is an adapter without its model; merge it into its base model and set "
            "the folder with the result."
        )


_SAFE = {"trust_remote_code": False}
"""Said explicitly, since transformers would ask on the terminal, in the middle of a script."""


def _load(what: str, name_or_path: str, flag: str, load: Callable[[], T]) -> T:
    try:
        with quiet():
            return load()
    except UserError:
        raise
    except Exception as error:
        if "custom code" in str(error):
            raise UserError(
                f"{flag} is {shown(name_or_path)}: its {what} needs Python code that comes with the model, which is "
                "never run here; set a model of an architecture that transformers has."
            ) from error
        raise UserError(
            f"{flag} is {shown(name_or_path)}: its {what} could not be loaded ({short_reason(error)}); set a folder in "
            "Hugging Face format or the name of a model on the hub."
        ) from error


def _load_config(name_or_path: str, flag: str) -> Any:
    return _load("config.json", name_or_path, flag, lambda: AutoConfig.from_pretrained(name_or_path, **_SAFE))


def _load_weights(auto_class: Any, name_or_path: str, flag: str, *, new_head: bool = False, **kwargs: Any) -> Any:
    """Returns the model, having made sure that the checkpoint has all of its weights (but for a new head's)."""
    model, info = _load(
        "model",
        name_or_path,
        flag,
        # Without use_safetensors, pickled weights would be read where there are no others.
        lambda: auto_class.from_pretrained(
            name_or_path, output_loading_info=True, use_safetensors=True, **kwargs, **_SAFE
        ),
    )
    body = f"{model.base_model_prefix}." if new_head else ""
    if missing := sorted(name for name in info["missing_keys"] if name.startswith(body)):
        raise UserError(
            f"{flag} is {name_or_path}: it lacks weights of a {type(model).__name__} ({missing[0]}, {len(missing)} in "
            "all), which would be random; set a complete model."
        )
    return model


def _is_adapter(name_or_path: str) -> bool:
    return (Path(name_or_path) / ADAPTER_CONFIG).is_file()


def _adapter_base(name_or_path: str, flag: str) -> str:
    config = _load("adapter", name_or_path, flag, lambda: PeftConfig.from_pretrained(name_or_path))
    return str(config.base_model_name_or_path)


def _require_safe_adapter(folder: str, flag: str) -> None:
    """Raises UserError unless an adapter's weights are safetensors and can be merged: peft would read a pickle too."""
    if not (Path(folder) / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"{flag} is {shown(folder)}: that adapter has no {ADAPTER_WEIGHTS}, and pickled weights are not read; save "
            "it anew with a current peft."
        )
    config = _load("adapter", folder, flag, lambda: PeftConfig.from_pretrained(folder))
    if config.is_prompt_learning or getattr(config, "megatron_config", None):
        raise UserError(
            f"{flag} is {shown(folder)}: an adapter of type {shown(config.peft_type)} is no change of weights that "
            "could be merged; set one such as LoRA."
        )


# Changing -------------------------------------------------------------------------------------------------------------


def add_adapter(model: Any, config: ModelOptions) -> Any:
    """Returns the model with a new LoRA adapter, whose effect is zero at first; everything else is frozen.

    Raises:
        UserError: --lora_target_modules names no module, or the output embedding.
    """
    classifier = "ForSequenceClassification" in type(model).__name__
    task_type = "SEQ_CLS" if classifier else "CAUSAL_LM" if model.can_generate() else "FEATURE_EXTRACTION"
    lora = LoraConfig(
        task_type=task_type,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or "all-linear",
    )
    try:
        with quiet():
            adapted = get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(
            f"--lora_target_modules is {config.lora_target_modules}: no adapter can be added ({short_reason(error)}); "
            "set names of linear layers, or leave it out for all of them."
        ) from error
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            f"--lora_target_modules is {config.lora_target_modules}: that includes the output embedding, which many "
            "models share with the input embedding, so its adapter could not be merged; leave that layer out."
        )
    return adapted


def adapter_is_new(policy: Any) -> bool:
    """Whether the model with its LoRA adapter is the model without: all B matrices are still zero."""
    matrices = [parameter for name, parameter in policy.named_parameters() if "lora_B" in name]
    return bool(matrices) and not any(parameter.any() for parameter in matrices)


def recompute_activations(model: Any) -> None:
    """Has the model keep few activations for the backward pass, which computes the others again."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # transformers before it renamed this, which then warned of the old name
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def copy_as_reference(policy: nn.Module) -> Any:
    """Returns a frozen copy of the policy as it is now, in evaluation mode: pi_ref of the KL (section 2.1)."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


def disable_dropout(model: nn.Module) -> None:
    """Turns all dropout off in place, so that train mode, which gradient checkpointing needs, equals eval mode.

    The model's config stays as it is, since it is saved with the model.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)
        # Some architectures (Falcon, GPT-J) read the probability from the config in each forward pass.
        config = vars(module).get("config")
        if hasattr(config, "to_dict") and not isinstance(module, PreTrainedModel):
            module.config = configs.setdefault(id(config), _without_dropout(config))


def _without_dropout(config: Any) -> Any:
    changed = {name: 0.0 for name, value in vars(config).items() if isinstance(value, float) and "drop" in name}
    if not any(vars(config)[name] for name in changed):
        return config
    config = copy.copy(config)
    vars(config).update(changed)
    return config

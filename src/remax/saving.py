"""Models in Hugging Face format: written whole or not at all, with adapters merged."""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import GenerationConfig

from remax.checkpoint.files import sync, sync_tree
from remax.models import quiet


def save_model(
    model: Any, tokenizer: Any, folder: Path | str, *, eos_token_ids: Sequence[int] = (), card: str | None = None
) -> None:
    """Writes a model and its tokenizer in Hugging Face format; a former one in the folder is replaced at the end.

    `from_pretrained` reads the folder without peft: adapters are merged into the weights that are written, and are
    themselves in folder/adapter. The model in memory is not touched. eos_token_ids: what ends a completion, for the
    generation config of a language model. card: the text of its README.md.

    Raises:
        OSError: the disk is full or broken; a former model in the folder is as it was.
    """
    folder = Path(folder)
    partial, former = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "former"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with quiet():
            _whole_copy(model, tokenizer, eos_token_ids).save_pretrained(partial)
            _save_tokenizer(tokenizer, partial)
            if isinstance(model, PeftModel):
                model.save_pretrained(str(partial / "adapter"), save_embedding_layers=False)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        sync_tree(partial)
        if folder.exists():
            shutil.rmtree(former, ignore_errors=True)
            folder.rename(former)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if "os error" in str(error):  # What tokenizers makes of an error of the system: a plain Exception.
            raise OSError(str(error)) from error
        raise


def _whole_copy(model: Any, tokenizer: Any, eos_token_ids: Sequence[int]) -> Any:
    """Returns a model to be saved: a shell without adapters or patches around the same or the merged tensors."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.device("meta"):
        shell = type(base)(copy.deepcopy(base.config))
    shell.load_state_dict(merged_state_dict(base), assign=True)
    shell.tie_weights()
    if shell.can_generate():
        shell.generation_config = _generation_config(base.generation_config, tokenizer, eos_token_ids)
    return shell


def merged_state_dict(base: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of a model as if the active adapters in it were merged, under the names they have without.

    Layer by layer on copies: merging in place and back again would leave rounding errors in the model.
    """
    wrappers = {n: m for n, m in base.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)}
    prefixes = tuple(f"{name}." for name in wrappers)
    state = {name: tensor for name, tensor in base.state_dict().items() if not name.startswith(prefixes)}
    for name, wrapper in wrappers.items():
        if isinstance(wrapper, BaseTunerLayer):
            merged = copy.deepcopy(wrapper)
            merged.merge()
            layer = merged.get_base_layer()
        else:
            layer = wrapper.modules_to_save[wrapper.active_adapter]
        # On the CPU, where there is room for a second set of weights.
        state.update({f"{name}.{key}": tensor.cpu() for key, tensor in layer.state_dict().items()})
    return state


def _generation_config(current: Any, tokenizer: Any, eos_token_ids: Sequence[int]) -> Any:
    ids = list(eos_token_ids)
    named = {"eos_token_id": ids[0] if len(ids) == 1 else ids} if ids else {}
    named |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = copy.deepcopy(current)
    config.update(**named)
    try:
        config.validate(strict=True)
    except ValueError:
        # Published checkpoints have contradictory sampling settings, with which a changed config cannot be saved.
        config = GenerationConfig(**named)
    return config

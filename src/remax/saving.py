"""Models in Hugging Face format: written whole or not at all, with adapters merged."""

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import GenerationConfig

from remax.checkpoint.files import give_usual_rights, sync, sync_tree
from remax.models import quiet
from remax.sharding import kept, whole


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path | str,
    *,
    eos_token_ids: Sequence[int] = (),
    card: str | None = None,
    on_main: Callable[[Callable[[], None]], object] = lambda write: write(),
    is_main: bool = True,
) -> None:
    """Writes a model and its tokenizer in Hugging Face format; a former one in the folder is replaced at the end.

    `from_pretrained` reads the folder without peft: adapters are merged into the weights that are written, and are
    themselves in folder/adapter. The model in memory is not touched. eos_token_ids: what ends a completion, for the
    generation config of a language model. card: the text of its README.md. on_main: where several processes call this,
    each of which may hold a part of the weights, lets one of them write; is_main: whether that is this one.

    Raises:
        OSError: the disk is full or broken; a former model in the folder is as it was.
    """
    with quiet():
        merged = _whole_copy(model, tokenizer, eos_token_ids, is_main=is_main)
    adapter = {}
    if isinstance(model, PeftModel):
        own = ((name, whole(p)) for name, p in model.state_dict(keep_vars=True).items())
        adapter = kept(model, own, keeps=is_main)

    def fill(partial: Path) -> None:
        with quiet():
            merged.save_pretrained(partial)
            _save_tokenizer(tokenizer, partial)
            if adapter:
                model.save_pretrained(str(partial / "adapter"), save_embedding_layers=False, state_dict=adapter)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")

    on_main(lambda: _replace(Path(folder), fill))


def _replace(folder: Path, fill: Callable[[Path], None]) -> None:
    """Puts what fill writes in a folder's place, once all of it is on the disk."""
    partial, former = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "former"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        give_usual_rights(partial)
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


def _whole_copy(model: Any, tokenizer: Any, eos_token_ids: Sequence[int], *, is_main: bool) -> Any:
    """Returns a model to be saved: a shell without adapters or patches around the same or the merged tensors.

    Nothing where it is not saved: there it only helps gathering.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    weights = kept(base, merged_weights(base), keeps=is_main)
    if not is_main:
        return None
    with torch.device("meta"):
        shell = type(base)(copy.deepcopy(base.config))
    shell.load_state_dict(weights, assign=True)
    shell.tie_weights()
    if shell.can_generate():
        shell.generation_config = _generation_config(base.generation_config, tokenizer, eos_token_ids)
    return shell


def merged_weights(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of a model as if the active adapters in it were merged, under the names they have without.

    Layer by layer on copies: merging in place and back again would leave rounding errors in the model. Where processes
    hold parts of the weights, what is yielded is whole, and all of them have to ask for it.
    """
    wrappers = {n: m for n, m in base.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)}
    prefixes = tuple(f"{name}." for name in wrappers)
    own = base.state_dict(keep_vars=True).items()
    yield from ((name, whole(t)) for name, t in own if not name.startswith(prefixes))
    for name, wrapper in wrappers.items():
        if isinstance(wrapper, BaseTunerLayer):
            memo = {id(p): nn.Parameter(whole(p).clone(), p.requires_grad) for p in wrapper.parameters()}
            merged = copy.deepcopy(wrapper, memo)
            merged.merge()
            layer = merged.get_base_layer()
        else:
            layer = wrapper.modules_to_save[wrapper.active_adapter]
        # On the CPU, where there is room for a second set of weights.
        yield from ((f"{name}.{key}", whole(tensor).cpu()) for key, tensor in layer.state_dict().items())


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

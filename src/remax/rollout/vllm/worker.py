"""What runs inside vLLM's workers, as its `worker_extension_cls`: a worker gets these methods beside its own.

Imports nothing of vLLM, and is imported by its workers alone.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


class TakesWeights:
    """Methods for LLM.collective_rpc."""

    reload_weights: Any
    """Of the worker."""
    model_runner: Any

    def remax_load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Puts weights, named as in a checkpoint, in the place of the worker's own. For a worker in this process."""
        self.reload_weights(weights_iterator=weights)
        _refresh_tied_head(self.model_runner.get_model())

    def remax_load_files(self, folder: str) -> None:
        """Likewise from a folder of safetensors files, which every worker reads for itself."""
        self.remax_load(_read(Path(folder)))


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a handle, no mapping
                yield name, file.get_tensor(name)


def _refresh_tied_head(model: Any) -> None:
    """Lets a head that shares the embedding's weights see the new ones.

    On CPUs it has a packed copy of its own, which a reload leaves as it was.
    """
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    head = getattr(model, "lm_head", None)
    if head is not None and embedding is not None and getattr(head, "weight", None) is embedding.weight:
        head.quant_method.process_weights_after_loading(head)

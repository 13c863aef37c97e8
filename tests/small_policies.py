"""A small policy, in memory and in a folder, and how it is compared."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from remax.config import ModelOptions
from remax.saving import save_model
from tiny_models import tiny_model
from toy_tokenizers import EOS, VOCAB_SIZE, toy_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
LORA = ModelOptions(use_peft=True, lora_r=4, lora_alpha=8)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_close(first: torch.Tensor, second: torch.Tensor) -> None:
    assert (first - second).abs().max() < 1e-4 * second.abs().max()


def stir(model: nn.Module) -> None:
    """Gives LoRA's second matrices, which start at zero, values that show."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)


def saved(model: Any, folder: Path, **kwargs: Any) -> str:
    save_model(model, toy_tokenizer(), folder, **kwargs)
    return str(folder)


@pytest.fixture
def policy() -> Any:
    return tiny_model("llama", vocab_size=VOCAB_SIZE)


@pytest.fixture
def folder(policy: Any, tmp_path: Path) -> str:
    return saved(policy, tmp_path / "policy", eos_token_ids=[EOS])

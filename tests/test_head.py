"""The head's own backward pass against autograd's."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

from remax import head
from remax.batching import collate
from remax.head import gradients_in_place
from remax.interfaces import Sampling
from remax.logprobs import CompletionScorer
from test_logprobs import CPU, PLAIN, completions
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_model
from toy_training import make_trainer

HEADS: dict[str, dict[str, Any]] = {
    "float64": {"dtype": torch.float64},
    "float32": {},
    "bfloat16 autocast": {"autocast": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "tied": {"tied": True, "dtype": torch.float64},
    "frozen head": {"frozen": True, "dtype": torch.float64},
}


@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("num_chunks", [1, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_head_s_own_backward_pass_is_autograd_s(case: dict[str, Any], num_chunks: int, temperature: float) -> None:
    """The general path, with recomputation by autograd, is the oracle; and the fast one is really taken."""
    sampling = Sampling(8, (), temperature=temperature)
    batch = collate(completions(), 0, CPU)
    model = tiny_model("llama", tie_word_embeddings=case.get("tied", False)).to(case.get("dtype", torch.float32))
    model.lm_head.weight.requires_grad_("frozen" not in case)
    num_tokens = int(batch.completion_mask.sum())
    scorer = CompletionScorer(model, chunk_elements=math.ceil(num_tokens / num_chunks) * model.config.vocab_size)
    assert scorer.has_plain_head
    weights = torch.linspace(-1, 1, batch.completion_mask.numel()).view(batch.completion_mask.shape)
    results = []
    for fast in (True, False):
        scorer.has_plain_head = fast
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in case):
            stats = scorer(batch, sampling)
        assert ("HeadLogprobs" in str(stats.logprobs.grad_fn.next_functions)) == fast
        (stats.logprobs * weights).sum().backward()
        results.append((stats, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (stats, gradients), (expected_stats, expected) = results
    assert torch.equal(stats.logprobs, expected_stats.logprobs)
    torch.testing.assert_close(stats.entropies, expected_stats.entropies, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    lowest = torch.bfloat16 if "autocast" in case else case.get("dtype", torch.float32)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[lowest]
    for name, gradient in gradients.items():
        assert expected[name].norm() > 1e-3
        assert (gradient - expected[name]).norm() / expected[name].norm() < tolerance, name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_that_do_more_than_multiply_are_left_to_autograd(name: str) -> None:
    model = tiny_model(name)
    head = model.get_output_embeddings()
    more = head.bias is not None or getattr(model.config, "final_logit_softcapping", None)
    assert CompletionScorer(model).has_plain_head == (not more)


def test_an_adapted_or_hooked_head_is_left_to_autograd() -> None:
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["lm_head"], r=2))
    assert not CompletionScorer(adapted).has_plain_head
    hooked = tiny_model("llama")
    hooked.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
    assert not CompletionScorer(hooked).has_plain_head


@pytest.mark.parametrize("name", ["cohere", "granite"])
def test_scaled_logits_are_left_to_autograd(name: str) -> None:
    classes = {"cohere": (CohereConfig, {"logit_scale": 0.5}), "granite": (GraniteConfig, {"logits_scaling": 4.0})}
    config_class, own = classes[name]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = config_class(vocab_size=VOCAB_SIZE, num_key_value_heads=2, pad_token_id=None, **sizes, **own)
    scorer = CompletionScorer(AutoModelForCausalLM.from_config(config))
    assert scorer.knows_head
    assert not scorer.has_plain_head


def test_truncated_sampling_and_the_exact_kl_are_left_to_autograd() -> None:
    scorer, batch = CompletionScorer(tiny_model("llama")), collate(completions(), 0, CPU)
    reference = CompletionScorer(tiny_model("llama"))
    for stats in (scorer(batch, Sampling(8, (), top_p=0.9)), scorer(batch, PLAIN, reference)):
        assert "HeadLogprobs" not in str(stats.logprobs.grad_fn.next_functions)


class Made(TorchDispatchMode):
    """Notes the operations that make a tensor of a shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.operations = shape, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape and "zeros" in str(func):
            self.operations.append(str(func))
        return result


@pytest.mark.parametrize("case", ["float64", "bfloat16 autocast", "tied", "frozen head"])
def test_a_gradient_that_is_there_is_added_to_in_place(case: str) -> None:
    settings = HEADS.get(case, {"dtype": torch.float64})
    batch, sampling = collate(completions(), 0, CPU), Sampling(8, ())
    model = tiny_model("llama", tie_word_embeddings=settings.get("tied", False))
    model.to(settings.get("dtype", torch.float32)).lm_head.weight.requires_grad_("frozen" not in settings)
    scorer = CompletionScorer(model)
    gradients, made = [], []
    for in_place in (False, True):
        model.zero_grad()
        with gradients_in_place() if in_place else nullcontext():
            for factor in (1.0, -3.0, 0.5):
                with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in settings):
                    loss = factor * scorer(batch, sampling).logprobs.sum()
                with Made(model.lm_head.weight.shape) as mode:
                    loss.backward()
                made.append(len(mode.operations))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    tolerance = 1e-2 if "autocast" in settings else 1e-12
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= tolerance * expected.norm(), name
    if "frozen" not in settings:
        assert made[:3] == [made[0]] * 3
        assert made[3] == made[0]
        assert made[4] == made[5] == made[0] - 1


def test_an_update_lets_gradients_be_added_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, micro_batch_tokens=1)
    seen = []
    forward = head.head_logprobs
    monkeypatch.setattr(
        head, "head_logprobs", lambda *a, **k: seen.append(head._adds_to_grad.get()) or forward(*a, **k)
    )
    trainer.step(trainer.order.batch(1), 1)
    assert len(seen) > 2
    assert all(seen)
    assert not head._adds_to_grad.get()

"""--torch_compile: the compiled body gives the loss and the gradients of the plain one, and nobody else notices.

The quick tests trace and differentiate as torch.compile does, but run torch's own kernels (backend aot_eager).
"""

import copy
import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from remax.batching import Batch, collate
from remax.compilation import check_compiler, compile_layers
from remax.errors import UserError
from remax.interfaces import Completion, Prompt, Sampling
from remax.logprobs import CompletionScorer
from tiny_models import VOCAB_SIZE, tiny_model

SAMPLING = Sampling(16, ())
SHAPES = [[(3, 5), (9, 2), (4, 4)], [(2, 12), (6, 4)], [(5, 9), (1, 3), (2, 2), (7, 8)]]
"""Lengths of prompt and completion, for micro-batches of different numbers of rows and tokens."""


def batches(shapes: list[list[tuple[int, int]]]) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)

    def completion(num_prompt: int, num_tokens: int) -> Completion:
        ids = torch.randint(VOCAB_SIZE, (num_prompt + num_tokens,), generator=generator).tolist()
        return Completion(Prompt(0, "", ids[:num_prompt]), 0, ids[num_prompt:], [], truncated=False)

    return [collate([completion(*lengths) for lengths in rows], 0, torch.device("cpu")) for rows in shapes]


def loss_and_gradients(model: Any, shapes: list[list[tuple[int, int]]], *, compiled: bool) -> list[Tensor]:
    """Returns the sum of log-probabilities over micro-batches, and its gradients."""
    model = copy.deepcopy(model)
    if compiled:
        compile_layers(model)
    scorer = CompletionScorer(model)
    total = torch.zeros(())
    for batch in batches(shapes):
        loss = scorer(batch, SAMPLING).logprobs.sum()
        loss.backward()
        total = total + loss.detach()
    return [total, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_alike(model: Any, shapes: list[list[tuple[int, int]]] = SHAPES) -> None:
    compiled, plain = (loss_and_gradients(model, shapes, compiled=flag) for flag in (True, False))
    assert len(compiled) == len(plain) > 4
    for ours, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Has torch.compile trace without generating code, and notes the graphs that it makes."""
    made: list[Any] = []
    compile_for_real = torch.compile
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(compile_for_real, backend=backend))
    return made


def attention_of(graph: Any) -> list[dict[str, Any]]:
    """Returns the keywords of the attention kernels in a graph."""
    return [dict(node.kwargs) for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]


def test_loss_and_gradients_are_the_same_from_one_graph_for_all_layers(graphs: list[Any]) -> None:
    assert_alike(tiny_model("llama", num_hidden_layers=3))
    assert len(graphs) <= 2, "of the first shape, and of all others"


def test_attention_needs_no_mask(graphs: list[Any]) -> None:
    assert_alike(tiny_model("llama", num_hidden_layers=1))
    attention = [own for graph in graphs for own in attention_of(graph)]
    assert attention
    assert all(own["attn_mask"] is None and own["is_causal"] for own in attention)


@pytest.mark.slow
def test_with_gradient_checkpointing(graphs: list[Any]) -> None:
    model = tiny_model("llama", num_hidden_layers=1).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_alike(model)
    assert graphs


@pytest.mark.slow
def test_with_an_adapter_that_is_switched_off_in_between(graphs: list[Any]) -> None:
    model = get_peft_model(
        tiny_model("llama", num_hidden_layers=1), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    plain = CompletionScorer(copy.deepcopy(model))
    compile_layers(model)
    policy, reference = CompletionScorer(model), CompletionScorer(model, adapters=False)
    for batch in batches(SHAPES[:2]):
        with torch.no_grad():
            other = reference(batch, SAMPLING).logprobs
        ours = policy(batch, SAMPLING).logprobs
        torch.testing.assert_close(ours, plain(batch, SAMPLING).logprobs, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours, other, atol=1e-2)
    assert graphs


def test_nobody_else_notices(graphs: list[Any]) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    names = list(model.state_dict())
    compile_layers(model)
    scorer = CompletionScorer(model)
    with torch.no_grad():
        model(torch.arange(5).unsqueeze(0))
    assert not graphs, "rollouts run the model as it was"
    assert [name.removeprefix("model.") for name in scorer.state_dict()] == names
    scorer(batches(SHAPES[:1])[0], SAMPLING)
    assert graphs
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_as_it_is_compiled() -> None:
    try:
        check_compiler("", instead="")
    except UserError as error:
        pytest.skip(f"torch.compile: {error}")
    torch._dynamo.reset()
    assert_alike(tiny_model("llama"), [*SHAPES, [(3, 6)]])

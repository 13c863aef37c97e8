"""The scorer against plain forward passes of single unpadded sequences, over many architectures."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from remax.batching import collate, split_by_tokens
from remax.interfaces import Completion, Prompt, Sampling
from remax.logprobs import CompletionScorer, warp_logits
from remax.rollout.embedded import EmbeddedEngine
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_model

CPU = torch.device("cpu")
PLAIN = Sampling(16, ())


def completions(seed: int = 0, lengths: tuple[tuple[int, int], ...] = ((3, 5), (9, 1), (1, 12), (6, 4))):
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()

    return [Completion(Prompt(i, "", ids(p)), 0, ids(c), [], False) for i, (p, c) in enumerate(lengths)]


def plain_logprobs(model, completion: Completion, temperature: float = 1.0) -> torch.Tensor:
    """[T, V]"""
    logits = model(torch.tensor([completion.prompt.token_ids + completion.token_ids])).logits[0]
    return (logits[len(completion.prompt.token_ids) - 1 : -1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_scorer_agrees_with_the_model_on_single_sequences(architecture: str) -> None:
    model = tiny_model(architecture)
    rows = completions()
    scorer = CompletionScorer(model)
    assert scorer.knows_head
    stats = scorer(collate(rows, 0, CPU), Sampling(16, (), temperature=0.7))
    for i, row in enumerate(rows):
        length = len(row.token_ids)
        expected = plain_logprobs(model, row, 0.7)
        tokens = torch.tensor(row.token_ids).unsqueeze(-1)
        torch.testing.assert_close(stats.logprobs[i, :length], expected.gather(-1, tokens)[:, 0], rtol=0, atol=2e-5)
        entropy = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(stats.entropies[i, :length], entropy, rtol=0, atol=2e-5)
        assert stats.logprobs[i, length:].eq(0).all()
        assert stats.entropies[i, length:].eq(0).all()


@torch.no_grad()
def test_an_unknown_head_falls_back_to_the_models_own_logits() -> None:
    model = tiny_model("llama")
    scorer = CompletionScorer(model)
    known = scorer(collate(completions(), 0, CPU), PLAIN)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits)
    own_forward = model.forward

    def scaled(*args, **kwargs):
        output = own_forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = scaled
    unknown = CompletionScorer(model)
    assert not unknown.knows_head
    actual = unknown(collate(completions(), 0, CPU), PLAIN)
    expected = scorer(collate(completions(), 0, CPU), Sampling(16, (), temperature=1 / 1.5))
    torch.testing.assert_close(actual.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    assert not torch.allclose(actual.logprobs, known.logprobs, atol=1e-2)


def test_chunks_change_neither_values_nor_gradients() -> None:
    model, reference = tiny_model("qwen2"), CompletionScorer(tiny_model("llama"))
    batch = collate(completions(), 0, CPU)
    results = []
    for chunk_elements in (2**24, 3 * VOCAB_SIZE):
        model.zero_grad()
        scorer = CompletionScorer(model, chunk_elements=chunk_elements)
        stats = scorer(batch, Sampling(16, (), top_p=0.9), reference)
        (stats.logprobs.sum() + stats.kl.sum()).backward()
        results.append((stats, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (whole, whole_gradient), (chunked, chunked_gradient) = results
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert (whole_gradient - chunked_gradient).norm() / whole_gradient.norm() < 1e-5
    assert whole_gradient.norm() > 0.1


def test_the_token_that_was_sampled_stays_in_the_support() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sampling = Sampling(4, (), top_k=2)
    assert warp_logits(logits, sampling)[0].isinf().tolist() == [False, False, True, True]
    assert warp_logits(logits, sampling, keep=torch.tensor([3]))[0].isinf().tolist() == [False, False, True, False]


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    kept = [
        (~warp_logits(logits[:, [2, 0, 3, 1]], Sampling(4, (), top_p=p))[0].isinf()).sum().item()
        for p in (0.01, 0.5, 0.51, 0.75, 0.76, 0.9, 0.91)
    ]
    assert kept == [1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(16, (), temperature=0.8, top_p=0.9, top_k=20)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma2"])
@torch.no_grad()
def test_training_logprobs_equal_rollout_logprobs(architecture: str, sampling: Sampling) -> None:
    model = tiny_model(architecture)
    prompts = [c.prompt for c in completions()]
    rollout = EmbeddedEngine(model, pad_token_id=0).generate(
        prompts, sampling, num_samples=2, greedy=False, seed=0, step=1
    )
    stats = CompletionScorer(model)(collate(rollout.samples, 0, CPU), sampling)
    drawn = torch.tensor([c.logprobs for c in rollout.samples])
    torch.testing.assert_close(stats.logprobs, drawn, rtol=0, atol=3e-5)


@torch.no_grad()
def test_lora_reference_is_the_base_model() -> None:
    base = tiny_model("llama")
    batch = collate(completions(), 0, CPU)
    expected = CompletionScorer(base)(batch, PLAIN).logprobs
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    policy = CompletionScorer(adapted)(batch, PLAIN).logprobs
    reference = CompletionScorer(adapted, adapters=False)(batch, PLAIN).logprobs
    assert (policy - expected).abs().max() > 0.1
    assert torch.equal(reference, expected)
    assert torch.equal(CompletionScorer(adapted)(batch, PLAIN).logprobs, policy), "the adapter is on again"


def test_lora_trains_through_the_scorer() -> None:
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    CompletionScorer(adapted)(collate(completions(), 0, CPU), PLAIN).logprobs.sum().backward()
    gradients = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert all(g is not None and g.abs().sum() > 0 for n, g in gradients.items() if "lora_B" in n)


def test_micro_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [5, 30, 7, 7, 12, 1, 29, 3]
    groups = split_by_tokens(lengths, 40)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(len(group) * max(lengths[row] for row in group) <= 40 for group in groups)
    assert lengths[groups[0][0]] == 30
    assert split_by_tokens(lengths, 10)[0] == [1], "a row longer than the budget is a group of its own"
    assert split_by_tokens([], 10) == []

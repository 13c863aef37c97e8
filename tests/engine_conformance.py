"""What every rollout engine must do; tests/test_engines.py runs it for each of them."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from remax.batching import collate
from remax.errors import GuardStop
from remax.interfaces import Completion, EngineWithWeights, Prompt, Rollout, RolloutEngine, Sampling
from remax.logprobs import CompletionScorer
from remax.saving import merged_weights
from tiny_models import VOCAB_SIZE, tiny_model

EOS = tuple(range(5, 97, 16))
SAMPLING = Sampling(max_completion_length=12, eos_token_ids=EOS)


def make_prompts() -> list[Prompt]:
    """Prompts of different lengths, one of a single token, some with EOS tokens in them, two of them equal."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (3, 13, 1, 7, 2)]
    rows[1][:2], rows[4] = EOS[:2], rows[0]
    return [Prompt(index=10 * n + 1, content="", token_ids=ids) for n, ids in enumerate(rows)]


def rows_of(rollout: Rollout) -> list[Completion]:
    return [*rollout.samples, *rollout.greedy]


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def greedy_of_transformers(model: Any, prompt: Prompt, sampling: Sampling) -> list[int]:
    """What model.generate returns for the prompt alone."""
    length, eos = sampling.max_completion_length, list(sampling.eos_token_ids) or None
    settings = {"do_sample": False, "max_new_tokens": length, "pad_token_id": 0, "eos_token_id": eos}
    ids = model.generate(input_ids=torch.tensor([prompt.token_ids]), **settings)[0].tolist()
    return ids[len(prompt.token_ids) :]


def assert_scored_alike(model: Any, completions: list[Completion], sampling: Sampling) -> None:
    """The log-probabilities are those that training computes."""
    with torch.no_grad():
        scores = CompletionScorer(model)(collate(completions, 0, torch.device("cpu")), sampling).logprobs
    for completion, row in zip(completions, scores.tolist(), strict=True):
        assert completion.logprobs == pytest.approx(row[: len(completion.token_ids)], abs=1e-4)


def assert_same(some: Rollout, others: Rollout) -> None:
    """The completions in `some` are the same in `others`."""
    known = {(c.prompt.index, c.sample_index): c for c in rows_of(others)}
    assert rows_of(some)
    for completion in rows_of(some):
        other = known[completion.prompt.index, completion.sample_index]
        assert completion.token_ids == other.token_ids
        assert completion.truncated == other.truncated
        assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-4)


class Pushing:
    """An engine with weights of its own, which gets the model's before every call: the RolloutEngine that it stands for
    in a training."""

    def __init__(self, engine: Any, model: Any) -> None:
        self.engine, self.version = engine, 0
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def generate(self, prompts: Any, sampling: Sampling, **settings: Any) -> Rollout:
        self.version += 1
        with torch.no_grad():
            self.engine.take(merged_weights(self.base), self.version)
        try:
            return self.engine.generate(prompts, sampling, **settings)
        finally:
            self.engine.release()


@cache
def _shared_llama(head_dim: int) -> Any:
    return tiny_model("llama", head_dim=head_dim)


class EngineConformance:
    """Derive a class Test... from this one and say how its engine is made."""

    head_dim = 8
    """Of the models: some kernels take few."""
    sees_adapters_switched_off = True

    def make(self, model: Any, max_rows: int = 0) -> RolloutEngine:
        raise NotImplementedError

    def generate(
        self, model: Any, prompts: list[Prompt], sampling: Sampling = SAMPLING, *, max_rows: int = 0, **settings: Any
    ) -> Rollout:
        settings = {"num_samples": 2, "greedy": True, "seed": 0, "step": 0, **settings}
        return self.make(model, max_rows).generate(prompts, sampling, **settings)

    @pytest.fixture
    def llama(self) -> Any:
        return _shared_llama(self.head_dim)

    def another(self, **overrides: Any) -> Any:
        """Returns a model like that one."""
        return tiny_model("llama", head_dim=self.head_dim, **overrides)

    # Rows

    def test_rows_come_in_the_order_of_the_prompts(self, llama):
        prompts = make_prompts()
        wanted = [True, False, True, True, False]
        for max_rows in (0, 4):
            rollout = self.generate(llama, prompts, num_samples=3, greedy=wanted, max_rows=max_rows)
            assert [(c.prompt, c.sample_index) for c in rollout.samples] == [(p, k) for p in prompts for k in range(3)]
            asked = [p for p, also in zip(prompts, wanted, strict=True) if also]
            assert [(c.prompt, c.sample_index) for c in rollout.greedy] == [(p, -1) for p in asked]
            assert all(c.token_ids and len(c.logprobs) == len(c.token_ids) for c in rows_of(rollout))

    def test_samples_or_greedy_rows_alone(self, llama):
        prompts = make_prompts()[:2]
        both = self.generate(llama, prompts)
        assert_same(only_greedy := self.generate(llama, prompts, num_samples=0), both)
        assert len(only_greedy.greedy) == 2
        assert only_greedy.samples == []
        only_samples = self.generate(llama, prompts, greedy=False)
        assert len(only_samples.samples) == 4
        assert only_samples.greedy == []

    # Tokens

    @pytest.mark.parametrize("eos", [EOS, EOS[:1], ()], ids=["several eos", "one eos", "no eos"])
    def test_greedy_is_that_of_transformers(self, llama, eos):
        sampling, prompts = replace(SAMPLING, eos_token_ids=eos, temperature=0.3, top_k=5), make_prompts()
        rollout = self.generate(llama, prompts, sampling)
        expected = [greedy_of_transformers(llama, prompt, sampling) for prompt in prompts]
        assert ids_of(rollout.greedy) == expected
        assert [c.truncated for c in rollout.greedy] == [ids[-1] not in eos for ids in expected]
        assert_scored_alike(llama, rollout.greedy, Sampling(12, eos))

    def test_completions_end_with_the_first_eos_or_at_the_limit(self, llama):
        rollout = self.generate(llama, make_prompts(), num_samples=8)
        for completion in rows_of(rollout):
            assert not set(completion.token_ids[:-1]) & set(EOS)
            assert completion.truncated == (completion.token_ids[-1] not in EOS)
            assert len(completion.token_ids) == 12 or not completion.truncated
        assert {c.truncated for c in rollout.samples} == {True, False}
        assert len({len(c.token_ids) for c in rollout.samples}) > 4

    @pytest.mark.parametrize("limit", [1, 2])
    def test_short_limits(self, llama, limit):
        full = self.generate(llama, make_prompts(), replace(SAMPLING, eos_token_ids=()))
        short = self.generate(llama, make_prompts(), Sampling(limit, ()))
        assert ids_of(rows_of(short)) == [c.token_ids[:limit] for c in rows_of(full)]
        assert all(c.truncated for c in rows_of(short))

    # Distribution

    @pytest.mark.parametrize(
        "sampling",
        [SAMPLING, replace(SAMPLING, temperature=0.7), replace(SAMPLING, temperature=1.4, top_p=0.8, top_k=12)],
        ids=["plain", "temperature", "truncated"],
    )
    def test_logprobs_are_those_of_the_sampled_distribution(self, llama, sampling):
        rollout = self.generate(llama, make_prompts(), sampling, num_samples=4)
        assert_scored_alike(llama, rollout.samples, sampling)

    def test_frequencies_match_probabilities(self, llama):
        prompt, num = Prompt(0, "", [1, 2, 3]), 1000
        sampling = Sampling(1, (), temperature=1.5, top_k=8)
        rollout = self.generate(llama, [prompt], sampling, num_samples=num, greedy=False, max_rows=250)
        with torch.no_grad():
            logits = llama(torch.tensor([prompt.token_ids])).logits[0, -1].double() / 1.5
        values, tokens = logits.topk(8)
        expected = values.softmax(0) * num
        counts = torch.bincount(torch.tensor(ids_of(rollout.samples))[:, 0], minlength=VOCAB_SIZE)[tokens]
        assert counts.sum() == num
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert 0.5 < chi_square < 30  # 7 degrees of freedom: outside once in 5000 at either end

    def test_seed_step_prompt_and_sample_give_different_draws(self, llama):
        prompts = [Prompt(4, "", [1, 2, 3]), Prompt(5, "", [1, 2, 3])]
        draws, endless = [], replace(SAMPLING, eos_token_ids=())  # Two that end at once would be the same.
        for seed, step in ((0, 0), (0, 1), (1, 0)):
            draws += ids_of(self.generate(llama, prompts, endless, greedy=False, seed=seed, step=step).samples)
        assert len(set(map(tuple, draws))) == 12
        assert ids_of(self.generate(llama, prompts, endless).samples) == draws[:4]

    def test_nothing_else_in_the_batch_matters(self, llama):
        prompts, sampling = make_prompts(), replace(SAMPLING, temperature=0.8, top_p=0.95)
        rollout = self.generate(llama, prompts, sampling)
        assert_same(self.generate(llama, prompts[::-1], sampling), rollout)
        assert_same(self.generate(llama, prompts, sampling, max_rows=4), rollout)
        assert_same(self.generate(llama, prompts[1:2], sampling, num_samples=1, greedy=False), rollout)

    def test_generation_config_is_ignored(self, llama):
        model = self.another(use_cache=False)
        model.generation_config = GenerationConfig(
            do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, max_new_tokens=2, eos_token_id=[1, 2, 3]
        )
        assert_same(self.generate(model, make_prompts()), self.generate(llama, make_prompts()))

    # The model

    def test_the_model_is_left_as_it_was(self):
        model = self.another(attention_dropout=0.5).train()
        plain = self.generate(self.another(), make_prompts())
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.model.layers[1].eval()

        def state() -> list[Any]:
            weights = [(n, p.dtype, p.data_ptr(), p.requires_grad, p.sum().item()) for n, p in model.named_parameters()]
            modules = [
                (n, m.training, vars(m).get("gradient_checkpointing"), set(vars(m))) for n, m in model.named_modules()
            ]
            return [weights, modules, model.config.to_dict(), model.config._attn_implementation]

        before, engine = state(), self.make(model)
        rollout = engine.generate(make_prompts(), SAMPLING, num_samples=2, greedy=True, seed=0, step=0)
        assert state() == before
        assert_same(rollout, plain)
        with pytest.raises((IndexError, ValueError, GuardStop)):
            engine.generate([Prompt(0, "", [VOCAB_SIZE])], SAMPLING, num_samples=1, greedy=True, seed=0, step=0)
        assert state() == before
        assert_same(engine.generate(make_prompts(), SAMPLING, num_samples=2, greedy=True, seed=0, step=0), plain)
        assert torch.is_grad_enabled()
        model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
        assert model.model.embed_tokens.weight.grad.abs().sum() > 0

    def test_weights_are_those_of_the_call(self):
        model, prompts = self.another(), make_prompts()
        engine = self.make(model)
        settings = {"num_samples": 2, "greedy": True, "seed": 0, "step": 0}
        before = engine.generate(prompts, SAMPLING, **settings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.8)
        after = engine.generate(prompts, SAMPLING, **settings)
        assert_same(after, self.make(model).generate(prompts, SAMPLING, **settings))
        assert_scored_alike(model, rows_of(after), SAMPLING)
        assert ids_of(after.greedy) != ids_of(before.greedy)

    def test_adapters_are_active(self, llama):
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        prompts, model = make_prompts(), get_peft_model(self.another(), config)
        rollout = self.generate(model, prompts)
        assert ids_of(rollout.greedy) == [greedy_of_transformers(model.eval(), p, SAMPLING) for p in prompts]
        assert_scored_alike(model, rows_of(rollout), SAMPLING)
        plain = self.generate(llama, prompts)
        assert ids_of(plain.greedy) != ids_of(rollout.greedy)
        if self.sees_adapters_switched_off:
            with model.disable_adapter():
                assert_same(self.generate(model, prompts), plain)


class ConformanceWithWeights(EngineConformance):
    """Likewise for an engine with weights of its own; say how it is made, without weights."""

    sees_adapters_switched_off = False
    """What is pushed has them merged."""

    def make_bare(self, model: Any) -> EngineWithWeights:
        raise NotImplementedError

    def make(self, model: Any, max_rows: int = 0) -> RolloutEngine:
        return Pushing(self.make_bare(model), model)

    def draw(self, engine: Any) -> Rollout:
        return engine.generate(make_prompts(), SAMPLING, num_samples=2, greedy=True, seed=0, step=0)

    def test_it_is_one(self, llama):
        assert isinstance(self.make_bare(llama), EngineWithWeights)

    def test_it_draws_with_the_weights_that_it_took(self, llama):
        other = self.another()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.8)
        plain, changed = self.generate(llama, make_prompts()), self.generate(other, make_prompts())
        assert ids_of(plain.greedy) != ids_of(changed.greedy)
        engine = self.make_bare(llama)
        for version, model, expected in ((1, other, changed), (2, llama, plain), (3, other, changed)):
            engine.take(merged_weights(model), version)
            for _ in range(2):  # Several calls, as with --rollout_batch_size.
                assert_same(self.draw(engine), expected)
            engine.release()
            assert_scored_alike(model, rows_of(expected), SAMPLING)

    def test_all_weights_are_asked_for_whatever_version_it_has(self, llama):
        engine, names = self.make_bare(llama), []

        def weights() -> Any:
            for name, tensor in merged_weights(llama):
                names.append(name)
                yield name, tensor

        for version in (1, 1, 2):
            names.clear()
            engine.take(weights(), version)
            assert names == [name for name, _ in merged_weights(llama)]
            assert self.draw(engine).samples
            engine.release()

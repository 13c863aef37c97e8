"""The rollout engine that needs nothing but the model: it decodes through transformers' key-value cache.

Legend: P prompts of a group, R rows (one per completion) of the group, N <= R rows that are still decoded, n tokens
read at once, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from remax.errors import UserError
from remax.interfaces import Completion, Prompt, Rollout, Sampling
from remax.rollout.cache import make_cache
from remax.rollout.draw import choose
from remax.rollout.kernels import decoding_kernels
from remax.rollout.noise import uniforms
from remax.rollout.static import StaticBatch

_SELECTABLE_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "DummyLayer"}
"""transformers' cache layers that select rows completely: others lack the method, or inherit it and forget a state."""


class EmbeddedEngine:
    """Draws completions with a transformers causal language model, which may carry a LoRA adapter.

    Sampled and greedy rows are decoded together; a prompt is prefilled once for all its rows; finished rows leave the
    batch. The checkpoint's generation_config plays no part.
    """

    def __init__(self, model: Any, *, pad_token_id: int, max_rows: int = 0, static: bool | None = None) -> None:
        """The model is used with the weights it has at each call, without dropout, and left in the mode it was in.

        pad_token_id fills up shorter prompts on the left and may be any token, EOS too. max_rows bounds the rows
        decoded at once (0: no bound) and does not change the completions. The rows of a prompt stay together: if they
        are more than max_rows, prompts are decoded one at a time with all their rows. static: whether to decode at
        fixed addresses where the model allows it; by default on CUDA, where steps become CUDA graphs.

        Raises UserError if a prompt's prefill cannot be shared by its rows (recurrent state, encoder-decoder), and for
        PEFT adapters that put virtual tokens in front.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._model = model
        self._config = base.config
        self._accepted = set(inspect.signature(base.forward).parameters)
        self._pad_token_id = pad_token_id
        self._max_rows = max_rows
        self._static = static
        if (
            self._config.is_encoder_decoder
            or "past_key_values" not in self._accepted
            or not self._cache_layers() <= _SELECTABLE_LAYERS
        ):
            raise UserError(
                f"--model is {self._config.name_or_path or type(base).__name__}, of type {self._config.model_type}: it "
                "keeps other state than the keys and values of a decoder, so a prompt's completions cannot share its "
                "prefill; set a causal attention model, such as one of type llama, qwen3 or gemma2."
            )
        adapter = getattr(model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False):
            raise UserError(
                f"--model carries a {type(adapter).__name__} adapter: its virtual tokens would come again in front of "
                "every decoded token; set a LoRA adapter."
            )

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        num_samples: int,
        greedy: bool | Sequence[bool],
        seed: int,
        step: int,
    ) -> Rollout:
        """Returns num_samples sampled and, if asked, one greedy completion of every prompt, in order.

        They are y ~ pi(.|x) and the baseline's y* of Li et al., arXiv 2310.10505, Algorithm 1. A sampled token is the
        inverse of the cumulative distribution at a uniform keyed by (seed, step, prompt.index, sample index,
        position): nothing else in the batch changes it, up to near-ties in floating point. A greedy token is the
        argmax of the logits.
        """
        wanted = [greedy] * len(prompts) if isinstance(greedy, bool) else greedy
        assert num_samples > 0 or all(wanted), "neither sampled nor greedy completions were asked for"
        requests = [
            [Completion(prompt, k, [], [], truncated=False) for k in range(-1 if also_greedy else 0, num_samples)]
            for prompt, also_greedy in zip(prompts, wanted, strict=True)
        ]
        # Similar lengths together, the longest first: if memory does not suffice, that shows at once.
        requests_by_length = sorted(requests, key=lambda own: len(own[0].prompt.token_ids), reverse=True)
        rows_of_prompt = num_samples + any(wanted)
        group_size = max(1, self._max_rows // rows_of_prompt) if self._max_rows else max(1, len(prompts))
        kernels = decoding_kernels(self._model, sampling.max_completion_length)
        with torch.no_grad(), evaluation_mode(self._model), kernels:
            for start in range(0, len(prompts), group_size):
                self._decode(requests_by_length[start : start + group_size], sampling, seed, step)
        completions = [completion for own in requests for completion in own]
        return Rollout(
            samples=[completion for completion in completions if completion.sample_index >= 0],
            greedy=[completion for completion in completions if completion.sample_index < 0],
        )

    def _decode(self, group: list[list[Completion]], sampling: Sampling, seed: int, step: int) -> None:
        """Fills in the completions of P prompts, given as one list per prompt."""
        numbered = [(p, completion) for p, own in enumerate(group) for completion in own]
        # All sampled rows come before all greedy ones, so that each kind is a slice, and stays one as rows leave.
        numbered.sort(key=lambda pair: pair[1].sample_index < 0)
        completions = [completion for _, completion in numbered]
        num_sampled = sum(completion.sample_index >= 0 for completion in completions)
        length, device = sampling.max_completion_length, self._model.device
        noise = self._noise(completions[:num_sampled], length, seed, step)
        prompts, prompt_of_row = [own[0].prompt for own in group], torch.tensor([p for p, _ in numbered], device=device)
        if self._decodes_static():
            context, prompt_logits = self._prefill(prompts, 0)
            batch = StaticBatch(self._forward, context.cache, context.num_padding, prompt_of_row, noise, sampling)
            tokens, logprobs = batch.decode(prompt_logits[prompt_of_row])
        else:
            context, prompt_logits = self._prefill(prompts, length)
            context.select(prompt_of_row)
            tokens, logprobs = self._decode_rows(context, prompt_logits[prompt_of_row], noise, sampling)

        for completion, ids, values in zip(completions, tokens.tolist(), logprobs.tolist(), strict=True):
            end = next((i + 1 for i, token_id in enumerate(ids) if token_id in sampling.eos_token_ids), length)
            completion.token_ids, completion.logprobs = ids[:end], values[:end]
            completion.truncated = ids[end - 1] not in sampling.eos_token_ids

    def _decode_rows(
        self, context: "_Context", logits: Tensor, noise: Tensor, sampling: Sampling
    ) -> tuple[Tensor, Tensor]:
        """Returns the tokens and log-probabilities, [R, T] each, whatever follows an EOS.

        logits [R, V] that follow the context, noise [S, T] of the sampled rows, which come before the greedy ones.
        """
        num_sampled, length = noise.shape
        eos = torch.tensor(sampling.eos_token_ids, dtype=torch.long, device=logits.device)
        tokens = torch.zeros(len(logits), length, dtype=torch.long, device=logits.device)
        logprobs = torch.zeros(tokens.shape, device=logits.device)
        rows = torch.arange(len(logits), device=logits.device)  # [N], which of the R
        unfinished = torch.ones_like(rows, dtype=torch.bool)
        for t in range(length):
            token, logprob = choose(logits, sampling, noise[rows[:num_sampled], t])
            tokens[rows, t], logprobs[rows, t] = token, logprob
            unfinished &= ~torch.isin(token, eos)
            remaining = unfinished.nonzero()[:, 0]  # the only wait for the device in a step
            if len(remaining) == 0 or t + 1 == length:
                break
            if len(remaining) <= len(rows) * 7 / 8:  # fewer finished rows are not worth a copy of the cache
                num_sampled = int((remaining < num_sampled).sum())
                rows, unfinished, token = rows[remaining], unfinished[remaining], token[remaining]
                context.select(remaining)
            logits = self._extend(context, token[:, None])
        return tokens, logprobs

    def _noise(self, samples: list[Completion], length: int, seed: int, step: int) -> Tensor:
        """Returns the uniforms [S, length] of S sampled rows."""
        device = self._model.device
        prompt_index = torch.tensor([c.prompt.index for c in samples], dtype=torch.long, device=device)
        sample_index = torch.tensor([c.sample_index for c in samples], dtype=torch.long, device=device)
        return uniforms(seed, step, prompt_index[:, None], sample_index[:, None], torch.arange(length, device=device))

    def _prefill(self, prompts: list[Prompt], num_new_tokens: int) -> tuple["_Context", Tensor]:
        """Returns the context of P rows, with room for new tokens, and the logits [P, V] that follow it."""
        width = max(len(prompt.token_ids) for prompt in prompts)
        num_padding = [width - len(prompt.token_ids) for prompt in prompts]
        ids = [[self._pad_token_id] * n + prompt.token_ids for n, prompt in zip(num_padding, prompts, strict=True)]
        device = self._model.device
        context = _Context(make_cache(self._config, num_new_tokens), torch.tensor(num_padding, device=device)[:, None])
        return context, self._extend(context, torch.tensor(ids, device=device))

    def _extend(self, context: "_Context", token_ids: Tensor) -> Tensor:
        """Appends token_ids [N, n] to the context; returns the logits [N, V] after the last of them."""
        columns = torch.arange(context.width + token_ids.shape[1], device=token_ids.device)
        # As transformers' generate() has them: 0 in the padding, then counted from the first real token.
        position_ids = (columns - context.num_padding).clamp(min=0)[:, context.width :]
        context.width = len(columns)
        return self._forward(token_ids, (columns >= context.num_padding).long(), position_ids, context.cache)

    def _forward(self, token_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        optional = {"position_ids": position_ids, "logits_to_keep": 1}
        outputs = self._model(
            input_ids=token_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._accepted},
        )
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def _decodes_static(self) -> bool:
        """Whether rows are decoded at fixed addresses: on CUDA, if the model keeps all tokens in all layers."""
        wanted = self._model.device.type == "cuda" if self._static is None else self._static
        attention = self._config.get_text_config()._attn_implementation
        spread = len(set(getattr(self._model, "hf_device_map", {}).values())) > 1
        return wanted and not spread and attention in ("sdpa", "eager") and self._cache_layers() == {"DynamicLayer"}

    def _cache_layers(self) -> set[str]:
        return {type(layer).__name__ for layer in DynamicCache(config=self._config).layers}


@dataclass
class _Context:
    """What N rows have read so far: width columns, the first num_padding [N, 1] of a row being padding."""

    cache: Any
    num_padding: Tensor
    width: int = 0

    def select(self, rows: Tensor) -> None:
        """Keeps the rows given by index, which may repeat."""
        self.cache.batch_select_indices(rows)
        self.num_padding = self.num_padding[rows]


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Dropout off; afterwards every module is again in the mode that it was in itself."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode

"""The rollout engine for CUDA: transformers' continuous batching, which keeps keys and values in pages.

Legend: R rows (one per completion), T their longest length, n rows that get a token in a step, V vocabulary. A slot is
the place of one token, row * T + position; one more slot, R * T, takes what belongs to nobody.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.utils import WorkloadHints

from remax.errors import UserError
from remax.interfaces import Completion, Prompt, Rollout, Sampling
from remax.logprobs import warp_logits
from remax.rollout.draw import draw
from remax.rollout.embedded import evaluation_mode
from remax.rollout.noise import uniforms

_OPTIONS = {field.name for field in fields(ContinuousBatchingConfig)}
_CAN_KEEP_ATTENTION = "auto_switch_to_flash" in _OPTIONS
"""Older versions take flash attention wherever it is installed, unless the model's attention is a paged one already."""
_COUNTS_WHOLE_BLOCKS = "page_size" in _OPTIONS
"""A block is one of all layers; in older versions, of as many as there are of a kind."""
_MAX_BATCH_TOKENS = 2048
"""Most prompt tokens read at once: more would hardly be faster, and the mask of sdpa grows with them."""


class PagedEngine:
    """Draws completions with a transformers causal language model, which may carry a LoRA adapter.

    Sampled and greedy rows are decoded together; a waiting row starts when another one ends. Every row reads its prompt
    for itself: requests that fork share it, but not reliably so when batches are prepared ahead. CUDA graphs, batches
    prepared ahead and the kernel that reads pages where they lie come with an --attn_implementation of flash attention,
    and not without. The checkpoint's generation_config plays no part.

    The cache lives for one call of generate: keys and values of former weights cannot be used again, and training has
    the memory for itself. The price is that CUDA graphs are captured at every call.
    """

    def __init__(self, model: Any, *, max_rows: int = 0) -> None:
        """The model is used with the weights it has at each call, without dropout, and left as it was.

        max_rows bounds the rows decoded at once (0: no bound) and does not change the completions.

        Raises UserError if the model's own forward pass gives other log-probabilities than its paged attention; that
        is tried on a few tokens, since a config cannot tell.
        """
        self._model = model
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._max_rows = max_rows
        config = self._base.config.get_text_config()
        self._has_flash_attention = "flash" in str(self._base.config._attn_implementation)
        if getattr(config, "attn_logit_softcapping", None) and not self._has_flash_attention:
            raise self._unsuitable("its paged attention leaves the soft cap out, except in flash attention")
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise self._unsuitable("its adapter's virtual tokens would be left out")
        self._try_out()

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

        They are y ~ pi(.|x) and the baseline's y* of Li et al., arXiv 2310.10505, Algorithm 1, and the same as those of
        the embedded engine, up to near-ties in floating point.

        Raises UserError under autocast with float32 weights.
        """
        if self._base.dtype == torch.float32 and torch.is_autocast_enabled(self._base.device.type):
            raise float32_under_autocast()
        wanted = [greedy] * len(prompts) if isinstance(greedy, bool) else greedy
        completions = [
            Completion(prompt, k, [], [], truncated=False)
            for prompt, also_greedy in zip(prompts, wanted, strict=True)
            for k in range(-1 if also_greedy else 0, num_samples)
        ]
        assert completions or not prompts, "neither sampled nor greedy completions were asked for"
        if completions:
            with torch.no_grad(), evaluation_mode(self._model), self._own_attention(), _frozen_garbage():
                self._decode(completions, sampling, seed, step)
        return Rollout(
            samples=[completion for completion in completions if completion.sample_index >= 0],
            greedy=[completion for completion in completions if completion.sample_index < 0],
        )

    def _decode(self, completions: list[Completion], sampling: Sampling, seed: int, step: int) -> None:
        """Fills in the completions."""
        at_once = min(len(completions), self._max_rows or len(completions))
        choice = _Choice(completions, sampling, seed, step, self._base.device, at_once)
        # The generation thread has streams of its own, which do not wait for what the default stream still does: the
        # tables of the choice, the optimiser's last step.
        self._synchronize()
        try:
            tokens = self._run(completions, sampling, choice, at_once, limited=True)
        except MemoryError:  # raised before anything is allocated: rows beyond what fits wait
            tokens = self._run(completions, sampling, choice, at_once, limited=False)
        self._synchronize()
        for completion, ids, values in zip(completions, tokens, choice.logprobs_of_rows(), strict=True):
            completion.token_ids, completion.logprobs = ids, values[: len(ids)]
            completion.truncated = ids[-1] not in sampling.eos_token_ids

    def _run(
        self, completions: list[Completion], sampling: Sampling, choice: "_Choice", at_once: int, *, limited: bool
    ) -> list[list[int]]:
        """Returns the tokens of each completion, through the first EOS inclusive.

        limited: the cache has the size that at_once rows need; else, all the memory that is left.
        """
        eos = list(sampling.eos_token_ids)
        lengths = [len(completion.prompt.token_ids) for completion in completions]
        manager = self._base.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=sampling.max_completion_length, eos_token_id=eos or [-1]
            ),
            continuous_batching_config=self._batching_config(lengths, sampling, at_once, limited=limited),
            workload_hints=WorkloadHints(max(lengths), sampling.max_completion_length, at_once),
        )
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([choice]))
        manager.logit_processor.tensors_required = 1
        outputs: dict[int, Any] = {}
        try:
            manager.warmup()
            manager.start()
            for row in sorted(range(len(completions)), key=lengths.__getitem__, reverse=True):
                manager.add_request(completions[row].prompt.token_ids, request_id=str(row), eos_token_id=eos)
            while len(outputs) < len(completions):
                output = manager.get_result(timeout=1)
                if output is not None:
                    outputs[int(output.request_id)] = output
                elif not manager.is_running():
                    break
        finally:
            manager.stop(hard_stop=True)
            manager.destroy()
        error = (manager if hasattr(manager, "fatal_error") else manager.background_thread_status).fatal_error
        if error is not None:
            raise error
        failures = [output.error for output in outputs.values() if output.error]
        assert not failures, failures
        assert len(outputs) == len(completions), "the generation thread ended early"
        return [outputs[row].generated_tokens for row in range(len(completions))]

    def _batching_config(
        self, lengths: list[int], sampling: Sampling, at_once: int, *, limited: bool
    ) -> ContinuousBatchingConfig:
        """Returns the configuration for at_once rows with prompts of these lengths."""
        config = ContinuousBatchingConfig(
            max_requests_per_batch=at_once,
            max_batch_tokens=max(at_once, min(_MAX_BATCH_TOKENS, sum(lengths))),
            allow_block_sharing=False,
        )
        if _CAN_KEEP_ATTENTION:
            config.auto_switch_to_flash = False
        if limited and (_COUNTS_WHOLE_BLOCKS or not self._mixes_layer_types()):
            page_size = config.page_size if _COUNTS_WHOLE_BLOCKS else config.block_size
            pages_of_row = -(-(max(lengths) + sampling.max_completion_length) // page_size)
            config.num_blocks = at_once * pages_of_row + 2  # two more, as kinds of layers round up for themselves
            config.safety_margin = 0.0  # all rows fit: none has to wait for free blocks
        return config

    def _mixes_layer_types(self) -> bool:
        return len(set(getattr(self._base.config.get_text_config(), "layer_types", None) or [])) > 1

    @contextmanager
    def _own_attention(self) -> Iterator[None]:
        """The paged variant of the attention the model was loaded with, never another; afterwards that one again."""
        original = self._base.config._attn_implementation
        try:
            if not _CAN_KEEP_ATTENTION and not self._has_flash_attention:
                self._base.set_attn_implementation(f"paged|{original}")
            yield
        finally:
            if self._base.config._attn_implementation != original:
                self._base.set_attn_implementation(original)

    def _synchronize(self) -> None:
        if self._base.device.type == "cuda":
            torch.cuda.synchronize(self._base.device)

    def _try_out(self) -> None:
        """Raises UserError unless a few paged tokens have the log-probabilities of a plain forward pass."""
        prompts = [Prompt(n, "", list(range(1, length))) for n, length in enumerate((4, 12))]
        try:
            rollout = self.generate(prompts, Sampling(6, ()), num_samples=0, greedy=True, seed=0, step=0)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self._unsuitable(f"its paged attention fails ({type(error).__name__})") from error
        tolerance = 0.01 if self._base.dtype == torch.float32 else 0.2
        for completion in rollout.greedy:
            gap = (torch.tensor(completion.logprobs) - self._plain_logprobs(completion)).abs().mean().item()
            if not gap < tolerance:
                raise self._unsuitable(f"its log-probabilities change by {gap:.2g} nats in paged attention")

    def _plain_logprobs(self, completion: Completion) -> Tensor:
        """Returns the log-probabilities of a completion's tokens from one forward pass without a cache, on the CPU."""
        prompt, tokens = completion.prompt.token_ids, completion.token_ids
        input_ids = torch.tensor([prompt + tokens], device=self._base.device)
        with torch.no_grad(), evaluation_mode(self._model):
            logits = self._model(input_ids=input_ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logprobs: Tensor = logits.log_softmax(-1).cpu().gather(-1, torch.tensor(tokens)[:, None])
        return logprobs[:, 0]

    def _unsuitable(self, reason: str) -> UserError:
        config = self._base.config
        return UserError(
            f"--rollout_engine is paged with --model {config.name_or_path or type(self._base).__name__}, of type "
            f"{config.model_type}: {reason}, so its completions would not be the policy's; set --rollout_engine "
            "embedded."
        )


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Garbage collection passes over what exists by now: transformers collects twice at each end, and looking through
    all objects of a process with torch and transformers takes most of a second."""
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


class _Choice(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Chooses the next tokens as the embedded engine does, and leaves transformers' argmax no other choice.

    One number per row goes to the device with each batch, its slot; there wait the noise of all slots, and there the
    log-probabilities stay. The position is known when a batch is prepared, even before the tokens of the one before.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(
        self,
        completions: list[Completion],
        sampling: Sampling,
        seed: int,
        step: int,
        device: torch.device,
        at_once: int,
    ) -> None:
        self._sampling = sampling
        self._at_once = at_once
        self._length = length = sampling.max_completion_length
        self._prompt_lengths = [len(completion.prompt.token_ids) for completion in completions]
        self._nobody = len(completions) * length
        prompt_index = torch.tensor([completion.prompt.index for completion in completions], device=device)
        sample_index = torch.tensor([completion.sample_index for completion in completions], device=device)
        positions = torch.arange(length, device=device)
        noise = uniforms(seed, step, prompt_index[:, None], sample_index[:, None], positions)
        greedy = (sample_index < 0)[:, None].expand(-1, length)
        self._noise = torch.nn.functional.pad(noise.flatten(), (0, 1))  # [R * T + 1]
        self._greedy = torch.nn.functional.pad(greedy.flatten(), (0, 1), value=True)
        self._logprobs = torch.zeros(self._nobody + 1, device=device)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Sets the slot that belongs to nobody."""
        int32_tensor.fill_(self._nobody)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Returns the slots of the tokens to come, int32, one for every row there could be.

        The graphs of a smaller batch run for padded rows too: with the slots of a former batch, these would overwrite
        log-probabilities of rows that have ended.
        """
        slots = [self._slot(request.state) for request in requests_with_new_token]
        slots += [self._nobody] * (self._at_once - len(slots))
        return torch.tensor(slots, dtype=torch.int32)

    def _slot(self, state: Any) -> int:
        if not state.request_id.isdecimal():  # a request that transformers makes up to warm up
            return self._nobody
        row = int(state.request_id)
        # By the time of this call position_offset counts all tokens read, those of this batch included; it stays right
        # for a row that lost its place in the cache and reads its first tokens again.
        position = state.position_offset - self._prompt_lengths[row]
        # A batch prepared ahead may still have a row that has just reached its limit.
        return row * self._length + position if position < self._length else self._nobody

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Returns scores [n, V] in which the chosen tokens are the largest, given logits [n, V] and slots."""
        slots = tensor_arg[: len(scores)].long()
        greedy, logits = self._greedy[slots], scores.float()
        logprobs = torch.where(greedy[:, None], logits, warp_logits(logits, self._sampling)).log_softmax(-1)
        token = torch.where(greedy, logits.argmax(-1), draw(logprobs, self._noise[slots]))
        self._logprobs[slots] = logprobs.gather(-1, token[:, None])[:, 0]
        return torch.zeros_like(scores).scatter_(-1, token[:, None], 1.0)

    def logprobs_of_rows(self) -> list[list[float]]:
        """Returns T log-probabilities per row, those after its end being of no meaning."""
        rows: list[list[float]] = self._logprobs[: self._nobody].view(-1, self._length).tolist()
        return rows


def float32_under_autocast() -> UserError:
    """Returns the error for weights of another precision than what they compute."""
    return UserError(
        "--rollout_engine is paged with --bf16 and --dtype float32: its cache has the precision of the weights and "
        "cannot hold what autocast computes; set --rollout_engine embedded, or --dtype bfloat16."
    )

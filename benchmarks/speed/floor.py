"""The bare calls that a step cannot do without, each timed alone on the rows of a real step.

What is left out: drawing tokens, tokenizers, advantages, KL, metrics, and whatever else a step adds.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from benchmarks.speed.cases import Setting
from benchmarks.speed.competitors import our_trainer
from benchmarks.speed.rounds import ratios
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaForSequenceClassification

from remax.batching import Batch, collate, split_by_tokens
from remax.head import head_logprobs
from remax.interfaces import Completion
from remax.rollout.cache import make_cache
from remax.rollout.kernels import decoding_kernels
from remax.trainer import ReMaxTrainer

GENERATION, REFERENCE, TRAINING = "generation: ", "reference: ", "forward and backward: "
"""Calls that can be made in several ways, of which the fastest counts."""
Head = Callable[[Any, Tensor, Tensor], Tensor]
"""From a head, states [N, H] and targets [N] to minus the sum of the targets' log-probabilities."""


def measure(setting: Setting) -> dict[str, Any]:
    """Returns seconds of ReMax's step with a reward model and of its floor, in turn, and the ratios by round."""
    trainer = make_trainer(setting)
    seconds: dict[str, list[float]] = {}
    for number in range(setting.case.rounds + 1):
        record, step = timed(partial(trainer.step, trainer.order.batch(1), number + 1))
        own = {"step": step, **floor(trainer, record.rollout.samples, record.rollout.greedy)}
        if number > 0:  # The first round warms up.
            for name, value in own.items():
                seconds.setdefault(name, []).append(value)
    return {
        "weights": "trained" if setting.trained else "random",
        "prompts": setting.case.num_prompts,
        "max_completion_length": setting.case.max_completion_length,
        "micro_batch_tokens": setting.case.micro_batch_tokens,
        **summary(seconds),
    }


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Returns the ratios of the step to the sum of its calls; of several ways to make one, the fastest counts."""
    chosen = {
        min((name for name in seconds if name.startswith(way)), key=lambda name: statistics.median(seconds[name]))
        for way in (GENERATION, REFERENCE, TRAINING)
    }
    ways = {name for name in seconds if ": " in name}
    calls = [name for name in seconds if name != "step" and (name not in ways or name in chosen)]
    totals = [sum(values) for values in zip(*(seconds[name] for name in calls), strict=True)]
    by_round = ratios(seconds["step"], totals)
    return {
        "seconds": seconds,
        "fastest": sorted(chosen),
        "floor": statistics.median(totals),
        "step_of_floor": statistics.median(by_round),
        "step_of_floor_by_round": by_round,
    }


def make_trainer(setting: Setting) -> ReMaxTrainer:
    """Returns a trainer whose reward model has the policy's shape and random weights."""
    policy_config = setting.case.shape.config()
    torch.manual_seed(0)
    reward_model = LlamaForSequenceClassification(policy_config).eval()
    return our_trainer(setting, reward_model, reward_processing_classes=setting.tokenizer())


def floor(trainer: ReMaxTrainer, samples: Sequence[Completion], greedy: Sequence[Completion]) -> dict[str, float]:
    """Returns the seconds of each bare call on these rows."""
    policy, reference, args = trainer.parts.policy, trainer.parts.reference, trainer.args
    assert reference is not None
    scored = batches([*samples, *greedy], trainer, args.reward_batch_size)
    trained = batches(samples, trainer)
    reward_model = trainer.parts.reward_functions[0].model  # type: ignore[attr-defined]
    policy.eval()

    def reward() -> None:
        with torch.no_grad():
            for batch in scored:
                reward_model(input_ids=batch.input_ids)

    def score(model: Any, head: Head) -> None:
        for batch in trained:
            loss = negative_logprobs(model, batch, head)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]

    def reference_forward(head: Head) -> None:
        with torch.no_grad():
            score(reference.model, head)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trainer.policy.trainable, args.max_grad_norm)
        trainer.policy.optimizer.step()
        trainer.policy.optimizer.zero_grad()

    return {
        **generation(trainer, samples, greedy),
        "reward": timed(reward)[1],
        **{f"{REFERENCE}{name}": timed(partial(reference_forward, head))[1] for name, head in HEADS.items()},
        **{f"{TRAINING}{name}": timed(partial(score, policy, head))[1] for name, head in HEADS.items()},
        "optimiser": timed(update)[1],
    }


def generation(trainer: ReMaxTrainer, samples: Sequence[Completion], greedy: Sequence[Completion]) -> dict[str, float]:
    """Returns the seconds of decoding these rows: by transformers' generate(), and by bare loops."""
    policy, config = trainer.parts.policy, trainer.parts.policy.config
    num_new_tokens = trainer.args.max_completion_length
    rows = [completion for pair in zip(greedy, samples, strict=True) for completion in pair]
    assert all(len(row.token_ids) == num_new_tokens for row in rows), "the floor is defined for one length"
    pad = trainer.parts.tokenizer.pad_token_id
    ways = {
        "generate()": lambda: generate(policy, rows, pad),
        "loop over transformers' cache": lambda: decode(policy, rows, DynamicCache(config=config)),
        "loop over our cache": lambda: decode(policy, rows, make_cache(config, num_new_tokens)),
        "loop over our cache with our kernels": lambda: decode_with_kernels(policy, rows, num_new_tokens),
    }
    return {GENERATION + name: timed(way)[1] for name, way in ways.items()}


@torch.no_grad()
def generate(policy: Any, rows: Sequence[Completion], pad_token_id: int) -> None:
    """Decodes with transformers' generate(), greedily: no noise is drawn. The length plan keeps EOS away."""
    ids, mask = left_padded([row.prompt.token_ids for row in rows])
    policy.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=len(rows[0].token_ids),
        do_sample=False,
        pad_token_id=pad_token_id,
    )


@torch.no_grad()
def decode(policy: Any, rows: Sequence[Completion], cache: Any) -> None:
    """Reads the prompts once for each pair of rows, then the rows' tokens one by one, as decoding has to."""
    ids, mask = left_padded([row.prompt.token_ids for row in rows[::2]])
    num_padding = (mask == 0).sum(1)
    width, tokens = ids.shape[1], torch.tensor([row.token_ids for row in rows])
    positions = (torch.arange(width + tokens.shape[1]) - num_padding[:, None]).clamp(min=0)
    mask = torch.cat([mask, mask.new_ones(len(mask), tokens.shape[1])], dim=1)

    def read(ids: Tensor, start: int, end: int) -> None:
        policy(
            input_ids=ids,
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    read(ids, 0, width)
    twice = torch.arange(len(mask)).repeat_interleave(2)
    cache.batch_select_indices(twice)
    mask, positions = mask[twice], positions[twice]
    for t in range(tokens.shape[1] - 1):
        read(tokens[:, t, None], width + t, width + t + 1)


def decode_with_kernels(policy: Any, rows: Sequence[Completion], num_new_tokens: int) -> None:
    """Decodes with the engine's kernels and cache, and nothing else of it."""
    with torch.no_grad(), decoding_kernels(policy, num_new_tokens):
        decode(policy, rows, make_cache(policy.config, num_new_tokens))


def negative_logprobs(model: Any, batch: Batch, head: Head) -> Tensor:
    """Returns minus the sum of the log-probabilities of a batch's completions, by the calls that make them."""
    states = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state[:, :-1][batch.target_mask]
    return head(model.get_output_embeddings(), states, batch.targets)


def by_cross_entropy(head: Any, states: Tensor, targets: Tensor) -> Tensor:
    """torch's own loss over all logits at once."""
    return cross_entropy(head(states), targets, reduction="sum")


def by_our_head(head: Any, states: Tensor, targets: Tensor) -> Tensor:
    """The log-probabilities that a step takes, in one chunk."""
    return -head_logprobs(head, states, targets, temperature=1.0, chunk_size=len(targets))[0].sum()


HEADS: dict[str, Head] = {"cross_entropy": by_cross_entropy, "our head": by_our_head}


def batches(rows: Sequence[Completion], trainer: ReMaxTrainer, max_rows: int | None = None) -> list[Batch]:
    """Returns the rows in micro-batches of the trainer's size, or of a number of rows."""
    if max_rows is None:
        lengths = [len(row.prompt.token_ids) + len(row.token_ids) for row in rows]
        groups = split_by_tokens(lengths, trainer.args.micro_batch_tokens)
    else:
        numbers = list(range(len(rows)))
        groups = [numbers[start : start + max_rows] for start in range(0, len(rows), max_rows)]
    pad = trainer.parts.tokenizer.pad_token_id
    return [collate([rows[i] for i in group], pad, torch.device("cpu")) for group in groups]


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Returns ids and mask [P, W]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Returns what the call returns, and its seconds."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started

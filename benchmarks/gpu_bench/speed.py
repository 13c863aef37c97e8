"""Decoding against the memory's bandwidth, and updates against the device's arithmetic."""

import contextlib
import inspect
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gpu_bench.session import Case
from gpu_bench.shapes import LLAMA_7B, PAD, Shape
from gpu_bench.training import Bench, InstantEngine, config_of, medians, one_step, prompts_of, random_model, trainer_of


def decode_cases(bench: Bench) -> Iterator[Case]:
    """Every engine on every shape."""
    from remax.rollout.embedded import EmbeddedEngine

    embedded: dict[str, dict[str, Any]] = {"embedded": {}}
    if "static" in inspect.signature(EmbeddedEngine.__init__).parameters:
        embedded = {"embedded": {"static": False}, "embedded static": {"static": True}}
    makers = {name: partial(embedded_engine, bench, settings) for name, settings in embedded.items()}
    makers["paged"] = partial(paged_engine, bench)
    for shape, rows in bench.decode_shapes:
        for name, make in makers.items():
            run = partial(decode, bench, shape, rows, make)
            yield Case(f"{shape.name}, {rows} rows, {name}", 60 if shape is LLAMA_7B else 40, run)


def embedded_engine(bench: Bench, settings: dict[str, Any], shape: Shape) -> Any:
    """Returns the embedded engine of a random model."""
    from remax.rollout.embedded import EmbeddedEngine

    return EmbeddedEngine(random_model(bench, shape), pad_token_id=PAD, **settings)


def paged_engine(bench: Bench, shape: Shape) -> Any:
    """Returns the paged engine, as --rollout_engine paged gives it; a UserError says why it cannot be used."""
    settings = {"method": "reinforce", "kl_mode": "none", "rollout_engine": "paged"}
    engine = trainer_of(bench, shape, config_of(bench, batch=2, completion=2, **settings)).parts.engine
    if "paged" not in type(engine).__module__:
        raise NotImplementedError("--rollout_engine paged gave another engine")
    return engine


def decode(bench: Bench, shape: Shape, rows: int, make: Callable[[Shape], Any]) -> dict[str, Any]:
    """Returns the time of a token step beside what reading weights and cache takes at the memory's bandwidth.

    A token step is the difference of two lengths over their distance: prefill and what an engine does once drop out.
    """
    from remax.interfaces import Prompt, Sampling

    engine = make(shape)
    prompts = [Prompt(i, "", ids) for i, ids in enumerate(prompts_of(bench, shape, rows))]

    def seconds(length: int) -> float:
        sampling = Sampling(length, eos_token_ids=())
        run = partial(engine.generate, prompts, sampling, num_samples=1, greedy=False, seed=0, step=1)
        bench.device.seconds(run)  # Graphs are captured and kernels chosen here.
        return min(bench.device.seconds(run) for _ in range(2))

    short, long = bench.decode_lengths
    first, second = seconds(short), seconds(long)
    token_step = (second - first) / (long - short)
    context = statistics.mean(len(prompt.token_ids) for prompt in prompts) + (short + long) / 2
    num_bytes = shape.decode_bytes(rows, context)
    return {
        "seconds_per_token_step": token_step,
        "tokens_per_second": rows / token_step,
        "tokens_per_second_with_prefill": rows * long / second,
        "bytes_per_token_step": num_bytes,
        "roofline_tokens_per_second": rows * bench.device.bandwidth / num_bytes,
        "fraction_of_roofline": num_bytes / bench.device.bandwidth / token_step,
        "fraction_of_copy_roofline": num_bytes / bench.device.copy_bandwidth / token_step,
    }


def train_cases(bench: Bench) -> Iterator[Case]:
    """Updates of several shapes and precisions."""
    for shape, settings in bench.train_cases:
        name = ", ".join([shape.name, *(f"{key} {value}" for key, value in settings.items())])
        yield Case(name, 90 if shape is LLAMA_7B else 40, partial(train, bench, shape, settings))


def train(bench: Bench, shape: Shape, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the model FLOP utilisation of an update: batching, forward, backward and optimiser.

    If memory runs out, it tries micro-batches of half the tokens, down to an eighth.
    """
    tokens = settings.get("micro_batch_tokens", 16384)
    for divisor in (1, 2, 4, 8):
        with contextlib.suppress(torch.OutOfMemoryError):
            return _train(bench, shape, {**settings, "micro_batch_tokens": tokens // divisor})
        bench.device.release()
    return {"out_of_memory": f"with {tokens // 8} tokens a micro-batch too"}


def _train(bench: Bench, shape: Shape, settings: dict[str, Any]) -> dict[str, Any]:
    settings = {"method": "reinforce", "kl_mode": "none", **settings}
    args = config_of(bench, batch=bench.train_batch, completion=bench.completion, **settings)
    trainer = trainer_of(bench, shape, args, engine=InstantEngine)
    one_step(trainer, 1)
    steps = [one_step(trainer, 2 + n) for n in range(bench.rounds)]
    rows = [(len(c.prompt.token_ids), len(c.token_ids)) for c in steps[-1][1].rollout.samples]
    seconds, flops = medians([own for own, _ in steps])["update"], shape.training_flops(rows)
    return {
        "mfu": flops / seconds / bench.device.flops,
        "mfu_of_measured_matmul": flops / seconds / bench.device.matmul_flops,
        "flops_per_second": flops / seconds,
        "tokens_per_second": sum(p + c for p, c in rows) / seconds,
        "update_seconds": seconds,
        "micro_batch_tokens": args.micro_batch_tokens,
        "peak_bytes": max(trainer.meter.peak_bytes.values()),
    }

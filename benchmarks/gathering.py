"""A rollout of sharded weights: gathered whole once, or layer by layer for every token.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m benchmarks.gathering --output benchmarks/results/gathering.json

Processes talk through gloo on a CPU; both ways take turns, and give the same completions.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

from remax.compare.runner import hardware, versions
from remax.interfaces import Completion, Prompt, Rollout, Sampling
from remax.processes import join_processes
from remax.recording import write_json
from remax.rollout.embedded import EmbeddedEngine
from remax.rollout.gathered import GatheredEngine
from remax.saving import merged_weights

NUM_PROMPTS, PROMPT_LENGTH, LENGTH, ROUNDS = 4, 16, 24, 3
SIZES = {"5M": (256, 4, 8), "20M": (512, 6, 8)}
"""Hidden size, layers, heads."""


def make_policy(hidden: int, layers: int, heads: int) -> Any:
    """Returns a Llama with random weights, the same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=128,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def shard(policy: Any) -> None:
    """Leaves this process with a part of every layer's weights."""
    for layer in policy.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(policy)


def measure(policy: Any, index: int) -> dict[str, Any]:
    """Returns the seconds of both ways, a round after the other, and how many bytes each process receives."""

    def engine(model: nn.Module) -> EmbeddedEngine:
        return EmbeddedEngine(model, pad_token_id=0)

    num_bytes = sum(parameter.nbytes for parameter in policy.parameters())
    whole = GatheredEngine(policy, engine, torch.device("cpu"), half=False)
    shard(policy)
    by_layer = engine(policy)
    generator = torch.Generator().manual_seed(index)
    prompts = [
        Prompt(i, "", torch.randint(3, 4096, (PROMPT_LENGTH,), generator=generator).tolist())
        for i in range(NUM_PROMPTS)
    ]
    sampling = Sampling(LENGTH, ())  # No EOS: processes that gather layer by layer have to decode equally long.
    seconds: dict[str, list[float]] = {"whole": [], "layer by layer": []}
    for _ in range(ROUNDS):
        found = []
        for name in seconds:
            torch.distributed.barrier()
            started = time.perf_counter()
            if name == "whole":
                with torch.no_grad():
                    whole.take(merged_weights(policy), 0)
            used = whole if name == "whole" else by_layer
            found.append(ids(used.generate(prompts, sampling, num_samples=1, greedy=True, seed=0, step=0)))
            if name == "whole":
                whole.release()
            torch.distributed.barrier()
            seconds[name].append(time.perf_counter() - started)
        assert found[0] == found[1], "both ways draw the same"
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["whole"], seconds["layer by layer"], strict=True)]
    return {"weights_bytes": num_bytes, "seconds": medians, "ratio": statistics.median(ratios)}


def ids(rollout: Rollout) -> list[list[int]]:
    rows: list[Completion] = [*rollout.samples, *rollout.greedy]
    return [row.token_ids for row in rows]


def main() -> None:
    """Measures all sizes and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    processes = join_processes()
    Accelerator()
    results = {name: measure(make_policy(*size), processes.index) for name, size in SIZES.items()}
    if processes.is_main:
        about = {"num_processes": processes.num, "backend": PartialState().backend, "tokens": LENGTH}
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}
        write_json(output, {**about, **threads, "hardware": hardware(), "versions": versions(), "results": results})
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

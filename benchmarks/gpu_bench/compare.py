"""ReMax beside REINFORCE, PPO and TRL: seconds of whole steps."""

import importlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

from gpu_bench.session import Case
from gpu_bench.training import (
    Bench,
    config_of,
    medians,
    one_step,
    prompts_of,
    random_model,
    reward_model,
    spread_reward,
    tokenizer_of,
    trainer_of,
)
from gpu_bench.verdicts import PPO_EPOCHS, ppo_case

MICRO_BATCH_TOKENS = 8192
"""Two trainers share the memory."""


def cases(bench: Bench) -> Iterator[Case]:
    """The price of the greedy baseline, and of PPO."""
    remax, reinforce = {"method": "remax"}, {"method": "reinforce"}
    yield Case("reinforce", 60, partial(compare, bench, over=remax, under=reinforce, learned_reward=False))
    for epochs in reversed(PPO_EPOCHS):  # The one with a target first.
        ppo = {"method": "ppo", "num_ppo_epochs": epochs}
        yield Case(ppo_case(epochs), 70 + 15 * epochs, partial(compare, bench, over=ppo, under=remax))


def compare(
    bench: Bench, over: dict[str, Any], under: dict[str, Any], *, learned_reward: bool = True
) -> dict[str, Any]:
    """Returns the ratio of two methods' step times: A B A B ..., the median of the ratios within a round."""
    shape = bench.compare_shape
    reward = reward_model(bench, shape) if learned_reward else spread_reward
    trainers = [trainer_of(bench, shape, _args(bench, settings), reward=reward) for settings in (over, under)]
    warm_up = [one_step(trainer, 1)[0]["step"] for trainer in trainers]
    steps: list[list[dict[str, float]]] = [[], []]
    for number in range(bench.rounds):
        if number and not bench.budget.allows(sum(own[-1]["step"] for own in steps)):
            break
        for own, trainer in zip(steps, trainers, strict=True):
            own.append(one_step(trainer, 2 + number)[0])
    ratios = [a["step"] / b["step"] for a, b in zip(*steps, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratios_by_round": ratios,
        "seconds": {own["method"]: medians(taken) for own, taken in zip((over, under), steps, strict=True)},
        "warm_up_seconds": warm_up,
        "engine": type(trainers[1].parts.engine).__name__,
    }


def _args(bench: Bench, settings: dict[str, Any]) -> Any:
    common = {"batch": bench.compare_batch, "completion": bench.completion, "micro_batch_tokens": MICRO_BATCH_TOKENS}
    return config_of(bench, **common, **settings)


def trl_cases(bench: Bench) -> Iterator[Case]:
    """TRL's trainers with two samples per prompt."""
    for name in ("RLOO", "GRPO"):
        yield Case(f"trl {name}", 100, partial(against_trl, bench, name))


def against_trl(bench: Bench, name: str) -> dict[str, Any]:
    """Returns seconds per step of a TRL trainer and of ReMax, same prompts, model and lengths, and their ratio."""
    if find_spec("trl") is None:
        return {"skipped": "trl is not installed; bring its wheel (--wheels)"}
    shape = bench.compare_shape
    trainer = trainer_of(bench, shape, _args(bench, {"method": "remax"}))
    ours = [one_step(trainer, 1 + n)[0]["step"] for n in range(1 + bench.rounds)][1:]
    del trainer
    bench.device.release()
    theirs = trl_steps(bench, name)[1:]
    seconds = {"remax": statistics.median(ours), f"trl {name}": statistics.median(theirs)}
    return {"ratio": seconds[f"trl {name}"] / seconds["remax"], "seconds": seconds}


def trl_steps(bench: Bench, name: str) -> list[float]:
    """Returns the seconds of the steps of a TRL trainer, the first of which warms up."""
    from datasets import Dataset
    from transformers import TrainerCallback

    trl: Any = importlib.import_module("trl")
    shape, batch = bench.compare_shape, bench.compare_batch
    starts: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            bench.device.synchronise()
            starts.append(time.perf_counter())

    tokenizer, rows = tokenizer_of(shape.vocab_size), min(16, batch)
    prompts = [{"prompt": tokenizer.decode(ids)} for ids in prompts_of(bench, shape, batch)]
    with tempfile.TemporaryDirectory() as folder:
        random_model(bench, shape).save_pretrained(folder)  # TRL reads its reference from there, too.
        tokenizer.save_pretrained(folder)
        args = getattr(trl, f"{name}Config")(
            output_dir=folder,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=2 * batch // rows,
            num_generations=2,
            max_completion_length=bench.completion,
            beta=0.05,
            learning_rate=1e-6,
            model_init_kwargs={"dtype": "bfloat16"},
            gradient_checkpointing=False,
            bf16=False,  # As ours: bfloat16 weights, no autocast over them.
            use_cpu=bench.device.type == "cpu",
            max_steps=2 + bench.rounds,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = getattr(trl, f"{name}Trainer")(
            model=folder,
            reward_funcs=spread_reward,
            args=args,
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    return [after - before for before, after in pairwise(starts)]

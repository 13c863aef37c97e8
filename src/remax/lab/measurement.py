"""What K gradients of every method at one checkpoint show, all taken from the same rollouts."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from remax.components import Components
from remax.config import OptimiserOptions, ReMaxConfig
from remax.errors import UserError
from remax.interfaces import Prompt
from remax.lab import statistics
from remax.lab.gradients import Costs, Draw, Estimator, draw_all, layers_of, same_advantages, scratch
from remax.lab.statistics import Agreement, Estimate, Floats
from remax.learner import Learner
from remax.logprobs import CompletionScorer
from remax.metrics import StepRecord

NUM_WARMUP = 10
"""Rollouts in front of the measured ones: they set the unit of --reward_offset and the baselines that learn."""
SCALED_BASELINES = ("group_mean", "value")
"""With these the expected gradient is not that of the reward: scaled by the samples' number and spread, or by a value
model."""


@dataclass(frozen=True)
class Figures:
    """What K gradients of a method show."""

    estimates: Mapping[str, Estimate]
    """By name, see `figures` and `measure`."""
    by_layer: Mapping[str, Estimate]
    """The variance of each layer; they add up to the whole."""
    cosines: Floats
    """[K], of each gradient to the mean of the others."""
    agreement: Agreement | None = None
    """With the first method whose expectation is the gradient of the reward."""
    same_expectation: bool = False
    """Whether its own expectation is that too."""
    num_generations: int = 1
    same_gradients: bool = False
    """Whether the offset changed no advantage, so that the gradients are those without it."""


@dataclass(frozen=True)
class Section:
    """All methods under one reward."""

    reward_offset: float
    """Standard deviation of the prompts' offsets, in units of the reward's own."""
    methods: Mapping[str, Figures]


@dataclass(frozen=True)
class Measurement:
    """An experiment's outcome."""

    num_weights: int
    reward_mean: float
    reward_std: float
    """Of all samples of the warm-up rollouts."""
    sections: Sequence[Section]


def measure(
    parts: Components,
    trainings: Mapping[str, ReMaxConfig],
    prompts: Sequence[Prompt],
    *,
    num_gradients: int,
    reward_offset: float,
    seed: int,
    folder: Path,
) -> Measurement:
    """Returns the figures of all methods, without and, unless it is 0, with the offset.

    All gradients come from the same rollouts, so what the methods share falls out of their ratios. To the estimates of
    `figures` come variance_ratio, to the first method, and offset_ratio, to the same method without offset. folder
    holds the gradients while they are measured.

    Raises:
        UserError: the gradients do not fit on the disk, or the rewards cannot be used.
    """
    learner = Learner(
        CompletionScorer(parts.policy), OptimiserOptions(), parts.accelerator, max_steps=1, rate_flag="learning_rate"
    )
    estimators = {label: Estimator(parts, training, learner) for label, training in trainings.items()}
    if any(training.bf16 for training in trainings.values()):  # as in training, after the value model is made
        parts.hold_frozen_in_bfloat16()
    bench = Bench(layers_of(parts.policy), num_gradients, seed, folder)
    print(f"Drawing {NUM_WARMUP + num_gradients} rollouts of {len(prompts)} prompts.")
    drawn = draw_all(
        parts,
        prompts,
        num_samples=max(training.num_generations for training in trainings.values()),
        greedy=any(training.needs_greedy for training in trainings.values()),
        seed=seed,
        steps=range(1, NUM_WARMUP + num_gradients + 1),
    )
    warmup, draws = drawn[:NUM_WARMUP], drawn[NUM_WARMUP:]
    reward_mean, reward_std = _scale(warmup, reward_offset)
    offsets = reward_std * torch.randn(len(prompts), generator=torch.Generator().manual_seed(seed))

    sections: list[Section] = []
    without_offset: dict[str, list[StepRecord]] = {}
    for size in (0.0, reward_offset) if reward_offset else (0.0,):
        methods: dict[str, Figures] = {}
        for label, estimator in estimators.items():
            records = estimator.records(draws, size * offsets, warmup)
            before = sections[0].methods[label] if sections else None
            if before is not None and same_advantages(records, without_offset[label]):
                print(f"The offset leaves all advantages of {label} as they are, and so its gradients.")
                own = replace(before, same_gradients=True)
            else:
                print(f"Taking {num_gradients} gradients of {label}{' with the offset' if size else ''}.")
                own = bench.figures(label, estimator, records)
            without_offset.setdefault(label, records)
            ratios = {
                "variance_ratio": _variance_ratio(own, next(iter(methods.values()), own)),
                "offset_ratio": _variance_ratio(own, before or own),
            }
            methods[label] = replace(own, estimates={**own.estimates, **ratios})
        sections.append(Section(size, methods))
    return Measurement(bench.num_weights, reward_mean, reward_std, sections)


class Bench:
    """Where gradients are taken and compared: room for those of one method, and of the one that others must agree with.

    That one is the first method whose expectation is the gradient of the reward.
    """

    def __init__(self, layers: Mapping[str, Sequence[slice]], num_gradients: int, seed: int, folder: Path) -> None:
        """Raises UserError if the disk of the folder cannot hold the gradients."""
        self.layers = layers
        self.num_weights = max(run.stop for runs in layers.values() for run in runs)
        _check_room(folder, num_gradients, self.num_weights)
        self.counts = statistics.resample_counts(num_gradients, seed)
        self.own, self.standard = (scratch(folder, num_gradients, self.num_weights) for _ in range(2))
        self.standard_label: str | None = None

    def figures(self, label: str, estimator: Estimator, records: Sequence[StepRecord]) -> Figures:
        """Returns what the gradients of a method show."""
        costs = estimator.gradients(records, out=self.own)
        shown = figures(statistics.gram_by_layer(self.own, self.layers), costs, self.counts)
        shown = replace(shown, num_generations=estimator.args.num_generations)
        if estimator.args.baseline in SCALED_BASELINES:
            return shown
        if self.standard_label in (None, label):
            self.standard_label = label
            self.own, self.standard = self.standard, self.own
            return replace(shown, same_expectation=True)
        differences = statistics.gram_by_layer(self.own, self.layers, minus=self.standard)
        return replace(shown, same_expectation=True, agreement=statistics.agreement(_total(differences), self.counts))


def figures(grams: Mapping[str, Floats], costs: Costs, counts: Floats) -> Figures:
    """Returns what gradients with these Gram matrices, layer by layer, show.

    variance: trace of the covariance. signal: squared length of the expected gradient. snr: signal / variance.
    relative_variance: its inverse, which does not depend on the gradient's scale. cosine: mean of `cosines`. no_signal,
    sampled_tokens, greedy_tokens, tokens: means over the gradients. variance_x_tokens: the variance that a budget of
    one token would give, so at any common budget methods compare as these. tokens_to_snr_1: relative_variance x tokens,
    the tokens whose gradients average to as much signal as noise.
    """
    gram = _total(grams)
    variance, signal = statistics.variance(gram, counts), statistics.signal(gram, counts)
    tokens = statistics.mean(costs.sampled_tokens + costs.greedy_tokens, counts)
    cosines = statistics.cosines(gram)
    estimates = {
        "variance": variance,
        "signal": signal,
        "snr": signal / variance,
        "relative_variance": variance / signal,
        "cosine": statistics.mean(cosines, counts),
        "no_signal": statistics.mean(costs.no_signal, counts),
        "sampled_tokens": statistics.mean(costs.sampled_tokens, counts),
        "greedy_tokens": statistics.mean(costs.greedy_tokens, counts),
        "tokens": tokens,
        "variance_x_tokens": variance * tokens,
        "tokens_to_snr_1": variance / signal * tokens,
    }
    return Figures(estimates, {name: statistics.variance(own, counts) for name, own in grams.items()}, cosines)


def _total(grams: Mapping[str, Floats]) -> Floats:
    result: Floats = np.sum(list(grams.values()), axis=0)
    return result


def _variance_ratio(figures: Figures, others: Figures) -> Estimate:
    return figures.estimates["variance"] / others.estimates["variance"]


def _scale(draws: Sequence[Draw], reward_offset: float) -> tuple[float, float]:
    """Returns mean and standard deviation of the rewards of all samples."""
    rewards = torch.cat([draw.rewards.sampled for draw in draws])
    rewards = rewards[rewards.isfinite()]
    std = rewards.std(correction=0).item()
    if reward_offset and not std > 0:
        raise UserError(
            f"--reward_offset is {reward_offset}: the rewards of all samples are equal, so their standard deviation is "
            "no unit for it; leave it out, or set other rewards."
        )
    return rewards.mean().item(), std


def _check_room(folder: Path, num_gradients: int, num_weights: int) -> None:
    """Raises UserError if the disk cannot hold the gradients: writing into a file that is too large would crash."""
    size, free = 2 * num_gradients * num_weights * 4, shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"--num_gradients is {num_gradients}: two sets of gradients of {num_weights} weights take {size / 1e9:.1f} "
            f"GB while they are measured, and {folder} has {free / 1e9:.1f} GB; set fewer, or an --output_dir on "
            "another disk."
        )

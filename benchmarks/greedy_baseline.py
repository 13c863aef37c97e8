"""How good a baseline is the greedy completion's reward? Rewards, advantages and gradients of real policies.

    OMP_NUM_THREADS=1 python -m benchmarks.greedy_baseline --reward_model OUT/reward/model \\
        --case "before training" MODEL OUT/openings/train.jsonl \\
        --case "after training" OUT/policy/model OUT/openings/train.jsonl \\
        --output benchmarks/results/greedy_baseline.json --images docs/images

Of every policy it draws many samples and the greedy completion of its prompts, and from other samples many gradients,
with what `remax lab` takes them. Four baselines are compared: none, a constant (the mean reward of all prompts, what a
moving average comes to), the greedy reward, and the prompt's expected reward, known from its samples: no rollout of a
step can have it, it is the mark to measure by. There is no KL in the returns.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import set_seed

from remax.batching import PromptOrder
from remax.components import Components
from remax.config import LabConfig, LabInputs, OptimiserOptions
from remax.interfaces import Prompt
from remax.lab.experiment import assemble_lab
from remax.lab.gradients import Draw, Estimator, draw_all, layers_of
from remax.lab.measurement import Bench
from remax.learner import Learner
from remax.logprobs import CompletionScorer
from remax.provenance import hardware, versions
from remax.recording import write_json

Floats = NDArray[np.float64]

BASELINES = {
    "none": "none",
    "constant": "mean reward of all prompts",
    "greedy": "greedy completion's reward",
    "expected": "the prompt's expected reward",
}
COLORS = {"none": "#999999", "constant": "#0072b2", "greedy": "#d55e00", "expected": "#009e73"}
"""Of Okabe and Ito's, which colour-blind readers tell apart."""


class Table(NamedTuple):
    """Rewards of S samples and the greedy completion of each of P prompts."""

    sampled: Floats
    """[P, S]"""
    greedy: Floats
    """[P]"""


@dataclass(frozen=True)
class Sizes:
    """How much is drawn."""

    num_prompts: int
    num_samples: int
    num_gradients: int
    max_completion_length: int
    seed: int


def describe(table: Table) -> dict[str, Any]:
    """Returns what the rewards tell of the baselines.

    A sample's squared advantage is (r - b)^2 = Var(r | x) + (E[r | x] - b)^2 in the mean: what no baseline of the
    prompt can take away, and the square of what the baseline misses the prompt's expected reward by. The means over S
    samples have a variance of their own, which is subtracted from the squares: nothing here grows as S shrinks.
    """
    num_prompts, num_samples = table.sampled.shape
    means = table.sampled.mean(axis=1)
    within = float(table.sampled.var(axis=1, ddof=1).mean())
    noise = within / num_samples
    missed = {
        "none": float((means**2).mean()) - noise,
        "constant": float(means.var()) - noise * (1 - 1 / num_prompts),
        "greedy": float(((means - table.greedy) ** 2).mean()) - noise,
        "expected": 0.0,
    }
    slope, intercept = np.polyfit(table.greedy, means, 1)
    residuals = means - slope * table.greedy - intercept
    return {
        "mean_reward": float(means.mean()),
        "mean_greedy_reward": float(table.greedy.mean()),
        "within_prompts": within,
        "between_prompts": missed["constant"],
        "missed": missed,
        "squared_advantage": {name: within + square for name, square in missed.items()},
        "correlation_greedy_mean": float(np.corrcoef(table.greedy, means)[0, 1]),
        "mean_minus_greedy": float((means - table.greedy).mean()),
        "regression_of_mean_on_greedy": {
            "slope": float(slope),
            "intercept": float(intercept),
            "residual_std": float(residuals.std(ddof=2)),
        },
        "greedy_above_mean": float((table.greedy > means).mean()),
    }


def table_of(draw: Draw) -> Table:
    """Returns the rewards of a rollout by prompt."""
    greedy = draw.rewards.greedy.numpy().astype(np.float64)
    table = Table(draw.rewards.sampled.numpy().astype(np.float64).reshape(len(greedy), -1), greedy)
    if not (np.isfinite(table.sampled).all() and np.isfinite(table.greedy).all()):
        raise SystemExit("Some completions have no reward: take shorter ones, or a reward that always applies.")
    return table


def gradients(
    parts: Components, args: LabConfig, prompts: Sequence[Prompt], table: Table, folder: Path
) -> dict[str, Any]:
    """Returns the variance of the gradient under every baseline, all from the same rollouts of one sample a prompt.

    A baseline that is a number per prompt is REINFORCE with that number taken off the prompt's rewards. The table is
    of other samples than these rollouts, so none of the numbers depends on a sample that it is subtracted from.
    """
    learner = Learner(
        CompletionScorer(parts.policy), OptimiserOptions(), parts.accelerator, max_steps=1, rate_flag="learning_rate"
    )
    means = torch.tensor(table.sampled.mean(axis=1), dtype=torch.float32)
    nothing = torch.zeros(len(prompts))
    taken_off = {
        "none": ("reinforce", nothing),
        "constant": ("reinforce", means.mean().expand(len(prompts))),
        "greedy": ("remax", nothing),
        "expected": ("reinforce", means),
    }
    draws = draw_all(parts, prompts, num_samples=1, greedy=True, seed=args.seed, steps=range(2, args.num_gradients + 2))
    bench = Bench(layers_of(parts.policy), args.num_gradients, args.seed, folder)
    measured = {}
    for name, (method, baselines) in taken_off.items():
        estimator = Estimator(parts, args.training(method), learner)
        measured[name] = bench.figures(name, estimator, estimator.records(draws, -baselines, []))
    best = measured["expected"].estimates["variance"]
    same = sum(s.token_ids == g.token_ids for draw in draws for s, g in zip(*vars(draw.rollout).values(), strict=True))
    return {
        "num_weights": bench.num_weights,
        "sample_is_greedy": same / (len(draws) * len(prompts)),
        "baselines": {
            name: {
                "variance": own.estimates["variance"].value,
                "interval": own.estimates["variance"].interval,
                "ratio_to_expected": (own.estimates["variance"] / best).value,
                "ratio_interval": (own.estimates["variance"] / best).interval,
                "relative_variance": own.estimates["relative_variance"].value,
                "cosine": own.estimates["cosine"].value,
                "no_signal": own.estimates["no_signal"].value,
            }
            for name, own in measured.items()
        },
    }


def measure(model: str, reward_model: str, prompts_file: str, sizes: Sizes) -> dict[str, Any]:
    """Returns all that is measured of one case."""
    set_seed(sizes.seed)
    args = LabConfig(
        methods=["remax", "reinforce"],
        batch_size=sizes.num_prompts,
        num_gradients=sizes.num_gradients,
        max_completion_length=sizes.max_completion_length,
        rollout_batch_size=1024,
        kl_mode="none",
        seed=sizes.seed,
    )
    inputs = LabInputs(model=model, reward_model=reward_model, train_dataset=prompts_file)
    trainings = {name: args.training(name) for name in args.methods}
    parts = assemble_lab(inputs, [reward_model], args, trainings)
    prompts = PromptOrder(parts.prompts, sizes.num_prompts, sizes.seed).batch(1)
    (many,) = draw_all(parts, prompts, num_samples=sizes.num_samples, greedy=True, seed=sizes.seed, steps=[1])
    table = table_of(many)
    surprise = [-sum(c.logprobs) / len(c.token_ids) for c in many.rollout.samples]
    with tempfile.TemporaryDirectory() as folder:
        own = gradients(parts, args, prompts, table, Path(folder))
    return {
        "entropy": float(np.mean(surprise)),
        "rewards": describe(table),
        "gradients": own,
        "greedy": table.greedy.tolist(),
        "sampled": table.sampled.round(4).tolist(),
    }


# Pictures -------------------------------------------------------------------------------------------------------------


def draw_rewards(cases: Mapping[str, Any], path: Path) -> None:
    """Draws every prompt's samples, their mean, and the baselines."""
    plt = _pyplot()
    figure, rows = plt.subplots(len(cases), 1, figsize=(10, 3.6 * len(cases)), sharey=True, squeeze=False)
    for axes, (label, measured) in zip(rows[:, 0], cases.items(), strict=True):
        sampled, greedy = np.array(measured["sampled"]), np.array(measured["greedy"])
        order = sampled.mean(axis=1).argsort()
        sampled, greedy = sampled[order], greedy[order]
        places = np.arange(len(greedy))
        axes.plot(np.repeat(places, sampled.shape[1]), sampled.ravel(), ".", color="#bbbbbb", markersize=2.5)
        axes.plot(places, sampled.mean(axis=1), "_", color=COLORS["expected"], markersize=9, markeredgewidth=2.2)
        axes.plot(places, greedy, "D", color=COLORS["greedy"], markersize=4.5)
        axes.axhline(sampled.mean(), color=COLORS["constant"], linewidth=1.2, linestyle="--")
        axes.axhline(0.0, color="#333333", linewidth=1.0, linestyle=":")
        axes.set_title(f"{label}: greedy against mean reward of a prompt, correlation {_correlation(measured):.2f}")
        axes.set_ylabel("reward")
        axes.set_xlim(-1, len(greedy))
        axes.set_xticks([])
    rows[-1, 0].set_xlabel("prompts, in the order of their mean reward")
    figure.legend(*_keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def draw_baselines(cases: Mapping[str, Any], path: Path) -> None:
    """Draws the mean squared advantage and the gradient's variance under every baseline."""
    plt = _pyplot()
    figure, grid = plt.subplots(len(cases), 2, figsize=(10, 2.5 * len(cases)), squeeze=False)
    names = list(BASELINES)
    for (left, right), (label, measured) in zip(grid, cases.items(), strict=True):
        rewards, by_baseline = measured["rewards"], measured["gradients"]["baselines"]
        within, scale = rewards["within_prompts"], max(rewards["squared_advantage"].values())
        for row, name in enumerate(names):
            missed = max(rewards["missed"][name], 0.0)
            left.barh(row, within, color="#cccccc")
            left.barh(row, missed, left=within, color=COLORS[name])
            left.text(within + missed + 0.01 * scale, row, f"{within + missed:.2f}", va="center")
            ratio, (low, high) = by_baseline[name]["ratio_to_expected"], by_baseline[name]["ratio_interval"]
            right.plot([low, high], [row, row], color=COLORS[name], linewidth=3, alpha=0.5)
            right.plot([ratio], [row], "o", color=COLORS[name], markersize=7)
            right.annotate(f"{ratio:.2f}", (ratio, row), (0, 7), textcoords="offset points", ha="center")
        left.set_xlim(right=1.13 * scale)
        left.set_yticks(range(len(names)), [BASELINES[name] for name in names])
        left.set_title(label, loc="left")
        right.set_xlim(left=0.0)
        right.axvline(1.0, color="#333333", linewidth=1.0, linestyle=":")
        right.set_yticks(range(len(names)), [""] * len(names))
        for axes in (left, right):
            axes.set_ylim(len(names) - 0.5, -0.7)
            axes.grid(False, axis="y")
    grid[-1, 0].set_xlabel("mean squared advantage\n(grey: the samples' own spread, colour: what the baseline misses)")
    grid[-1, 1].set_xlabel("variance of the gradient, as a ratio to the last row\n(bars are 95% intervals)")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from remax.lab.plot import MANNERS

    matplotlib.rcParams.update(MANNERS | {"figure.facecolor": "white", "axes.facecolor": "white"})
    return plt


def _correlation(measured: Mapping[str, Any]) -> float:
    return float(measured["rewards"]["correlation_greedy_mean"])


def _keys() -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    keys = {
        "a sample": Line2D([], [], color="#bbbbbb", marker=".", linestyle=""),
        "the prompt's mean": Line2D([], [], color=COLORS["expected"], marker="_", markeredgewidth=2.2, linestyle=""),
        "greedy completion": Line2D([], [], color=COLORS["greedy"], marker="D", linestyle=""),
        "mean of all prompts": Line2D([], [], color=COLORS["constant"], linestyle="--"),
        "no baseline": Line2D([], [], color="#333333", linestyle=":"),
    }
    return list(keys.values()), list(keys)


# The command ----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all cases, writes the results and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case",
        action="append",
        required=True,
        nargs=3,
        metavar=("LABEL", "MODEL", "PROMPTS"),
        help="a policy and prompts, as `remax train` takes them; may be repeated",
    )
    parser.add_argument("--reward_model", required=True, help="folder or hub name, with one label")
    parser.add_argument("--output", type=Path, required=True, help="the .json to write")
    parser.add_argument("--images", type=Path, help="folder for greedy-baseline.png and greedy-variance.png")
    parser.add_argument("--num_prompts", type=int, default=32)
    parser.add_argument("--num_samples", type=int, default=64, help="of a prompt, for the expected rewards")
    parser.add_argument("--num_gradients", type=int, default=30, help="of all prompts, one sample each")
    parser.add_argument("--max_completion_length", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    sizes = Sizes(**{name: getattr(options, name) for name in Sizes.__annotations__})
    for folder in filter(None, (options.output.parent, options.images)):
        folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    cases = {label: measure(model, options.reward_model, prompts, sizes) for label, model, prompts in options.case}
    results = {
        "sizes": vars(sizes),
        "hardware": hardware(),
        "versions": versions(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "seconds": round(time.perf_counter() - started, 1),
        "cases": cases,
    }
    write_json(options.output, results)
    if options.images:
        draw_rewards(cases, options.images / "greedy-baseline.png")
        draw_baselines(cases, options.images / "greedy-variance.png")


if __name__ == "__main__":
    main()

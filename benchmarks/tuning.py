"""Ease of tuning: the best held-out reward to expect after trying n random configurations, ReMax beside PPO.

    python benchmarks/tuning.py write --config benchmarks/sentiment.yaml --output tuning.yaml
    remax compare --config tuning.yaml --output_dir OUT
    python benchmarks/tuning.py curve OUT --output benchmarks/results/tuning

Every method draws its own settings at random from the ranges below (those that all methods share are the same in all
configurations); every configuration is one run. From N results, the expectation of the best of n drawn without
replacement is exact (Dodge et al., arXiv 1909.03004, draw with replacement): the m-th smallest is the largest of n with
probability C(m-1, n-1) / C(N, n).
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

NUM_CONFIGURATIONS = 16
RATE = (3e-5, 3e-3)


def log_uniform(generator: random.Random, bounds: tuple[float, float]) -> float:
    low, high = map(math.log, bounds)
    return float(f"{math.exp(generator.uniform(low, high)):.3g}")


def draw_remax(generator: random.Random) -> dict[str, Any]:
    return {"method": "remax", "learning_rate": log_uniform(generator, RATE)}


def draw_ppo(generator: random.Random) -> dict[str, Any]:
    return {
        "method": "ppo",
        "learning_rate": log_uniform(generator, RATE),
        "value_learning_rate": log_uniform(generator, RATE),
        "num_ppo_epochs": generator.choice([1, 2, 4]),
        "num_mini_batches": generator.choice([1, 2, 4]),
        "lam": generator.choice([0.9, 0.95, 1.0]),
        "cliprange": generator.choice([0.1, 0.2, 0.3]),
        "cliprange_value": generator.choice([0.1, 0.2, 0.5]),
        "whiten_advantages": generator.choice([True, False]),
    }


DRAW: dict[str, Callable[[random.Random], dict[str, Any]]] = {"remax": draw_remax, "ppo": draw_ppo}


def write(config: Path, output: Path, num_prompts: int) -> None:
    """Writes the comparison of all random configurations, under the common settings of another comparison."""
    comparison = yaml.safe_load(config.read_text())
    methods = {}
    for name, draw in DRAW.items():
        generator = random.Random(f"{name} 0")
        methods |= {f"{name}-{number:02}": draw(generator) for number in range(NUM_CONFIGURATIONS)}
    comparison |= {"methods": methods, "seeds": [100], "budget": "prompts", "budget_amount": num_prompts}
    output.write_text(yaml.safe_dump(comparison, sort_keys=False))


def expected_best(values: Sequence[float], n: int) -> float:
    """Returns the expectation of the largest of n of these values, drawn without replacement."""
    ordered, total = sorted(values), math.comb(len(values), n)
    return sum(value * math.comb(m, n - 1) / total for m, value in enumerate(ordered))


def curve(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Returns the expected best for every n, with 95% bootstrap intervals over the configurations."""
    generator = np.random.default_rng(seed)
    numbers = range(1, len(values) + 1)
    resamples = [generator.choice(values, size=len(values)) for _ in range(1000)]
    curves = np.array([[expected_best(resample.tolist(), n) for n in numbers] for resample in resamples])
    return {
        "expected_best": [expected_best(values, n) for n in numbers],
        "interval": np.percentile(curves, [2.5, 97.5], axis=0).T.tolist(),
        "values": list(values),
    }


def measure(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the curves of the learned reward, of the gold reward and of the objective that is maximised."""
    results = json.loads((folder / "results.json").read_text())
    beta = next(iter(results["methods"].values()))["settings"]["beta"]
    curves: dict[str, dict[str, Any]] = {}
    for quantity in ("reward", "gold", "objective"):
        for name in DRAW:
            own = [m["metrics"] for label, m in results["methods"].items() if label.rsplit("-", 1)[0] == name]
            if quantity == "objective":
                values = [m["reward"]["mean"] - beta * m["kl"]["mean"] for m in own]
            else:
                values = [m[quantity]["mean"] for m in own]
            curves.setdefault(quantity, {})[name] = curve(values)
    return {"curves": curves, **{name: results[name] for name in ("budget", "hardware", "versions", "commit")}}


def draw_curves(curves: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "reward": "held-out learned reward",
        "objective": "held-out learned reward - beta KL",
        "gold": "held-out gold reward",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for axis, (quantity, title) in zip(axes, titles.items(), strict=True):
        for (name, own), colour, marker in zip(curves[quantity].items(), ("#0072B2", "#D55E00"), "os", strict=True):
            numbers = range(1, len(own["expected_best"]) + 1)
            low, high = zip(*own["interval"], strict=True)
            axis.fill_between(numbers, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(numbers, own["expected_best"], color=colour, marker=marker, markersize=4, label=name)
        axis.set_xlabel("random configurations tried")
        axis.set_xticks([1, 4, 8, 12, NUM_CONFIGURATIONS])
        axis.set_title(f"best {title}, expected", fontsize=10)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("--config", type=Path, required=True)
    writing.add_argument("--output", type=Path, required=True)
    writing.add_argument("--num_prompts", type=int, default=1600)
    drawing = commands.add_parser("curve")
    drawing.add_argument("folder", type=Path)
    drawing.add_argument("--output", type=Path, required=True, help="path without suffix")
    options = parser.parse_args()
    if options.command == "write":
        write(options.config, options.output, options.num_prompts)
    else:
        measured = measure(options.folder)
        draw_curves(measured["curves"], options.output.with_suffix(".png"))
        options.output.with_suffix(".json").write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()

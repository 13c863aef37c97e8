"""The pictures and the table of docs/choosing.md, from the runs of `remax compare --config benchmarks/choosing.yaml`.

    remax compare --config benchmarks/choosing.yaml --output_dir out/choosing
    python benchmarks/choosing.py collect out/choosing --dictionary DATA/*.jsonl    # benchmarks/results/choosing.json
    python benchmarks/choosing.py draw                                              # the pictures, from that file alone
    python benchmarks/choosing.py tables                                            # the tables, likewise

DATA: the folder of the pairs that the reward models were trained on (docs/sentiment.md). Their words are the dictionary
that judges completions as language, which no reward model does.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remax.compare.records import Run, read_comparison, read_runs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "choosing.json"
IMAGES = ROOT / "docs" / "images"

STEP_METRICS = ("reward", "kl", "entropy", "grad_norm")
HELD_OUT = ("reward", "gold", "kl", "entropy")
DIGITS = 4
"""Significant digits that are kept of what is measured at every step."""
MAX_KL = 50.0
"""--max_kl, where the alarm is."""

BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
PICTURES: dict[str, dict[str, tuple[str, str, str]]] = {
    "beta": {
        "beta 0.001": ("beta 0.001: too low", ORANGE, "s"),
        "right": ("beta 0.1", BLUE, "o"),
        "beta 3": ("beta 3: too high", GREEN, "^"),
    },
    "rate": {
        "rate 3e-3": ("3e-3: too high", ORANGE, "s"),
        "right": ("3e-4", BLUE, "o"),
        "rate 1e-4": ("1e-4", PINK, "D"),
        "rate 1e-5": ("1e-5: too low", GREEN, "^"),
    },
    "batch": {
        "batch 8": ("8 prompts", ORANGE, "s"),
        "right": ("32 prompts", BLUE, "o"),
        "batch 128": ("128 prompts", GREEN, "^"),
        "batch 8, rate 1e-4": ("8 prompts, a third of the rate", PINK, "D"),
    },
}
"""By picture, which runs it shows and how: the name, the colour (Okabe and Ito's), the marker."""
BATCH_SIZES = ("batch 8", "right", "batch 128")
"""Runs that differ in nothing else."""

Floats = NDArray[np.float64]


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case: runs of letters."""
    return re.findall(r"[^\W\d_]+", text.lower())


def read_dictionary(paths: Iterable[Path]) -> set[str]:
    """Returns all words in the texts of JSON lines, whatever their columns are called."""
    texts = (text for path in paths for record in _read(path) for text in record.values() if isinstance(text, str))
    return {word for text in texts for word in words(text)}


def judge_words(completions: Iterable[str], dictionary: Set[str]) -> dict[str, float]:
    """Returns what the words of many completions show, without the last word of each, which the length limit may cut.

    real_words is the fraction that is in the dictionary, different_words how many there are when each counts once.
    """
    all_words = [word for text in completions for word in words(text)[:-1]]
    known = sum(word in dictionary for word in all_words)
    return {"real_words": known / len(all_words), "different_words": len(set(all_words))}


def step_noise(values: Sequence[float]) -> float:
    """Returns by how much a step's value differs from that of its neighbours by chance.

    The standard deviation of single steps about a smooth course: the root mean square of the differences of neighbours,
    over the square root of two.
    """
    return float(np.sqrt(np.mean(np.square(np.diff(values))) / 2))


def collect(folder: Path, dictionary: Set[str]) -> dict[str, Any]:
    """Returns what the pictures and the table need of a comparison's finished runs."""
    comparison = read_comparison(folder)
    methods = {
        label: {
            "settings": {name: runs[0].summary["settings"][name] for name in ("beta", "learning_rate", "batch_size")},
            "runs": [_collect_run(folder / "runs" / label / f"seed{run.seed}", run, dictionary) for run in runs],
        }
        for label, runs in read_runs(folder, comparison).items()
        if runs
    }
    about = {name: comparison[name] for name in ("budget", "shared", "hardware", "versions", "commit", "date")}
    return {"command": "remax compare --config benchmarks/choosing.yaml", **about, "methods": methods}


def _collect_run(home: Path, run: Run, dictionary: Set[str]) -> dict[str, Any]:
    evaluations = [_held_out(record) for record in run.evaluations]
    texts: dict[int, list[str]] = defaultdict(list)
    for record in _read(home / "eval_completions.jsonl"):
        texts[record["step"]].append(record["completion"])
    for evaluation in evaluations:
        evaluation |= judge_words(texts[evaluation["step"]], dictionary)
    steps = {name: [_rounded(step[name]) for step in run.steps] for name in STEP_METRICS}
    alarms = [{name: alarm[name] for name in ("step", "alarm", "message")} for alarm in _read(home / "alarms.jsonl")]
    example = {evaluation["step"]: texts[evaluation["step"]][0] for evaluation in evaluations}
    return {"seed": run.seed, "evaluations": evaluations, "steps": steps, "alarms": alarms, "first_prompt": example}


def _held_out(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("step", "prompts", *HELD_OUT)}


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


# Tables ---------------------------------------------------------------------------------------------------------------


def outcomes(results: Mapping[str, Any]) -> str:
    """Returns the last evaluations as a table in Markdown, one row for each setting.

    Means over seeds, of the gold reward with the smallest and the largest; of the gradient's norm the median of the
    second half of the steps; of each seed the first alarm of a kind.
    """
    lines = [
        "| runs | seeds | learned | gold | KL, nats | entropy | `grad_norm` | real words | different | alarm, step |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for label, method in results["methods"].items():
        last = [run["evaluations"][-1] for run in method["runs"]]
        mean = {name: statistics.mean(end[name] for end in last) for name in last[0]}
        gold = [end["gold"] for end in last]
        spread = f" ({min(gold):.2f} to {max(gold):.2f})" if len(gold) > 1 else ""
        lines.append(
            f"| {label} | {len(last)} | {mean['reward']:.2f} | {mean['gold']:.2f}{spread} | {mean['kl']:.1f} "
            f"| {mean['entropy']:.2f} | {_gradient_norm(method):.0f} | {mean['real_words']:.0%} "
            f"| {mean['different_words']:.0f} | {_first_alarms(method['runs'])} |"
        )
    return "\n".join(lines)


def _gradient_norm(method: Mapping[str, Any]) -> float:
    return statistics.mean(statistics.median(_second_half(run["steps"]["grad_norm"])) for run in method["runs"])


def _second_half(values: Sequence[float]) -> Sequence[float]:
    return values[len(values) // 2 :]


def _first_alarms(runs: Sequence[Mapping[str, Any]]) -> str:
    steps: dict[str, list[int]] = defaultdict(list)
    for run in runs:
        for name in dict.fromkeys(alarm["alarm"] for alarm in run["alarms"]):
            steps[name].append(min(alarm["step"] for alarm in run["alarms"] if alarm["alarm"] == name))
    return "; ".join(f"`{name}` {', '.join(map(str, found))}" for name, found in steps.items()) or "none"


def noise(results: Mapping[str, Any]) -> str:
    """Returns how noisy the steps of each batch size are as a table in Markdown, from the second half of the runs."""
    lines = ["| prompts per step | steps | noise of `reward` | median `grad_norm` |", "|---:|---:|---:|---:|"]
    for method in _with_common_seeds(results, BATCH_SIZES)["methods"].values():
        rewards = [run["steps"]["reward"] for run in method["runs"]]
        of_reward = statistics.mean(step_noise(_second_half(own)) for own in rewards)
        batch_size, num_steps = method["settings"]["batch_size"], len(rewards[0])
        lines.append(f"| {batch_size} | {num_steps} | {of_reward:.2f} | {_gradient_norm(method):.0f} |")
    return "\n".join(lines)


# Pictures -------------------------------------------------------------------------------------------------------------


def draw(results: Mapping[str, Any], images: Path) -> list[Path]:
    """Draws the pictures whose runs are there into a folder and returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    manners = {"font.size": 11, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False}
    paths = []
    with matplotlib.rc_context(manners | {"axes.spines.right": False, "axes.titlesize": 11}):
        for name, looks in PICTURES.items():
            shown = {label: look for label, look in looks.items() if label in results["methods"]}
            if len(shown) < 2:
                continue
            figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), layout="constrained")
            _PANELS[name](axes.flat, _with_common_seeds(results, shown), shown)
            for axis in axes[1]:
                axis.set_xlabel("prompts seen")
            lines = [
                Line2D([], [], color=colour, marker=m, linewidth=2, label=text) for text, colour, m in shown.values()
            ]
            figure.legend(handles=lines, loc="outside upper center", ncols=len(shown), frameon=False)
            paths.append(images / f"choosing-{name}.png")
            figure.savefig(paths[-1], dpi=150, facecolor="white")
            plt.close(figure)
    return paths


def _with_common_seeds(results: Mapping[str, Any], labels: Iterable[str]) -> dict[str, Any]:
    """Returns the results of some runs with the seeds that all of them have, so that like is beside like."""
    methods = {label: results["methods"][label] for label in labels}
    common = set.intersection(*({run["seed"] for run in method["runs"]} for method in methods.values()))
    return {
        "methods": {
            label: {**method, "runs": [run for run in method["runs"] if run["seed"] in common]}
            for label, method in methods.items()
        }
    }


def _draw_beta(axes: Iterable[Any], results: Mapping[str, Any], looks: Mapping[str, tuple[str, str, str]]) -> None:
    reward, gold, kl, real = axes
    _held_out_curves(reward, results, looks, "reward", "learned reward, held out (eval/reward)")
    _held_out_curves(gold, results, looks, "gold", "gold reward, held out (eval/gold)")
    _held_out_curves(kl, results, looks, "kl", "KL, nats per sequence (eval/kl)")
    _mark_alarm(kl)
    _held_out_curves(real, results, looks, "real_words", "words that exist, held out")
    real.yaxis.set_major_formatter(lambda fraction, _: f"{fraction:.0%}")


def _draw_rate(axes: Iterable[Any], results: Mapping[str, Any], looks: Mapping[str, tuple[str, str, str]]) -> None:
    reward, gold, kl, entropy = axes
    _held_out_curves(reward, results, looks, "reward", "learned reward, held out (eval/reward)")
    _held_out_curves(gold, results, looks, "gold", "gold reward, held out (eval/gold)")
    _step_curves(kl, results, looks, "kl", "KL, nats per sequence (kl)")
    kl.set_yscale("symlog", linthresh=1)
    kl.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    _mark_alarm(kl)
    _step_curves(entropy, results, looks, "entropy", "entropy, nats per token (entropy)")
    entropy.set_ylim(bottom=0)


def _draw_batch(axes: Iterable[Any], results: Mapping[str, Any], looks: Mapping[str, tuple[str, str, str]]) -> None:
    single, norm, reward, kl = axes
    sizes = {label: look for label, look in looks.items() if label in BATCH_SIZES}  # two noisy curves hide each other
    _step_curves(single, results, sizes, "reward", "reward of each step, first seed (reward)", num_seeds=1)
    _step_curves(norm, results, sizes, "grad_norm", "gradient norm before clipping (grad_norm)", num_seeds=1)
    norm.set_yscale("log")
    norm.set_yticks([20, 50, 100, 200, 400], ["20", "50", "100", "200", "400"])
    norm.minorticks_off()
    _held_out_curves(reward, results, looks, "reward", "learned reward, held out (eval/reward)")
    _held_out_curves(kl, results, looks, "kl", "KL, nats per sequence (eval/kl)")


_PANELS = {"beta": _draw_beta, "rate": _draw_rate, "batch": _draw_batch}


def _held_out_curves(
    axis: Any, results: Mapping[str, Any], looks: Mapping[str, tuple[str, str, str]], name: str, title: str
) -> None:
    """Draws every seed thin and their mean strong, against the prompts seen."""
    for label, (_, colour, marker) in looks.items():
        runs = results["methods"][label]["runs"]
        prompts = [evaluation["prompts"] for evaluation in runs[0]["evaluations"]]
        curves = np.array([[evaluation[name] for evaluation in run["evaluations"]] for run in runs])
        axis.plot(prompts, curves.T, color=colour, linewidth=0.8, alpha=0.45)
        axis.plot(prompts, curves.mean(0), color=colour, marker=marker, markersize=5, linewidth=2)
    axis.set_title(title)


def _step_curves(
    axis: Any,
    results: Mapping[str, Any],
    looks: Mapping[str, tuple[str, str, str]],
    name: str,
    title: str,
    num_seeds: int | None = None,
) -> None:
    """Draws every seed's steps, against the prompts seen."""
    for label, (_, colour, _) in looks.items():
        method = results["methods"][label]
        for run in method["runs"][:num_seeds]:
            values = np.array(run["steps"][name], dtype=np.float64)
            prompts = method["settings"]["batch_size"] * np.arange(1, len(values) + 1)
            axis.plot(prompts, values, color=colour, linewidth=1.0)
    axis.set_title(title)


def _mark_alarm(axis: Any) -> None:
    axis.axhline(MAX_KL, color="0.35", linestyle="--", linewidth=1)
    place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top"}
    axis.annotate("alarm (--max_kl)", (1, MAX_KL), color="0.35", **place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("collect", "draw", "tables"):
        command = commands.add_parser(name)
        command.add_argument("--results", type=Path, default=RESULTS)
        if name == "collect":
            command.add_argument("folder", type=Path, help="what `remax compare` wrote")
            command.add_argument(
                "--dictionary", type=Path, nargs="+", required=True, help="JSON lines with English texts"
            )
        elif name == "draw":
            command.add_argument("--images", type=Path, default=IMAGES)
    options = parser.parse_args()
    if options.command == "collect":
        text = json.dumps(collect(options.folder, read_dictionary(options.dictionary)))
        options.results.write_text(text.replace('{"seed"', '\n{"seed"') + "\n", encoding="utf-8")
        return
    results = json.loads(options.results.read_text(encoding="utf-8"))
    if options.command == "tables":
        print(outcomes(results), noise(results), sep="\n\n")
    else:
        print("\n".join(map(str, draw(results, options.images))))


if __name__ == "__main__":
    main()

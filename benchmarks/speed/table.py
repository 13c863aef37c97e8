"""The results as Markdown."""

import statistics
from typing import Any

MEBIBYTE = 2**20


def markdown(results: dict[str, Any]) -> str:
    """Returns the tables of all parts that were run."""
    hardware, versions, parts = results["hardware"], results["versions"], results["parts"]
    lines = [
        "# Time and memory of a step",
        "",
        f"`{results['command']}` on {hardware['cpu']}, one thread each; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        *_targets(results["targets"]),
    ]
    for part, write in (("competitors", _competition), ("baseline", _competition), ("floor", _floor)):
        for name, case in parts.get(part, {}).items():
            lines += ["", f"## {TITLES[part]}: {name}", "", *write(case)]
    for name, curve in parts.get("scaling", {}).items():
        lines += ["", f"## Scaling with {name}", "", *_curve(name, curve)]
    return "\n".join(lines) + "\n"


TITLES = {
    "competitors": "Against TRL",
    "baseline": "The price of the greedy baseline, and the authors' schedule",
    "floor": "A step and its floor",
}


def _targets(targets: list[dict[str, Any]]) -> list[str]:
    rows = [
        f"| {own['name']} | {own['target']} | {own['measured']:.2f} | {'yes' if own['met'] else '**no**'} |"
        for own in targets
    ]
    return ["| target | | measured | met |", "|---|---|---:|---|", *rows]


def _competition(case: dict[str, Any]) -> list[str]:
    first = next(iter(case["competitors"]))
    lines = [
        f"{case['prompts']} prompts; completions of {statistics.mean(case['completion_lengths']):.0f} tokens on "
        f"average and at most {max(case['completion_lengths'])}; {case['weights']} weights. Ratios are to {first}.",
        *(f"Time of ReMax / REINFORCE, {kind}: {ratio:.2f}." for kind, ratio in case.get("price", {}).items()),
        "",
        "| | ms per prompt | time ratio | counted GFLOP | FLOP ratio | peak live tensors, MiB | ratio | "
        "peak resident, MiB | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, own in case["competitors"].items():
        ratio = case["ratios"].get(name, {"time": 1, "flops": 1, "live_bytes": 1, "resident_bytes": 1})
        lines.append(
            f"| {name} | {own['seconds_per_prompt'] * 1000:.1f} | {ratio['time']:.2f} | {own['flops'] / 1e9:.1f} | "
            f"{ratio['flops']:.2f} | {own['live_bytes'] / MEBIBYTE:.0f} | {ratio['live_bytes']:.2f} | "
            f"{own['resident_bytes'] / MEBIBYTE:.0f} | {ratio['resident_bytes']:.2f} |"
        )
    return lines


def _floor(case: dict[str, Any]) -> list[str]:
    medians = {name: statistics.median(seconds) for name, seconds in case["seconds"].items()}
    rows = [f"| {name} | {seconds:.3f} |" for name, seconds in medians.items()]
    return [
        f"{case['prompts']} prompts, completions of {case['max_completion_length']} tokens. The floor adds up the "
        f"calls below the step; of several ways to make one the fastest counts ({'; '.join(case['fastest'])}). "
        f"Step / floor: {case['step_of_floor']:.2f}.",
        "",
        "| | seconds |",
        "|---|---:|",
        *rows,
        f"| floor | {case['floor']:.3f} |",
    ]


def _curve(name: str, curve: dict[str, Any]) -> list[str]:
    rows = [
        f"| {point['x']:,} | {statistics.median(point['seconds']):.2f} | {point['flops'] / 1e9:.1f} | "
        f"{point['live_bytes'] / MEBIBYTE:.0f} | {point['beyond_bytes'] / MEBIBYTE:.0f} |"
        for point in curve["points"]
    ]
    return [
        f"Fitted exponents: time {curve['time_exponent']:.2f}, peak live tensors {curve['memory_exponent']:.2f}.",
        "",
        f"| {name} | seconds | counted GFLOP | peak live tensors, MiB | beyond weights, gradients, optimiser state |",
        "|---:|---:|---:|---:|---:|",
        *rows,
    ]

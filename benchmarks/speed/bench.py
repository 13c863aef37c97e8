"""The command: all parts, one after the other, and their results in one file."""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.speed import floor, scaling
from benchmarks.speed.cases import FIFTY_MILLION, LIKE_TINYSTORIES, Case, Setting, Shape, write
from benchmarks.speed.competitors import AUTHORS, OURS, TRL
from benchmarks.speed.process import alone
from benchmarks.speed.rounds import compete, ratios
from benchmarks.speed.table import markdown
from benchmarks.speed.targets import targets

from remax.compare.runner import hardware, versions
from remax.recording import write_json

OUTPUT = Path(__file__).resolve().parents[1] / "results" / "speed" / "results.json"
TINY = Case("tinystories-260k", LIKE_TINYSTORIES, 32, 25, 48, rounds=9)
LARGE = Case("llama-50m", FIFTY_MILLION, 8, 16, 32)
FIXED = [TINY, LARGE]
RAGGED = [
    # The longest completion is 2.7 times the mean.
    replace(TINY, max_completion_length=128, mean_length=48, rounds=7),
    replace(LARGE, max_completion_length=48, mean_length=18),
]
TOY = Case("toy", Shape(32, 64, 2, 2, 64), 4, 8, 12, rounds=2)
PARTS = ("competitors", "baseline", "floor", "scaling")


def run(part: str, quick: bool, folder: Path) -> dict[str, Any]:
    """Returns the results of one part, by case or curve."""
    fixed = [TOY] if quick else FIXED
    ragged = [replace(TOY, mean_length=5.0)] if quick else RAGGED
    if part == "competitors":
        return _each([*fixed, *ragged], folder, lambda setting: compete(setting, ["remax", *TRL], folder))
    if part == "baseline":
        return _each(fixed, folder, lambda setting: baseline(setting, folder))
    if part == "floor":
        return _each(fixed, folder, lambda setting: alone(floor.measure, setting))
    return {
        name: _announced(f"scaling with {name}", partial(alone, scaling.measure, points, folder))
        for name, points in scaling.curves(quick).items()
    }


def baseline(setting: Setting, logs: Path) -> dict[str, Any]:
    """Returns ReMax beside REINFORCE, with and without a KL, and beside the authors' schedule."""
    results = compete(setting, [*OURS, AUTHORS], logs)
    seconds = {name: own["seconds"] for name, own in results["competitors"].items()}
    price = {
        "with KL": statistics.median(ratios(seconds["remax"], seconds["reinforce"])),
        "no KL": statistics.median(ratios(seconds["remax, no KL"], seconds["reinforce, no KL"])),
    }
    return results | {"price": price}


def _each(cases: Sequence[Case], folder: Path, measure: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    return {case.name: _announced(case.name, partial(measure, write(case, folder))) for case in cases}


def _announced(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started = time.perf_counter()
    result = measure()
    print(f"  {name}: {time.perf_counter() - started:.0f} s", flush=True)
    return result


def earlier_parts(output: Path, here: dict[str, Any]) -> dict[str, Any]:
    """Returns the parts in an earlier file; none if they were run under other conditions than here."""
    if not output.exists():
        return {}
    earlier = json.loads(output.read_text(encoding="utf-8"))
    changed = [name for name in here if earlier.get(name) != here[name]]
    if changed:
        print(f"The parts in {output} were run with other {' and '.join(changed)}; they are not kept.", flush=True)
        return {}
    parts: dict[str, Any] = earlier["parts"]
    return parts


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the parts asked for and writes the results after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the others keep their results")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the table is written beside it")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, measures nothing")
    options = parser.parse_args(arguments)
    here = {"hardware": hardware() | {"threads": 1}, "versions": versions(), "quick": options.quick}
    parts = earlier_parts(options.output, here)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            print(part, flush=True)
            parts[part] = run(part, options.quick, Path(folder))
            ordered = {name: parts[name] for name in PARTS if name in parts}
            results = {
                "command": "python -m benchmarks.speed",
                **here,
                "environment": {"OMP_NUM_THREADS": "1"},
                "targets": targets(ordered),
                "parts": ordered,
            }
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.output, results)
            options.output.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    for own in results["targets"]:
        print(f"{'met   ' if own['met'] else 'missed'}  {own['measured']:6.2f}  {own['target']:24}  {own['name']}")

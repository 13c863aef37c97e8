"""What remax does on one CUDA GPU, held against the limits of the hardware, against PPO and against TRL.

    python benchmarks/gpu.py --quick --output quick.json            every part at toy shapes: does it run here?
    python benchmarks/gpu.py --parts decode train --output a.json   real shapes, at most 8 minutes a call
    python benchmarks/gpu.py --parts memory --output b.json
    python benchmarks/gpu.py --parts compare trl --output c.json

Nothing is downloaded: models have real shapes and random weights, which are drawn on the GPU. The clock is checked
before every measurement; what no longer fits into --minutes is skipped and named. The results are written after every
measurement, so a call that is cut off leaves what it had. `--device cpu --quick` runs the same code without a GPU.

Needed: torch, transformers, accelerate, peft, rich, pyyaml, and datasets with dill, multiprocess and xxhash. Better
with torchao (the 8-bit optimiser of the 7B model) and trl (the part of that name). What a machine without network lacks
can be brought as wheels; they are unpacked (as `python -m zipfile -e` does) and put behind what is installed:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 \
        --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 -d wheels \
        datasets "dill<0.4.2" "multiprocess<0.70.20" torchao trl
    python benchmarks/gpu.py --wheels wheels ...
"""

# ruff: noqa: E402 - the environment and the path have to be set before what reads them is imported

import argparse
import importlib
import os
import platform
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Read when torch first allocates; without it, pieces of ragged micro-batches waste memory that a cap then counts.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

import torch
from gpu_bench import compare, memory, speed
from gpu_bench.device import Cuda, Device
from gpu_bench.session import Budget, Case, Report, run_case
from gpu_bench.training import Bench

PARTS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "decode": speed.decode_cases,
    "train": speed.train_cases,
    "memory": memory.cases,
    "compare": compare.cases,
    "trl": compare.trl_cases,
}
NEEDED = ("transformers", "accelerate", "peft", "datasets", "dill", "multiprocess", "xxhash", "pyarrow", "rich", "yaml")
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "torchao", "trl")


def unpack(wheels: Path) -> None:
    """Unpacks the wheels of a folder and puts them behind what is installed, so that they fill gaps only."""
    folder = tempfile.mkdtemp(prefix="remax-wheels-")
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    sys.path.append(folder)
    importlib.invalidate_caches()


def versions() -> dict[str, str | None]:
    """Returns the versions that matter; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def make_device(kind: str) -> Device:
    """Returns the device, on which Accelerate puts models too."""
    if kind == "cpu":
        if torch.cuda.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
        return Device()
    if not torch.cuda.is_available():
        sys.exit("--device is cuda: torch sees no CUDA GPU here; set --device cpu --quick to try the script without.")
    return Cuda()


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Runs the parts that were asked for and returns their results, by part and measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing starts that may end later")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy shapes: the paths, not the figures")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to unpack for this call")
    options = parser.parse_args(arguments)
    budget = Budget(options.minutes)
    if options.wheels:
        unpack(options.wheels)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        sys.exit(f"{', '.join(missing)} cannot be imported: remax needs it; install it, or bring wheels (--wheels).")
    if options.device == "cpu" and not options.quick:
        sys.exit("--device is cpu: real shapes would take hours there; set --quick too.")
    device = make_device(options.device)
    bench = Bench(device, budget).quick() if options.quick else Bench(device, budget)
    given = sys.argv[1:] if arguments is None else arguments
    head = {"command": " ".join(["python", "benchmarks/gpu.py", *given]), "versions": versions()}
    head |= {"device": device.measure(), "minutes": options.minutes, "quick": options.quick}
    device.release()
    report = Report(options.output, head, judge=not options.quick)
    for part in options.parts:
        for case in PARTS[part](bench):
            case = replace(case, estimate=5) if options.quick else case
            report.add(part, case.name, run_case(case, device, budget))
    print(f"{options.output}: {60 * options.minutes - budget.left:.0f} s", flush=True)
    return report.parts


if __name__ == "__main__":
    main()

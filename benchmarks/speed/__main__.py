"""Runs the benchmark on one thread and no GPU; see bench.py."""

import os

SETTINGS = {
    "OMP_NUM_THREADS": "1",  # Two threads that fight for a busy second core are many times slower than one.
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}

if __name__ == "__main__":
    os.environ |= SETTINGS  # before torch is imported, here and in the processes that compete

    from benchmarks.speed.bench import main

    main()

"""Fixtures shared by all tests. One thread: a busy second core makes two-thread torch many times slower."""

import os
import signal
import threading

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    # A shell's background job ignores Ctrl-C, and so would all that the tests start, which they interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder beside the project with a real pretrained model and real data."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with a pretrained model and data, which is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def tinystories(shared: Path) -> Path:
    """A real Llama of 260k parameters, trained on TinyStories."""
    return shared / "models" / "tinystories-260k"

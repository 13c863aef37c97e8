"""What torch.compile needs of a machine."""

import os
import shutil
import sys

from remax.errors import UserError


def check_compiler(setting: str, *, instead: str) -> None:
    """Raises UserError if there is no C++ compiler, which torch.compile calls, on CUDA too, for what runs on the CPU.

    setting: what was set, as "--flag is value". instead: what to set on a machine without a compiler.
    """
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if sys.platform != "win32" and shutil.which(name) is None:
        raise UserError(
            f"{setting}: that compiles code, and there is no C++ compiler {name} on this machine; install one (or name "
            f"yours in the environment variable CXX), or set {instead}."
        )

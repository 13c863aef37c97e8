"""Settings of `remax init` and `remax completion`."""

from dataclasses import dataclass
from typing import Literal

from remax.options import Options


@dataclass(frozen=True)
class InitConfig(Options):
    """Starter file"""

    recipe: str | None = None
    """Name of a recipe; without it, all of them are listed. It may stand without the flag: `remax init RECIPE`."""
    output: str = "run.yaml"
    """File to write, which must not be there yet."""


@dataclass(frozen=True)
class CompletionConfig(Options):
    """Shell"""

    shell: Literal["bash", "zsh", "fish"]
    """The shell whose script is printed. It may stand without the flag: `remax completion bash`."""

"""Out of memory: the same work again in smaller pieces, for the rest of the run.

What is cut are passes whose results do not depend on how they are cut, up to float32 rounding: the micro-batches of
policy, value model and reference, the rows that are decoded together (their noise is keyed by prompt, sample and
position), and the batches of a reward model.
"""

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from remax.errors import GuardStop, UserError

T = TypeVar("T")

CPU_MESSAGES = ("can't allocate memory", "not enough memory")
"""What torch's allocator for the CPU says; it has no exception of its own."""


class MemoryGuard:
    """The sizes of passes: as they are set, until memory does not suffice; from then on what did suffice."""

    def __init__(self, *, redoes: bool = True) -> None:
        """redoes: False where several processes take passes together: what one did again the others would wait for."""
        self.redoes = redoes
        self.halves = True
        """False lets the error pass, for who measures what fits."""
        self.limits: dict[str, int] = {}
        """By setting, the size that takes its place."""
        self.num_redone = 0
        """Passes that were done again."""
        self.news: list[dict[str, Any]] = []
        """What happened since somebody looked."""

    def size(self, setting: str, as_set: int) -> int:
        """Returns the size to use where a setting has this value."""
        return min(as_set, self.limits.get(setting, as_set))

    def run(self, setting: str, as_set: int, work: Callable[[int], T], *, whole: int, smallest: int) -> T:
        """Returns work(size), having halved the size and done the work again as often as memory did not suffice.

        setting: name of the size; as_set: its value. whole: the size that is all of the work at once, beyond which
        halving would change nothing. smallest: the size that cannot be cut.

        Raises:
            GuardStop: memory does not suffice for the smallest size.
            UserError: it does not suffice, and several processes work together.
        """
        while True:
            size = self.size(setting, as_set)
            try:
                return work(size)
            except (RuntimeError, MemoryError) as error:
                if not (self.halves and is_out_of_memory(error)):
                    raise
                reason = _first_sentence(error)
            # Not inside of except: there the traceback would keep the tensors of the failed attempt alive.
            free_memory()
            self._halve(setting, min(size, whole), smallest, reason)

    def _halve(self, setting: str, size: int, smallest: int, reason: str) -> None:
        if not self.redoes:
            raise UserError(
                f"--{setting} is {size} here: memory does not suffice ({reason}), and where several processes wait for "
                f"each other nothing is done again; set --{setting} {max(1, size // 2)}, and go on with --resume auto "
                "--allow_config_change."
            )
        if size <= smallest:
            raise GuardStop(
                f"memory does not suffice ({reason}), and with {setting} {size} there is nothing left to be halved: "
                "`remax plan` with the same settings shows what takes the memory, and what would fit."
            )
        self.limits[setting] = half = max(smallest, size // 2)
        self.num_redone += 1
        message = (
            f"Out of memory ({reason}): done again with {setting} {half} instead of {size}, which holds for the rest "
            f"of the run; --{setting} {half} would spare the attempt"
        )
        self.news.append({"event": "out_of_memory", "setting": setting, "from": size, "to": half, "message": message})

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next steps depend on."""
        return {"limits": dict(self.limits), "num_redone": self.num_redone}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.limits, self.num_redone = dict(state["limits"]), state["num_redone"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in CPU_MESSAGES)


def free_memory() -> None:
    """Gives back what nothing refers to any more, on a GPU to the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_sentence(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0].strip()[:200]

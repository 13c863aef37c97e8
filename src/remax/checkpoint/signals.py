"""Ctrl-C and SIGTERM wait for the end of a step, so that the state can be saved; a second one stops at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from remax.errors import Interrupted

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopSignals:
    """Notes the first signal instead of stopping; only in the main thread, where alone Python receives signals."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def catch(self) -> None:
        """Begins to wait; a signal that this process ignores stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in NAMES:
            former = signal.getsignal(number)
            if former not in (signal.SIG_IGN, None):
                self._former[number] = former
                signal.signal(number, self._note)

    def give_back(self) -> None:
        """Puts the handlers back that were there before."""
        while self._former:
            signal.signal(*self._former.popitem())

    def interruption(self, message: str) -> Interrupted:
        """Returns what to raise for the signal that was received."""
        assert self.received is not None
        return Interrupted(f"{NAMES[self.received]}: {message}", exit_code=128 + self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.give_back()
        self.received = signal.Signals(number)
        if os.environ.get("RANK", "0") != "0":  # Another process says it.
            return
        # Not print: the main thread may be in the middle of one.
        os.write(2, f"\n{NAMES[self.received]}: this step is finished and saved; again to stop at once.\n".encode())

"""The exceptions that mean something to the command line, which prints them as one sentence."""

from remax.untrusted import shown

SENTENCE_LIMIT = 600
"""Characters of a message: what it quotes may be of any length."""


class UserError(ValueError):
    """A setting or an input is wrong: "you can fix this". The command line exits with 2.

    The message is one sentence that names what was set (the real flag and value), what follows from it and what to
    set instead. Raised before anything expensive starts wherever that is possible. What it quotes may come from
    anywhere: it becomes one printable line.
    """

    known_to_all = False
    """Whether all processes that train together raise it, so that one of them can tell."""

    def __init__(self, message: str) -> None:
        super().__init__(shown(message, SENTENCE_LIMIT))


class GuardStop(Exception):
    """A guard stopped the training on purpose. The trainer saves a checkpoint first; the command line exits with 3.

    The message is one sentence that says what was seen and what to do about it.
    """

    def __init__(self, message: str, *, known_to_all: bool = False) -> None:
        super().__init__(message)
        self.known_to_all = known_to_all
        """Whether all processes that train together raise it, so that one of them can tell."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped the training at the end of a step, with its state saved.

    The message says how to go on; the command line exits with exit_code (130, 143).
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

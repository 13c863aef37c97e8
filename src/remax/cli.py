"""The command line: `remax COMMAND --flags`, or the same settings from a YAML file.

Exit codes: 0 on success, 2 on a user's mistake (one sentence, no traceback), 3 if a guard stopped a training, 130 on
Ctrl-C, 143 on SIGTERM. A training that a guard or a signal stopped has saved its state. A training in several processes
ends with the code of the one that failed first, 128 and the signal's number if it was killed.
"""

import difflib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from remax.commands import COMMANDS
from remax.errors import GuardStop, Interrupted, UserError
from remax.launched import failure_of_another, only_main_prints, plain_warnings, tell_once
from remax.untrusted import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code; the arguments are by default those of this process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _called_with(arguments), only_main_prints(), plain_warnings():
        try:
            _dispatch(arguments)
        except UserError as error:
            tell_once(str(error), error)
            return 2
        except GuardStop as stop:
            tell_once(printable(str(stop)), stop)
            return 3
        except Interrupted as interruption:
            tell_once(printable(str(interruption)), interruption)
            return interruption.exit_code
        except KeyboardInterrupt as interruption:
            tell_once("interrupted.", interruption)
            return 130
        except RuntimeError as error:
            lost = failure_of_another(error)
            if lost is None:
                raise
            tell_once(lost, error)
            return 1
    return 0


@contextmanager
def _called_with(arguments: list[str]) -> Iterator[None]:
    """Lets this process look as if it had been started with these arguments: others are started like it."""
    former = sys.argv
    sys.argv = ["remax" if former[1:] != arguments else former[0], *arguments]
    try:
        yield
    finally:
        sys.argv = former


def _dispatch(arguments: list[str]) -> None:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_overview())
    elif name == "--version":
        from remax.versions import version_lines

        print("\n".join(version_lines()))
    elif name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}" if close else f"choose one of {', '.join(COMMANDS)}"
        raise UserError(f"remax has no command {name}: nothing was run; {hint}.")
    else:
        from remax.flags import parse

        command = COMMANDS[name]
        flags = command.flags(arguments[1:])
        settings = parse(f"remax {name}", command.summary, command.settings, flags, example=command.example)
        if settings is not None:
            command.run(*settings)


def _overview() -> str:
    lines = ["usage: remax COMMAND [--flags] [--config run.yaml]", "", "Align language models with ReMax.", ""]
    lines += [f"  {name:12} {command.summary}" for name, command in COMMANDS.items()]
    several = "remax train --accelerate_config fsdp2 trains on all GPUs; ddp, zero2 and zero3 are the other ways."
    return "\n".join([*lines, "", "remax COMMAND --help lists all settings of a command.", several])


if __name__ == "__main__":
    sys.exit(main())

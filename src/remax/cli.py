"""The command line: `remax COMMAND --flags`, or the same settings from a YAML file.

Exit codes: 0 on success, 2 on a user's mistake (one sentence, no traceback), 3 if a guard stopped a training, 130 on
Ctrl-C, 143 on SIGTERM. A training that a guard or a signal stopped has saved its state.
"""

import difflib
import sys
from collections.abc import Sequence
from importlib.metadata import version

from remax.commands import COMMANDS
from remax.errors import GuardStop, Interrupted, UserError
from remax.flags import parse
from remax.untrusted import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(arguments)
    except UserError as error:
        print(f"remax: {error}", file=sys.stderr)
        return 2
    except GuardStop as stop:
        print(f"remax: {printable(str(stop))}", file=sys.stderr)
        return 3
    except Interrupted as interruption:
        print(f"remax: {printable(str(interruption))}", file=sys.stderr)
        return interruption.exit_code
    except KeyboardInterrupt:
        print("remax: interrupted.", file=sys.stderr)
        return 130
    return 0


def _dispatch(arguments: list[str]) -> None:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_overview())
    elif name == "--version":
        print(f"remax {version('remax-rlhf')}")
    elif name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}" if close else f"choose one of {', '.join(COMMANDS)}"
        raise UserError(f"remax has no command {name}: nothing was run; {hint}.")
    else:
        command = COMMANDS[name]
        flags = command.flags(arguments[1:])
        settings = parse(f"remax {name}", command.summary, command.settings, flags, example=command.example)
        if settings is not None:
            command.run(*settings)


def _overview() -> str:
    lines = ["usage: remax COMMAND [--flags] [--config run.yaml]", "", "Align language models with ReMax.", ""]
    lines += [f"  {name:12} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "remax COMMAND --help lists all settings of a command."])


if __name__ == "__main__":
    sys.exit(main())

"""`remax completion`: scripts that complete commands, flags and values in bash, zsh and fish.

They hold all words themselves, so that a press of the tab key starts no Python; a new version has a new script.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from remax.flags import OWN_FLAGS
from remax.options import Options
from remax.recipes import RECIPES

TOP_LEVEL = ("--help", "--version")


@dataclass(frozen=True)
class Words:
    """What may follow `remax COMMAND`."""

    summary: str
    flags: Mapping[str, Sequence[str]]
    """Every flag with the values it takes; none where it takes anything, such as a file."""
    first: Sequence[str]
    """Values that may stand without their flag."""


def script(shell: str, commands: Mapping[str, Any]) -> str:
    """Returns the script for a shell; commands are those of the command line."""
    words = {name: _words(command) for name, command in commands.items()}
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](words)


def _words(command: Any) -> Words:
    flags: dict[str, Sequence[str]] = {f"--{name}": () for name in OWN_FLAGS}
    for settings in command.settings:
        flags |= {f"--{name}": values for name, values in _values(settings).items()}
    first = [value for name in command.positional for value in flags[f"--{name}"]]
    return Words(command.summary, flags, first)


def _values(settings: type[Options]) -> dict[str, Sequence[str]]:
    hints = get_type_hints(settings)
    values = {field.name: _choices(hints[field.name]) for field in fields(settings)}  # type: ignore[arg-type]
    return values | ({"recipe": list(RECIPES)} if "recipe" in values else {})


def _choices(hint: Any) -> Sequence[str]:
    if hint is bool:
        return ("true", "false")
    if get_origin(hint) is Literal:
        return tuple(map(str, get_args(hint)))
    return tuple(choice for part in get_args(hint) for choice in _choices(part))


def _cases(words: Mapping[str, Words], *, indent: str) -> tuple[str, str, str]:
    """Returns the branches of three `case` statements: values by command and flag, flags and first words by command."""
    values, flags, first = [], [], []
    for name, own in words.items():
        flags.append(f"{indent}{name}) flags='{' '.join(own.flags)}' ;;")
        if own.first:
            first.append(f"{indent}{name}) first='{' '.join(own.first)}' ;;")
        values += [f"{indent}{name}:{flag}) values='{' '.join(v)}' ;;" for flag, v in own.flags.items() if v]
    return "\n".join(values), "\n".join(flags), "\n".join(first)


def _bash(words: Mapping[str, Words]) -> str:
    values, flags, first = _cases(words, indent="        ")
    return f"""# Completion of remax for bash. In ~/.bashrc: eval "$(remax completion bash)"
_remax() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}}
    local values='' flags='' first=''
    # bash breaks words at =, which then stands where the value begins.
    [[ $current == = ]] && current=''
    [[ $previous == = ]] && previous=${{COMP_WORDS[COMP_CWORD-2]}}
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W '{" ".join([*words, *TOP_LEVEL])}' -- "$current"))
        return
    fi
    case $command:$previous in
{values}
    esac
    case $command in
{flags}
    esac
    (( COMP_CWORD == 2 )) && case $command in
{first}
    esac
    if [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$current"))
    elif [[ -n $values$first ]]; then
        COMPREPLY=($(compgen -W "$values $first" -- "$current"))
    else
        compopt -o filenames 2> /dev/null
        local IFS=$'\\n'
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}}
complete -F _remax remax
"""


def _zsh(words: Mapping[str, Words]) -> str:
    values, flags, first = _cases(words, indent="        ")
    summaries = "\n".join(f"        {_quoted(f'{name}:{own.summary}')}" for name, own in words.items())
    return f"""#compdef remax
# Completion of remax for zsh. In ~/.zshrc, behind compinit: eval "$(remax completion zsh)"
_remax() {{
    local current=${{words[CURRENT]}} previous=${{words[CURRENT-1]}} command=${{words[2]}}
    local values='' flags='' first=''
    if (( CURRENT == 2 )); then
        local -a commands=(
{summaries}
        )
        _describe command commands
        compadd -- {" ".join(TOP_LEVEL)}
        return
    fi
    # --flag=value is one word here.
    if [[ $current == --*=* ]]; then
        previous=${{current%%=*}}
        compset -P '*='
    fi
    case $command:$previous in
{values}
    esac
    case $command in
{flags}
    esac
    (( CURRENT == 3 )) && case $command in
{first}
    esac
    if [[ $current == -* && $current != *=* ]]; then
        compadd -- ${{=flags}}
    elif [[ -n $values$first ]]; then
        compadd -- ${{=values}} ${{=first}}
    else
        _files
    fi
}}
compdef _remax remax
"""


def _fish(words: Mapping[str, Words]) -> str:
    lines = [
        "# Completion of remax for fish: remax completion fish > ~/.config/fish/completions/remax.fish",
        "complete -c remax -n __fish_use_subcommand -f -l help -d 'Show all commands'",
        "complete -c remax -n __fish_use_subcommand -f -l version -d 'Show versions'",
    ]
    for name, own in words.items():
        lines.append(f"complete -c remax -n __fish_use_subcommand -f -a {name} -d {_quoted(own.summary)}")
        seen = f"-n '__fish_seen_subcommand_from {name}'"
        if own.first:
            lines.append(f"complete -c remax {seen} -f -a '{' '.join(own.first)}'")
        for flag, values in own.flags.items():
            takes = "" if flag in ("--help", "--print_config") else f" -x -a '{' '.join(values)}'" if values else " -r"
            lines.append(f"complete -c remax {seen} -l {flag[2:]}{takes}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    """Returns a text as a word that all three shells read alike."""
    return "'" + text.replace("'", "'\\''") + "'"

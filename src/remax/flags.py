"""From flags and YAML to settings, on jsonargparse; what it says of mistakes becomes one sentence of ours."""

import difflib
import functools
import itertools
import json
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from remax.errors import UserError
from remax.options import Options, nearest
from remax.untrusted import shown

MAX_YAML_DEPTH, MAX_YAML_ITEMS = 20, 100_000
"""What a file of settings may hold at most; a few lines with aliases can spell a value of any size, or an endless one.
"""
OWN_FLAGS = ("config", "print_config", "help")


def parse(
    prog: str, summary: str, settings: Sequence[type[Options]], arguments: Sequence[str], *, example: str
) -> list[Any] | None:
    """Returns one instance of every settings class; None if only the help or the configuration was printed.

    Flags override the YAML file of --config, which overrides defaults. A list takes several values after its flag, or
    the flag several times; a switch needs no value.

    Raises:
        UserError: an unknown flag or setting, a missing or unreadable value, a setting that cannot be.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=prog, usage=f"{prog} {example}", description=summary, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any settings of this command; flags win.")
    hints: dict[str, Any] = {}
    for cls in settings:
        cls_hints = get_type_hints(cls)
        for group, group_fields in grouped(cls).items():
            section = parser.add_argument_group((group.__doc__ or "").rstrip("."))
            docs = docs_of(group)
            for field in group_fields:
                hints[field.name] = cls_hints[field.name]
                section.add_argument(
                    f"--{field.name}", type=hints[field.name], help=docs[field.name], **_default_or_required(field)
                )
    try:
        namespace = parser.parse_args(_normalised(prog, arguments, hints))
    except ArgumentError as error:
        raise UserError(_one_sentence(str(error), hints)) from None
    except SystemExit:
        return None
    values = namespace.as_dict()
    return [cls(**{field.name: values[field.name] for field in fields(cls)}) for cls in settings]  # type: ignore[arg-type]


@functools.cache
def docs_of(group: type) -> dict[str, str | None]:
    """Returns the string beneath every field of a group."""
    import docstring_parser

    return {p.arg_name: p.description for p in docstring_parser.parse_from_object(group).params}


def grouped(cls: type[Options]) -> "dict[type, list[Field[Any]]]":
    """Returns the fields by the group that introduces them: a class that only changes a default is no group."""
    groups: dict[type, list[Field[Any]]] = {group: [] for group in cls.__mro__}
    for field in fields(cls):  # type: ignore[arg-type]
        owners = [group for group in cls.__mro__ if field.name in vars(group).get("__annotations__", {})]
        groups[owners[-1]].append(field)
    return {group: group_fields for group, group_fields in groups.items() if group_fields}


def _default_or_required(field: "Field[Any]") -> dict[str, Any]:
    if field.default is not MISSING:
        return {"default": field.default}
    if field.default_factory is not MISSING:
        return {"default": field.default_factory()}
    return {"required": True}


def _normalised(prog: str, arguments: Sequence[str], hints: dict[str, Any]) -> list[str]:
    """Returns the arguments as --name=value, every list gathered into one; checks that the flags exist."""
    result: list[str] = []
    lists: dict[str, list[str]] = {}
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            return ["--help"]
        if not token.startswith("--"):
            own = token.lstrip("-").split("=")[0]
            meant = token.startswith("-") and own in hints
            advice = f"did you mean --{own}" if meant else "put it behind the flag that it belongs to"
            raise UserError(f"{shown(token)} is no flag: it would be ignored; {advice}.")
        name, equals, value = token[2:].partition("=")
        if name.replace("-", "_") not in (*hints, *OWN_FLAGS):
            raise UserError(f"{prog} has no flag --{shown(name)}: nothing was run; {nearest(name, list(hints))}.")
        name = name.replace("-", "_")
        following = []
        while not equals and rest and not rest[0].startswith("--"):
            following.append(rest.pop(0))
            if get_origin(hints.get(name)) is not list:
                break
        given = [value] if equals else following
        if name == "print_config":
            result.append(token)
        elif get_origin(hints.get(name)) is list:
            if not given:
                raise UserError(f"--{name} has no value: nothing was run; set one or more.")
            if len(given) == 1 and given[0].startswith("["):
                given = [str(item) for item in _yaml(name, given[0])]
            lists.setdefault(name, []).extend(given)
        elif given or hints.get(name) is bool:
            if name == "config":
                _check_yaml(prog, given[0], hints)
            if get_origin(hints.get(name)) is dict:
                _yaml(name, given[0])
            result.append(f"--{name}={given[0] if given else 'true'}")
        else:
            advice = f"set {_description(hints.get(name))}, as --{name}=VALUE if it starts with --"
            raise UserError(f"--{name} has no value: nothing was run; {advice}.")
    for name, items in lists.items():
        numbers = get_args(hints[name])[0] in (int, float)
        spelled = [_yaml(name, item) if numbers else item for item in items]
        values = [v if isinstance(v, int | float) else item for v, item in zip(spelled, items, strict=True)]
        result.append(f"--{name}={json.dumps(values)}")
    return sorted(result, key=lambda token: not token.startswith("--config="))  # Flags in front of it win too.


def _yaml(name: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        value = None
    if value is None or _is_endless(value):
        raise UserError(f"--{name} is {shown(text)}: that cannot be read; set values with spaces between them.")
    return value


def _check_yaml(prog: str, path: str, hints: dict[str, Any]) -> None:
    named = f"--config is {shown(path)}"
    try:
        is_file = Path(path).is_file()
        text = Path(path).read_text(encoding="utf-8") if is_file else ""
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{named}: it cannot be read ({error.strerror}); set the path of a YAML file.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{named}: it is not valid YAML{where}; correct it, or set another file.") from None
    if not is_file:
        raise UserError(f"{named}: there is no such file; set the path of a YAML file.")
    if not isinstance(content, dict):
        raise UserError(f"{named}: it holds no settings; write them as `name: value`, one a line.")
    if _is_endless(content):
        raise UserError(f"{named}: its values are nested too deeply, or too many; write plain settings.")
    for name in content:
        if name not in hints:
            advice = nearest(shown(name), list(hints))
            raise UserError(f"{named}: {prog} has no setting {shown(name)} and would ignore it; {advice}.")


def _is_endless(content: Any) -> bool:
    """Whether a value is too large or too deep to be copied, or holds itself."""
    level = [content]
    num_items = 0
    for _ in range(MAX_YAML_DEPTH):
        num_items += len(level)
        if not level or num_items > MAX_YAML_ITEMS:
            break
        children = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = list(itertools.islice(itertools.chain.from_iterable(children), MAX_YAML_ITEMS + 1))
    return bool(level)


def _one_sentence(message: str, hints: dict[str, Any]) -> str:
    """Returns our sentence for a message of jsonargparse."""
    missing = re.search(r"arguments are required: (.*)", message)
    if missing:
        flags = " and ".join(f"--{shown(name)}" for name in missing.group(1).split(","))
        return f"{flags} must be set: the command cannot start without; see --help."
    wrong = re.search(r'Parser key "([^"]+)".*Got value: (.*)', message, re.DOTALL)
    if wrong:
        name, value = wrong.group(1).split(".")[0], wrong.group(2).strip()
        hint = hints.get(name)
        return f"--{name} is {shown(value)}: that is not {_description(hint)}; {_advice(value, hint)}."
    return f"the settings cannot be read ({shown(message, 300).rstrip('.')}): nothing was run; see --help."


def _description(hint: Any) -> str:
    """Returns what a type accepts, in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_description(part) for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is dict:
        return "a mapping"
    if get_origin(hint) is list:
        return f"a list of {_description(get_args(hint)[0]).removeprefix('a ')}s"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(hint, "a value")


def _advice(value: str, hint: Any) -> str:
    if get_origin(hint) is Literal:
        close = difflib.get_close_matches(shown(value), [str(choice) for choice in get_args(hint)], n=1)
        if close:
            return f"did you mean {close[0]}"
    if get_origin(hint) is list and "\n" not in value and not value.startswith(("[", "{")):
        return f"write [{shown(value)}]"
    return "see --help"

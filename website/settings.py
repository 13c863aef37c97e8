"""All settings of every command as tables, from the dataclasses that are their only source."""

import re
from collections.abc import Callable
from dataclasses import MISSING, Field
from typing import Any, get_type_hints

from remax.commands import COMMANDS, Command
from remax.flags import docs_of, grouped

Row = tuple[str, str, str, str]


def settings_markdown() -> str:
    """Returns a section for every command, `remax train` first; a group that an earlier one has is not repeated."""
    seen: dict[tuple[str, tuple[Row, ...]], str] = {}
    parts = []
    for name, command in sorted(COMMANDS.items(), key=lambda item: item[0] != "train"):
        parts.append(f"## remax {name}\n\n{command.summary}\n\n```text\nremax {name} {command.example}\n```\n")
        for title, rows in _groups(command):
            anchor = f"{name}-{re.sub(r'[^a-z0-9]+', '-', title.lower())}"
            first = seen.setdefault((title, rows), anchor)
            if first == anchor:
                parts.append(f"### {title} {{ #{anchor} }}\n\n{_table(rows)}\n")
            else:
                parts.append(f"**{title}**: as in [remax {first.split('-')[0]}](#{first}).\n")
    return "\n".join(parts)


def _groups(command: Command) -> list[tuple[str, tuple[Row, ...]]]:
    groups = []
    for cls in command.settings:
        hints = get_type_hints(cls)
        for group, fields in grouped(cls).items():
            docs = docs_of(group)
            rows = tuple((f.name, _type(hints[f.name]), _default(f), _prose(docs[f.name] or "")) for f in fields)
            groups.append(((group.__doc__ or "").strip().rstrip("."), rows))
    return groups


def _table(rows: tuple[Row, ...]) -> str:
    lines = ["| setting | type | default | |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join((f'`--{name}`', *rest))} |" for name, *rest in rows])


def _type(hint: Any) -> str:
    """Returns a type in words of the command line: `"a"`, `"b"`, or `int`."""
    arguments = getattr(hint, "__args__", ())
    if arguments and all(isinstance(choice, str) for choice in arguments):
        return ", ".join(f"`{choice}`" for choice in arguments)
    kept = [part for part in arguments if part is not type(None)]
    if arguments and len(kept) < len(arguments):
        return " or ".join(map(_type, kept))
    return f"`{hint.__name__ if isinstance(hint, type) and not arguments else str(hint).replace('typing.', '')}`"


def _default(field: "Field[Any]") -> str:
    factory: Callable[[], Any] | Any = field.default_factory
    value = field.default if factory is MISSING else factory()
    if value is MISSING:
        return "required"
    return "" if value is None else f"`{value}`"


def _prose(text: str) -> str:
    """Returns the string beneath a field as a cell: one line, flags as code."""
    line = " ".join(text.split()).replace("|", "\\|")
    return re.sub(r"(?<![`\w-])(--[a-z]\w*)", r"`\1`", line).replace("<", "&lt;").replace("*", "\\*")

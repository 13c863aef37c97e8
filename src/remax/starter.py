"""`remax init`: a YAML file to start from, whose comments are the documentation of the settings themselves."""

import difflib
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

import yaml

from remax.config import InitConfig, ReMaxConfig, TrainInputs
from remax.errors import UserError
from remax.flags import docs_of, grouped
from remax.options import Options
from remax.recipes import RECIPES, Recipe
from remax.untrusted import shown

WIDTH = 100
SETTINGS: Sequence[type[Options]] = (TrainInputs, ReMaxConfig)
"""Whose fields the file has: those that `remax train` writes to config.yaml."""


def run_init(args: InitConfig) -> None:
    """Writes the starter file of a recipe, or lists the recipes.

    Raises:
        UserError: there is no such recipe, or the file cannot be written.
    """
    if args.recipe is None:
        print("Recipes for `remax init RECIPE`:\n")
        for name, recipe in RECIPES.items():
            print(f"  {name:15} {recipe.summary}")
        return
    if args.recipe not in RECIPES:
        close = difflib.get_close_matches(args.recipe, RECIPES, n=1)
        advice = f"did you mean {close[0]}" if close else f"set one of {', '.join(RECIPES)}"
        raise UserError(f"--recipe is {shown(args.recipe)}: there is no such recipe; {advice}.")
    path = Path(args.output)
    text = starter(args.recipe, RECIPES[args.recipe], shown_path=str(path))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(
            f"--output is {shown(path)}: that is there already and would be overwritten; set another path."
        ) from None
    except OSError as error:
        raise UserError(
            f"--output is {shown(path)}: it cannot be written ({error.strerror}); set another path."
        ) from None
    print(f"{path} has the settings of {args.recipe}, and all others commented out. Read it, then:")
    print("\n".join(f"  {command}" for command in _next_steps(RECIPES[args.recipe], str(path))))
    print(_where(args.recipe))


def _next_steps(recipe: Recipe, path: str) -> list[str]:
    return [f"remax doctor --config {path}", f"{recipe.command} {path}"]


def _where(name: str) -> str:
    return f"What belongs to it, with the scripts that it names: examples/{name} in remax's repository."


def starter(name: str, recipe: Recipe, *, shown_path: str = "run.yaml") -> str:
    """Returns the YAML of a recipe: its settings with their documentation, then every other one at its default."""
    lines = [*_comment(f"{name}: {recipe.summary}"), "#", *_comment(recipe.before), "#"]
    lines += [*(f"# {command}" for command in _next_steps(recipe, shown_path)), "#", *_comment(_where(name))]
    for title, fields in _groups():
        own = [field for field, _ in fields if field.name in recipe.settings]
        if own:
            lines += ["", f"# {f' {title} ':-^{WIDTH - 2}}"]
        for field, text in fields:
            if field in own:
                lines += ["", *_comment(text), _spelled(field.name, recipe.settings[field.name])]
    lines += ["", "", *_comment("Every other setting is at its default. Take the # away from what you change.")]
    for title, fields in _groups():
        others = [(field, text) for field, text in fields if field.name not in recipe.settings]
        if others:
            lines += ["", f"# {f' {title} ':-^{WIDTH - 2}}"]
        for field, text in others:
            lines += ["", *_comment(text), f"# {_spelled(field.name, _default(field))}"]
    return "\n".join([*lines, ""])


def _groups() -> "Iterator[tuple[str, list[tuple[Field[Any], str]]]]":
    """Yields every group of settings: its title, and its fields with their documentation."""
    for cls in SETTINGS:
        for group, fields in grouped(cls).items():
            docs = docs_of(group)
            yield (group.__doc__ or "").rstrip("."), [(field, docs[field.name] or "") for field in fields]


def _comment(text: str) -> list[str]:
    words = " ".join(text.split())
    return textwrap.wrap(
        words, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False, break_on_hyphens=False
    )


def _default(field: "Field[Any]") -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None


def _spelled(name: str, value: Any) -> str:
    """Returns one line of YAML, a list in brackets."""
    in_brackets: str = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10_000)
    return f"{name}: {in_brackets.strip()[1:-1]}"

"""Settings of every command in Python, as flags and in YAML: each is taken or refused in one sentence."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import strategies as st

from fuzzing import CASES, check_sentence, fuzz, outcome
from remax.cli import main
from remax.commands import COMMANDS
from remax.config import CompareConfig, ReMaxConfig
from remax.errors import UserError
from remax.flags import parse
from remax.options import Options

SETTINGS = list(dict.fromkeys(cls for command in COMMANDS.values() for cls in command.settings))
MARKER = "written-by-a-tag"
WILD: list[Any] = [
    *(None, True, 0, -1, 2**70, -(10**400), 10**5000, 0.5, -0.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", " ", "x" * 10_000, "a\x00b", "\ud800", "\x1b[2J\u202e\n\r", "null", "nan", "[1", b"bytes", object(), {}, []),
    *(
        [None],
        [[1]],
        [1, "a"],
        {"a": 1},
        {1: 2},
        {"remax": {"beta": -1}},
        {"remax": {1: 2}},
        {"a/b": {"method": "ppo"}},
    ),
]
LOOP: list[Any] = []
LOOP.append(LOOP)
WILD.append(LOOP)


hints_of = functools.cache(get_type_hints)
"""The types of a class's fields, by name."""


@functools.cache
def required(cls: type[Options]) -> dict[str, Any]:
    """Returns what a class cannot be made without."""
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    needed = {f.name: "m" for f in dataclasses.fields(cls) if (f.default, f.default_factory) == missing}
    return needed | ({"reward_model": "r"} if "reward_model" in hints_of(cls) else {})


def make(cls: type[Options], changes: dict[str, Any]) -> Any:
    """Returns settings with these changes; a comparison's runs are planned too."""
    made = cls(**{**required(cls), **changes})
    if cls is CompareConfig:
        from remax.compare.spec import plan_runs

        plan_runs(made)
    return made


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field may well have, and their like."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is list:
        return st.lists(values_of(parts[0]), max_size=3)
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(-2, 70) | st.integers()
    if hint is float:
        return st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0, 1e-8]) | st.floats()
    if hint is str:
        return st.sampled_from(["none", "auto", "a", "remax:mixed", "80GB", "tensorboard"]) | st.text(max_size=5)
    if get_origin(hint) is dict:
        inner = st.dictionaries(
            st.sampled_from(["method", "beta", "seed", "lam", "x"]), st.sampled_from(["ppo", 1, None])
        )
        return st.dictionaries(st.sampled_from(["remax", "ppo", "other", "../x", "beta"]), inner, max_size=3)
    return st.one_of(st.none(), *map(values_of, parts)) if parts else st.sampled_from(WILD)


def settings_of(cls: type[Options], value: Any, *, most: int) -> Any:
    """Some fields of a class with values; value(hint) makes a strategy."""
    hints = hints_of(cls)
    names = st.lists(st.sampled_from([f.name for f in dataclasses.fields(cls)]), min_size=1, max_size=most, unique=True)
    return names.flatmap(lambda own: st.fixed_dictionaries({name: value(hints[name]) for name in own}))


def test_every_field_takes_or_refuses_every_value() -> None:
    """A field that several commands share is tried once."""
    owners = {f.name: cls for cls in reversed(SETTINGS) for f in dataclasses.fields(cls)}
    assert len(owners) > 90
    for name, cls in owners.items():
        for value in WILD:
            outcome(lambda c=cls, n=name, v=value: make(c, {n: v}))


def test_settings_in_python() -> None:
    @functools.cache
    def anything(hint: Any) -> Any:
        return values_of(hint) | st.sampled_from(WILD)

    some = [st.tuples(st.just(cls), settings_of(cls, anything, most=4)) for cls in SETTINGS]
    strategy = st.sampled_from(some).flatmap(lambda chosen: chosen)
    fuzz("settings in Python", strategy, lambda case: outcome(lambda: make(*case)))


def test_contradictory_settings() -> None:
    strategy = settings_of(ReMaxConfig, values_of, most=8)
    fuzz("contradictory settings", strategy, lambda changes: outcome(lambda: make(ReMaxConfig, changes)))


def parse_for(name: str, arguments: list[str]) -> Any:
    command = COMMANDS[name]
    return parse(f"remax {name}", command.summary, command.settings, arguments, example=command.example)


def names_of(command: str) -> list[str]:
    return [f.name for cls in COMMANDS[command].settings for f in dataclasses.fields(cls)]


SPELLED = [
    *("1", "-1", "0.5", "1e400", "nan", "null", "true", "[1, 2]", "[1", "{a: 1}", "{a: {b: !!python/name:os.system }}"),
    *("&a [*a]", "!!python/object/apply:os.system [ls]", "2020-01-01", "!!binary aGk=", "!!set {a}", "? [a]", "remax"),
    *("x" * 10_000, "\x1b[2J", "a\nb", "\ud800", "-", "--", "@file", "[" * 3000, "1" * 5000, ""),
]


def flags_of(command: str) -> Any:
    spelled = st.sampled_from(SPELLED)
    flag = st.sampled_from(names_of(command)) | st.sampled_from(
        ["config", "print_config", "help", "nothing", "\x1b", ""]
    )
    one = st.tuples(flag, spelled | st.text(max_size=6), st.booleans())
    pieces = one.map(lambda p: [f"--{p[0]}={p[1]}"] if p[2] else [f"--{p[0]}", p[1]])
    return st.lists(pieces, max_size=4).map(lambda many: [part for few in many for part in few])


def test_flags(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    strategy = st.one_of([st.tuples(st.just(name), flags_of(name)) for name in COMMANDS])

    def check(case: tuple[str, list[str]]) -> None:
        outcome(lambda: parse_for(*case))
        capsys.readouterr()

    fuzz("flags", strategy, check)
    assert list(tmp_path.iterdir()) == []


RAW_YAML = [
    *("", "[", "a: b: c", "- 1", "\x00", "\ufeffseed: 1", "seed: *nobody", "? [a]\n: 1", "seed: 1\nseed: 2", "{" * 500),
    *("seed: 2020-01-01", "seed: !!binary aGk=", "methods: &m {remax: *m}", "methods: &m [*m]", "seed: !!set {a}"),
    "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 10)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True))
    + "methods: *i",
    f"!!python/object/apply:pathlib.Path.touch [{MARKER}]",
    f"seed: !!python/object/apply:os.mkdir [{MARKER}]",
    f"methods: {{remax: {{beta: !!python/object/apply:os.mkdir [{MARKER}]}}}}",
    f"reward_weights: [1, !!python/object/apply:os.mkdir [{MARKER}]]",
    f"output_dir: !!python/object/new:os.mkdir [{MARKER}]",
    "model: !!python/name:os.system",
    "model: !!python/module:this",
]


def test_configuration_files(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    tame = [value for value in WILD if not isinstance(value, bytes) and type(value) is not object and value is not LOOP]
    tame = [value for value in tame if value not in ("\ud800", 10**5000)]

    def contents_of(name: str) -> Any:
        names = st.sampled_from(names_of(name)) | st.sampled_from(["nothing", "config", 1, None, True])
        rows = st.dictionaries(names, st.sampled_from(tame) | st.text(max_size=5), max_size=5)
        return rows.map(lambda content: yaml.safe_dump(content, allow_unicode=True))

    def check(case: tuple[str, str, float]) -> None:
        name, content, place = case
        encoded = content.encode("utf-8", "surrogatepass")
        path.write_bytes(encoded[: int(place * len(encoded))] if place < 1 else encoded)
        outcome(lambda: parse_for(name, ["--config", str(path)]))
        capsys.readouterr()

    ends = st.sampled_from([1.0, 1.0, 0.5])
    raw = st.sampled_from(RAW_YAML)
    contents = st.one_of([st.tuples(st.just(name), contents_of(name) | raw, ends) for name in COMMANDS])
    fuzz("configuration files", contents, check)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("content", RAW_YAML)
def test_hostile_yaml_runs_nothing(content: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags that make Python objects, values without an end: refused in one sentence, with exit code 2."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(content)
    for command in ("train", "compare"):
        assert main([command, "--config", "run.yaml"]) == 2
        check_sentence(capsys.readouterr().err.removeprefix("remax: ").removesuffix("\n"))
    for flag in ("--methods", "--seeds", "--model"):
        assert main(["compare", flag, content.partition(":")[2] or "x"]) == 2
        capsys.readouterr()
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("path", ["x" * 5000, ".", "a\x00b", "no\nwhere", "\x1b[2J"])
def test_names_that_are_no_configuration_file(path: str) -> None:
    with pytest.raises(UserError) as error:
        parse_for("train", ["--config", path])
    check_sentence(str(error.value))


@pytest.mark.parametrize("word", ["\x1b[2J", "a\nb", "x" * 5000])
def test_words_that_are_no_flag(word: str) -> None:
    with pytest.raises(UserError, match="is no flag") as error:
        parse_for("train", [word])
    check_sentence(str(error.value))


def test_there_are_at_least_two_thousand_cases() -> None:
    assert sum(CASES.values()) >= 2000

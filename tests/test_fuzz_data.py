"""Datasets of every shape through the whole way that data take: each is read or refused in one sentence."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from fuzzing import fuzz, outcome
from prompt_tokenizers import CHATML, byte_tokenizer, llama_tokenizer
from remax.data import (
    check_tokenizer,
    has_references,
    load_preferences,
    load_records,
    load_references,
    prepare_prompts,
)
from remax.errors import UserError
from remax.interfaces import Prompt
from remax.stages.common import short_pairs
from remax.stages.sft import as_examples

FLAG = "--train_dataset"
COLUMNS = ["prompt", "chosen", "rejected", "completion", "text", "messages", "tools", "chat_template_kwargs"]

words = st.sampled_from(
    ["a cat", "b", "", "  ", "ü 猫 👩‍👩‍👧", "\x1b[2J", "\u202eab", "<|im_end|>", "<s>x", "{{ 7 }}", "a\nb"]
)
texts = words | st.text(max_size=8) | st.sampled_from(["x" * 100_000, "\ud800", "a\x00b"])
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "", "\ud83d", None, 3])
parts = st.fixed_dictionaries({"type": st.sampled_from(["text", "image", None])}, optional={"text": texts})
messages = st.fixed_dictionaries(
    {}, optional={"role": roles, "content": texts | st.none() | st.lists(parts | st.integers(), max_size=2)}
)
good_messages: Any = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": words})
conversations = st.lists(good_messages, min_size=1, max_size=3)
odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just(10**30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
values = st.one_of(words, words, conversations, conversations, texts, st.lists(messages, max_size=3), odd)


def rows_of(value: Any) -> Any:
    """Rows that mostly share their columns, as those of real files do."""
    names = st.lists(st.sampled_from(COLUMNS) | st.text(max_size=3), min_size=1, max_size=4, unique=True)
    return names.flatmap(
        lambda own: st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(own, value)), max_size=4)
    )


SCHEMAS: list[tuple[str, ...]] = [
    *[("prompt",), ("prompt", "completion"), ("chosen", "rejected"), ("prompt", "chosen", "rejected"), ("text",)],
    *[("messages",), ("prompt", "tools"), ("prompt", "chat_template_kwargs"), ("prompt", "n")],
]
extras = {
    "tools": st.sampled_from([None, "[]", "[{", [{"name": "f"}], json.dumps([{"name": "f"}])]) | odd,
    "chat_template_kwargs": st.sampled_from([None, {"mood": 1}, {"tokenize": True}, {"strict": True}]) | odd,
    "n": odd,
}


@st.composite
def nearly_right(draw: Any) -> list[dict[str, Any]]:
    """Rows as they should be, but for one value in most cases."""
    names = draw(st.sampled_from(SCHEMAS))
    kind = draw(st.sampled_from([words.filter(str.strip), conversations]))
    rows = draw(
        st.lists(st.fixed_dictionaries({name: extras.get(name, kind) for name in names}), min_size=1, max_size=4)
    )
    if draw(st.booleans()):
        row = draw(st.sampled_from(rows))
        row[draw(st.sampled_from([*names, *COLUMNS]))] = draw(values)
    return rows


tables = st.one_of(rows_of(values), nearly_right(), nearly_right())


@pytest.fixture(autouse=True)
def no_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time would go into hashes for a cache that is not used."""
    monkeypatch.setattr(datasets.fingerprint.Hasher, "hash", staticmethod(lambda _: "0"))


@pytest.fixture(scope="module")
def tokenizers() -> list[Any]:
    """One without a chat template, one with."""
    return [llama_tokenizer(), byte_tokenizer(chat_template=CHATML)]


def take_every_way(dataset: datasets.Dataset, tokenizers: list[Any]) -> None:
    """Asserts that each use of a dataset gives what it should or refuses it in one sentence."""
    for tokenizer in tokenizers:
        check_tokenizer(tokenizer, flag="--model")
        for overlong, system_prompt in (("filter", None), ("truncate", "Be kind.")):
            settings = {"max_prompt_length": 60, "overlong": overlong, "system_prompt": system_prompt, "flag": FLAG}
            result = outcome(lambda t=tokenizer, s=settings: prepare_prompts(dataset, t, **s))
            for prompt in result[0] if result else []:
                assert isinstance(prompt, Prompt)
                assert 0 < len(prompt.token_ids) <= 60
        pairs = outcome(lambda: load_preferences(dataset, flag=FLAG))
        if pairs and (tokenizer.chat_template or isinstance(pairs[0][0]["chosen"], str)):
            outcome(lambda t=tokenizer, p=pairs: short_pairs(p[0], t, 60, flag=FLAG))
        if has_references(dataset):
            outcome(lambda t=tokenizer: load_references(dataset, t, flag=FLAG, max_length=60))
    outcome(lambda: as_examples(dataset, flag=FLAG))


def write(path: Path, rows: list[dict[str, Any]], form: str) -> Path:
    """Writes rows as a JSON list, JSON lines, CSV or Parquet; what the form cannot hold is left out."""
    if form in ("json", "jsonl"):
        path = path.with_suffix(f".{form}")
        lines = [json.dumps(row) for row in rows]
        path.write_text("[" + ",".join(lines) + "]" if form == "json" else "".join(f"{line}\r\n" for line in lines))
        return path
    names = list(dict.fromkeys(name for row in rows for name in row))
    if form == "csv":
        lines = [names, *([row.get(name, "") for name in names] for row in rows)]
        text = "\n".join(",".join('"' + str(value).replace('"', '""') + '"' for value in line) for line in lines)
        path.with_suffix(".csv").write_text(text, encoding="utf-8", errors="replace")
        return path.with_suffix(".csv")
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in names}
    for name in names:
        try:
            pyarrow.parquet.write_table(pyarrow.table({name: columns[name]}), path)
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError):
            del columns[name]
    pyarrow.parquet.write_table(pyarrow.table(columns), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def test_files_of_every_shape(tmp_path: Path, tokenizers: list[Any], capsys: Any) -> None:
    def check(case: tuple[list[dict[str, Any]], str]) -> None:
        path = write(tmp_path / "rows", *case)
        dataset = outcome(lambda: load_records(str(path), "train", flag=FLAG))
        if dataset is not None:
            take_every_way(dataset, tokenizers)
        capsys.readouterr()

    fuzz("dataset files", st.tuples(tables, st.sampled_from(["jsonl", "jsonl", "json", "csv", "parquet"])), check)


def damage(content: bytes, kind: str, place: float, garbage: bytes) -> bytes:
    at = int(place * len(content))
    return {
        "truncated": content[:at],
        "flipped": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] if at < len(content) else content,
        "garbage inside": content[:at] + garbage + content[at:],
        "BOM": b"\xef\xbb\xbf" + content,
        "UTF-16": content.decode("utf-8", "replace").encode("utf-16"),
        "garbage alone": garbage,
        "repeated": content + content,
        "deep": b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        "twice": b'{"prompt": "a", "prompt": "b"}\nprompt,prompt\n',
    }[kind]


def test_damaged_files(tmp_path: Path, tokenizers: list[Any], capsys: Any) -> None:
    kinds = ["truncated", "flipped", "garbage inside", "BOM", "UTF-16", "garbage alone", "repeated", "deep", "twice"]
    form = st.sampled_from(["jsonl", "json", "csv", "parquet"])
    place = st.floats(0, 1)

    def check(case: tuple[Any, ...]) -> None:
        rows, form, *how = case
        path = write(tmp_path / "rows", rows, form)
        path.write_bytes(damage(path.read_bytes(), *how))
        dataset = outcome(lambda: load_records(str(path), "train", flag=FLAG))
        if dataset is not None:
            take_every_way(dataset, tokenizers)
        capsys.readouterr()

    strategy = st.tuples(tables, form, st.sampled_from(kinds), place, st.binary(min_size=1, max_size=20))
    fuzz("damaged dataset files", strategy, check)


def test_rows_that_are_passed_in_memory(tokenizers: list[Any], capsys: Any) -> None:
    def check(rows: list[dict[str, Any]]) -> None:
        names = list(dict.fromkeys(name for row in rows for name in row))
        try:
            columns = {name: [row.get(name) for row in rows] for name in names}
            dataset = datasets.Dataset.from_dict(columns, on_mixed_types="use_json")
        except Exception:  # it is no dataset: that is told by `datasets`
            return
        take_every_way(dataset, tokenizers)
        capsys.readouterr()

    fuzz("rows in memory", tables, check)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 5000 + ".jsonl", "cannot be a path here"),
        ("~nobody-of-this-name/x.jsonl", "cannot be a path here"),
        ("a\x00b", "does not exist"),
        ("a\nb\x1b[2J.jsonl", "does not exist"),
        ("https://me:secret@host/x.jsonl", "is a URL: nothing is read from there"),
        ("s3://me:secret@bucket/x.jsonl", "is a URL: nothing is read from there"),
    ],
)
def test_names_that_are_no_dataset(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_records(name, "train", flag=FLAG)
    assert outcome(lambda: load_records(name, "train", flag=FLAG)) is None
    assert "secret" not in str(error.value)


def test_a_value_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    """Of two values of one name, JSON readers keep the last without a word."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "n": {"x": 1, "x": 2}}\n')
    with pytest.raises(UserError, match=r"line 2: an object has the name 'x' twice; correct the file"):
        load_records(str(path), "train", flag=FLAG)


@pytest.mark.parametrize(("form", "place"), [("{}\n{}\n", "line 2"), ("[{}, {}]", "element 2")])
def test_half_a_character_is_refused_with_its_place(form: str, place: str, tmp_path: Path) -> None:
    whole, half = (json.dumps({"prompt": text}) for text in ("\U0001f600", "\ud83d"))
    path = tmp_path / "a.json"
    path.write_text(form.format(whole, whole))
    assert load_records(str(path), "train", flag=FLAG)["prompt"][:] == ["\U0001f600"] * 2
    path.write_text(form.format(whole, half))
    with pytest.raises(UserError, match=re.escape(f"{place} has half of a character, '\\ud83d'; correct the file")):
        load_records(str(path), "train", flag=FLAG)


def test_values_that_are_nested_too_deeply_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(UserError, match="its values are nested too deeply; correct the file"):
        load_records(str(path), "train", flag=FLAG)


def test_parts_with_numbers_and_templates_that_fail_are_refused() -> None:
    """A template is a program, and what it raises may quote the data."""
    template = "{{ raise_exception('\\x1b[2J\\n' + messages[0]['role'] * 9000) }}"
    parts = [[{"role": "user", "content": [{"type": "text", "text": 5}]}]]
    for rows in (parts, [[{"role": "\x1b[31m", "content": "a"}]]):
        dataset = datasets.Dataset.from_dict({"prompt": rows}, on_mixed_types="use_json")
        settings = {"max_prompt_length": 9, "overlong": "filter", "system_prompt": None, "flag": FLAG}
        tokenizer = byte_tokenizer(chat_template=template)
        with pytest.raises(UserError, match="cannot render"):
            prepare_prompts(dataset, tokenizer, **settings)
        assert outcome(lambda d=dataset, t=tokenizer, s=settings: prepare_prompts(d, t, **s)) is None

"""Records: reading files, folders and hub datasets, checking their columns, preference pairs."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from remax.data import check_columns, load_preferences, load_records
from remax.errors import UserError
from remax.interfaces import Message

ROWS = [{"prompt": "a\u2028b", "day": "2020-01-01", "n": 1}, {"prompt": "ö", "day": "2021-01-01", "n": 2}]


def say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        Dataset.from_list(rows).to_pandas().to_parquet(path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of `datasets`, empty."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


# Reading


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.JSONL"])
def test_file_gives_its_rows_unchanged_and_leaves_no_cache(name: str, tmp_path: Path, cache: Path) -> None:
    path = write_rows(tmp_path / name.lower(), ROWS).rename(tmp_path / name)
    assert load_records(str(path), "any", flag="--train_dataset").to_list() == ROWS
    assert list(cache.iterdir()) == []


def test_csv_keeps_empty_texts_and_quoted_newlines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,n\n"two\nlines",1\nNA,2\n"",3\n')
    rows = load_records(str(path), "train", flag="--train_dataset").to_list()
    assert rows == [{"prompt": "two\nlines", "n": 1}, {"prompt": "NA", "n": 2}, {"prompt": "", "n": 3}]


def test_csv_longer_than_a_block_of_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,n\n" + "".join(f'"two\n{n}",{n}\n' for n in range(100_000)))
    rows = load_records(str(path), "train", flag="--train_dataset")
    assert (rows["prompt"][:], rows["n"][:]) == ([f"two\n{n}" for n in range(100_000)], list(range(100_000)))


def test_json_lines_with_bom_blank_lines_and_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a": 1}\r\n\n{"b": [2], "a": "x"}\n', encoding="utf-8")
    rows = load_records(str(path), "train", flag="--train_dataset").to_list()
    assert rows == [{"a": 1, "b": None}, {"a": "x", "b": [2]}]


def test_changed_file_and_folder_are_never_served_stale(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "data"
    (folder / "data").mkdir(parents=True)
    file, nested = folder / "rows.jsonl", folder / "data" / "test-00000-of-00001.jsonl"
    for value in ("old", "new"):  # the same size, within the resolution of a file's time stamp
        write_rows(file, [{"prompt": value}])
        write_rows(nested, [{"prompt": value * 2}])
        assert load_records(str(file), "train", flag="--train_dataset")["prompt"][0] == value
        assert load_records(str(folder), "test", flag="--train_dataset")["prompt"][0] == value * 2
    assert list(cache.iterdir()) == []


def test_folder_takes_the_file_named_like_the_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"prompt": "train"}])
    write_rows(tmp_path / "gold_train.jsonl", [{"prompt": "gold"}])
    assert load_records(str(tmp_path), "train", flag="--train_dataset")["prompt"][:] == ["train"]
    assert load_records(str(tmp_path), "gold_train", flag="--train_dataset")["prompt"][:] == ["gold"]
    message = r"--eval_dataset .* has no split 'test': it has gold_train, train; set --eval_split to one of these\."
    with pytest.raises(UserError, match=message):
        load_records(str(tmp_path), "test", flag="--eval_dataset")


def test_folder_written_by_save_to_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Dataset.from_list(ROWS)
    datasets.disable_progress_bars()
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "dev": rows.select([1])}).save_to_disk(tmp_path / "several")
    datasets.enable_progress_bars()
    assert load_records(str(tmp_path / "one"), "train", flag="--train_dataset").to_list() == ROWS
    assert load_records(str(tmp_path / "several"), "dev", flag="--train_dataset").to_list() == ROWS[1:]
    message = r"has no split 'test': it has dev, train; set --dataset_split to one"
    with pytest.raises(UserError, match=message):
        load_records(str(tmp_path / "several"), "test", flag="--train_dataset")
    assert capsys.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is an empty file: it has no rows; pass a file with at least one row."),
        ("a.jsonl", b"\n\n", "has no rows: nothing can be done with it; pass a dataset with at least one row."),
        ("a.json", b"[]", "has no rows: nothing can be done with it; pass a dataset with at least one row."),
        ("a.csv", b"prompt,n\n", "has no rows: nothing can be done with it; pass a dataset with at least one row."),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', "cannot be read: line 3 is not a JSON object (Expecting value); correct"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', "cannot be read: line 2 is not valid JSON (Expecting ':' delimiter);"),
        ("a.jsonl", b'{"a": 1}\n"text"\n', "line 2 is a value of type str, not an object with the columns of a row;"),
        ("a.json", b'[{"a": 1}, 3]', "element 2 is a value of type int, not an object with the columns of a"),
        ("a.jsonl", b'{"a": "\xff"}', "is not UTF-8 (byte 7): it cannot be read; save it as UTF-8."),
        ("a.csv", b"a,b\n1,2\n3\n", "cannot be read: CSV parse error: Row #3: Expected 2 columns, got 1: 3; correct"),
        ("a.parquet", b"not parquet", "cannot be read: Parquet magic bytes not found"),
        ("a.txt", b"x", "ends in .txt: its format is not known; pass a .jsonl, .json, .parquet, .csv file."),
        ("rows", b"x", "has no extension: its format is not known; pass a .jsonl, .json, .parquet, .csv file."),
    ],
)
def test_file_that_cannot_be_used_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_records(str(path), "train", flag="--train_dataset")
    assert str(error.value).startswith(f"--train_dataset {path} ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_path_is_refused_without_asking_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", ROWS)
    for source, advice in [
        ("trian.jsonl", "does not exist: there is no data to read; did you mean train.jsonl."),
        (f"{tmp_path}/train.json", f"did you mean {tmp_path}/train.jsonl."),
        ("./other", "--train_dataset ./other does not exist: there is no data to read; correct the path."),
        ("nowhere/a.csv", "does not exist, nor does the folder nowhere: there is no data to read; correct the path."),
        ("some/deep/folder", "nor does the folder some/deep:"),
        ("folder/", "--train_dataset folder/ does not exist:"),
        ("~/nowhere/a", "--train_dataset ~/nowhere/a does not exist, nor does the folder"),
        ("a.zip", "--train_dataset a.zip does not exist:"),
        (" ", "--train_dataset is empty: there is no data to read; pass a file, a folder or a hub dataset."),
    ]:
        with pytest.raises(UserError) as error:
            load_records(source, "train", flag="--train_dataset")
        assert advice in str(error.value)


def test_hub_names_are_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(name: str) -> Any:
        asked.append(name)
        if name == "gone":
            raise ConnectionError("Couldn't reach 'gone' on the Hub\nand more lines")
        return datasets.DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.chdir(tmp_path)
    assert load_records("owner/name-v1.0", "test", flag="--eval_dataset").to_list() == ROWS[:1]
    assert asked == ["owner/name-v1.0"]
    with pytest.raises(UserError) as error:
        load_records("owner/name", "dev", flag="--eval_dataset")
    sentence = "--eval_dataset owner/name has no split 'dev': it has test, train; set --eval_split to one of these."
    assert str(error.value) == sentence
    with pytest.raises(UserError) as error:
        load_records("gone", "dev", flag="--eval_dataset")
    assert str(error.value) == (
        "--eval_dataset gone is no file or folder here, and it could not be loaded from the hub (Couldn't reach 'gone' "
        "on the Hub): there is no data to read; correct the name, or check the connection."
    )
    (tmp_path / "gones").mkdir()
    with pytest.raises(UserError, match=r"there is no data to read; did you mean gones\."):
        load_records("gone", "dev", flag="--eval_dataset")


def test_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--train_dataset .* cannot be read as a dataset: .*; pass one of its files\."):
        load_records(str(tmp_path), "train", flag="--train_dataset")


# Columns


@pytest.mark.parametrize(
    ("columns", "advice"),
    [
        (["Question", "answer"], "it has 'Question', 'answer'; did you mean 'Question', then rename it to 'prompt'."),
        (["prompts", "n"], "it has 'prompts', 'n'; did you mean 'prompts', then rename it to 'prompt'."),
        (["x"], "it has 'x'; rename the column that holds it to 'prompt'."),
    ],
)
def test_missing_column_is_named_with_advice(columns: list[str], advice: str) -> None:
    rows = Dataset.from_dict({name: ["a"] for name in columns})
    with pytest.raises(UserError) as error:
        check_columns(rows, ["prompt"], flag="--train_dataset", purpose="drawing completions")
    assert str(error.value) == f"--train_dataset has no column 'prompt', which drawing completions needs: {advice}"
    check_columns(rows, columns, flag="--train_dataset", purpose="anything")


def test_what_is_no_single_dataset_is_refused() -> None:
    several = datasets.DatasetDict({"train": Dataset.from_list(ROWS)})
    with pytest.raises(
        UserError, match=r"train_dataset is a DatasetDict: x needs rows that can be counted; pass a dat"
    ):
        check_columns(several, ["prompt"], flag="train_dataset", purpose="x")


# Preferences


def test_identical_pairs_are_dropped_and_counted() -> None:
    rows = Dataset.from_dict({"chosen": ["a", "b", "c"], "rejected": ["x", "b", "y"], "n": [0, 1, 2]})
    pairs, num_identical = load_preferences(rows, flag="--train_dataset")
    assert num_identical == 1
    assert pairs.to_list() == [{"chosen": "a", "rejected": "x", "n": 0}, {"chosen": "c", "rejected": "y", "n": 2}]


def test_conversational_pairs_are_accepted() -> None:
    user, good, bad = say("user", "q"), say("assistant", "good"), say("assistant", "bad")
    for rows in (
        [{"chosen": [user, good], "rejected": [user, bad]}],
        [{"prompt": [user], "chosen": [good], "rejected": [bad]}],
    ):
        pairs, num_identical = load_preferences(Dataset.from_list(rows), flag="--train_dataset")
        assert (pairs.to_list(), num_identical) == (rows, 0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"chosen": ["a"]}, "has no column 'rejected', which learning from preferences needs: it has 'chosen'; rename"),
        ({"chosen": [], "rejected": []}, "has no rows: there are no preferences to learn; pass at least one pair."),
        (
            {"chosen": ["a", " "], "rejected": ["b", "c"]},
            "has 1 empty value in column 'chosen' of row 1 (counted from 0)",
        ),
        (
            {"chosen": ["a"], "rejected": [1]},
            "has a value of type int in column 'rejected' of row 0 (counted from 0): only texts and",
        ),
        ({"chosen": ["a"], "rejected": ["b"], "prompt": [None]}, "has no value in column 'prompt' of row 0"),
        (
            {"chosen": ["a"], "rejected": ["b"], "prompt": [[say("user", "q")]]},
            "mixes formats ('prompt' is conversational, 'chosen' is standard, 'rejected' is standard): a pair cannot",
        ),
        (
            {"chosen": ["a"], "rejected": ["a"]},
            "has only pairs whose 'chosen' equals 'rejected': they prefer nothing; pass pairs that differ.",
        ),
    ],
)
def test_preferences_that_cannot_be_used_are_refused(columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_preferences(Dataset.from_dict(columns), flag="--train_dataset")
    assert str(error.value).startswith(f"--train_dataset {message}")


def test_real_preferences(shared: Path) -> None:
    rows = load_records(str(shared / "data" / "sentiment"), "train", flag="--train_dataset")
    pairs, num_identical = load_preferences(rows, flag="--train_dataset")
    assert (len(pairs), num_identical) == (2300, 0)
    assert pairs[1]["chosen"].startswith("family portrait of need , neurosis")

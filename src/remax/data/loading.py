"""Reading records: a file, a folder or a dataset on the Hugging Face hub.

Local data are read into memory, never through the cache of `datasets`: nothing is left behind, and a file that was
edited is never served as it was.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow.csv  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from remax.errors import UserError
from remax.untrusted import shown

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
SPLIT_FLAGS = {"--eval_dataset": "--eval_split"}
"""The flag that picks the split of another flag's dataset; --dataset_split for all others."""
FOREIGN_SUFFIXES = (".txt", ".tsv", ".arrow", ".yaml", ".yml", ".xlsx", ".gz", ".zst", ".zip", ".tar")
"""Endings that mark a file which cannot be read, but is no hub dataset either."""


def load_records(source: str, split: str, *, flag: str) -> datasets.Dataset:
    """Returns the rows of a dataset.

    source is a .json (a list of objects, or one object per line), .jsonl, .parquet or .csv file, a folder, or the name
    of a dataset on the hub. A file has no splits and is taken whole. In a folder the file `<split>.<suffix>` comes
    first; otherwise it is what Dataset.save_to_disk wrote or is read as `datasets` reads folders. Only the hub is
    cached.

    Raises UserError, naming flag, for whatever cannot be found or read, for a split that is not there and for a
    dataset without rows; and for a URL, which is not repeated, since it may hold a password.
    """
    named = f"{flag} {shown(source)}"
    if not source.strip():
        raise UserError(f"{flag} is empty: there is no data to read; pass a file, a folder or a hub dataset.")
    if "://" in source:
        raise UserError(f"{flag} is a URL: nothing is read from there; download it and pass the file.")
    try:
        path = Path(source).expanduser()
        is_file, is_folder, has_parent = path.is_file(), path.is_dir(), path.parent.is_dir()
    except (OSError, RuntimeError) as error:  # too long, not allowed, the home of nobody
        raise UserError(f"{named} cannot be a path here ({_reason(error)}): correct it.") from error
    if is_file:
        dataset = _read_file(path, named)
    elif is_folder:
        dataset = _read_folder(path, split, flag, named)
    elif _looks_like_path(source):
        similar = _similar(path)
        missing = "does not exist" if has_parent else f"does not exist, nor does the folder {shown(path.parent)}"
        advice = f"did you mean {shown(similar)}" if similar else "correct the path"
        raise UserError(f"{named} {missing}: there is no data to read; {advice}.")
    else:
        dataset = _read_hub(source, split, flag, named)
    if len(dataset) == 0:
        raise UserError(f"{named} has no rows: nothing can be done with it; pass a dataset with at least one row.")
    return dataset


def _looks_like_path(source: str) -> bool:
    """Whether a name can only be meant as a local path: hub names are `name` or `owner/name`."""
    return (
        source.startswith((".", "/", "~"))
        or source.endswith("/")
        or source.count("/") > 1
        or "\\" in source
        or not source.isprintable()
        or Path(source).suffix.lower() in (*READERS, *FOREIGN_SUFFIXES)
    )


def _similar(path: Path) -> Path | None:
    """Returns the path beside a missing one whose name is most like it, if any is."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return None
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return path.parent / close[0] if close else None


# Files


def _read_file(path: Path, named: str) -> datasets.Dataset:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        ending = f"ends in {shown(path.suffix)}" if path.suffix else "has no extension"
        raise UserError(f"{named} {ending}: its format is not known; pass a {', '.join(READERS)} file.")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{named} is an empty file: it has no rows; pass a file with at least one row.")
        return reader(path)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{named} is not UTF-8 (byte {error.start}): it cannot be read; save it as UTF-8.") from error
    except RecursionError as error:
        raise UserError(f"{named} cannot be read: its values are nested too deeply; correct the file.") from error
    except Exception as error:  # Arrow and `datasets` raise a dozen unrelated types
        raise UserError(f"{named} cannot be read: {_reason(error)}; correct the file.") from error


def _read_json(path: Path) -> datasets.Dataset:
    records = _json_records(path.read_text(encoding="utf-8-sig"))
    names = {name: None for record in records for name in record}
    columns = {name: [record.get(name) for record in records] for name in names}
    # Arrow wants one type per column; values that have none in common stay as they are in a column of type Json.
    return datasets.Dataset.from_dict(columns, on_mixed_types="use_json")


def _json_records(text: str) -> list[dict[str, Any]]:
    """Returns the objects of a JSON list or of JSON lines; raises ValueError with the line of a mistake."""
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {error.lineno} is not valid JSON ({error.msg})") from error
        return [_json_object(record, f"element {number}", text) for number, record in enumerate(records, start=1)]
    records = []
    # str.splitlines would also split at U+2028 and the like, which are legal inside a JSON string.
    for number, line in enumerate(StringIO(text), start=1):
        if line.strip():
            try:
                record = json.loads(line, object_pairs_hook=_unique)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not a JSON object ({error.msg})") from error
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            records.append(_json_object(record, f"line {number}", line))
    return records


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; one of two values of the same name would be lost without a word."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {shown(twice, 60, spelled=repr)} twice")
    return value


def _json_object(value: Any, place: str, text: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is a value of type {type(value).__name__}, not an object with the columns of a row")
    if SURROGATE.search(text):  # JSON can spell half of a character, which no table holds and no tokenizer takes
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place} has half of a character, {error.object[error.start]!r}") from error
    return value


def _read_parquet(path: Path) -> datasets.Dataset:
    return datasets.Dataset(pyarrow.parquet.ParquetFile(path).read())


def _read_csv(path: Path) -> datasets.Dataset:
    numbered_errors = pyarrow.csv.ReadOptions(use_threads=False)
    quoted_newlines = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return datasets.Dataset(pyarrow.csv.read_csv(path, numbered_errors, quoted_newlines))


READERS: dict[str, Callable[[Path], datasets.Dataset]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


# Folders and the hub


def _read_folder(path: Path, split: str, flag: str, named: str) -> datasets.Dataset:
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    files = {file.stem: file for file in sorted(path.iterdir()) if not saved and file.suffix.lower() in READERS}
    if split in files:
        # `datasets` would also count gold_train.jsonl to the split train.
        return _read_file(files[split], f"{flag} {shown(files[split])}")
    try:
        with _quiet(), TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            if saved:
                loaded = datasets.load_from_disk(str(path))
            else:
                loaded = datasets.load_dataset(str(path), cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # whatever goes wrong in there, the folder holds no dataset that can be read
        raise UserError(f"{named} cannot be read as a dataset: {_reason(error)}; pass one of its files.") from error
    return _pick_split(loaded, split, flag, named, also=files)


def _read_hub(source: str, split: str, flag: str, named: str) -> datasets.Dataset:
    try:
        loaded = datasets.load_dataset(source)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        similar = _similar(Path(source))
        advice = f"did you mean {shown(similar)}" if similar else "correct the name, or check the connection"
        raise UserError(
            f"{named} is no file or folder here, and it could not be loaded from the hub ({_reason(error)}): there is "
            f"no data to read; {advice}."
        ) from error
    return _pick_split(loaded, split, flag, named)


def _pick_split(loaded: Any, split: str, flag: str, named: str, also: Any = ()) -> datasets.Dataset:
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        there = shown(", ".join(sorted({*map(str, loaded), *also})))
        split_flag = SPLIT_FLAGS.get(flag, "--dataset_split")
        raise UserError(
            f"{named} has no split {shown(split, spelled=repr)}: it has {there}; set {split_flag} to one of these."
        )
    return loaded[split]


def _reason(error: Exception) -> str:
    """Returns the first line of an error's message, short enough for a sentence."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines()
    return shown(lines[0] if lines else type(error).__name__, 200).rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences `datasets` (progress bars, logged errors) where our own sentence says it all."""
    bars_were_on, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars_were_on:
            datasets.enable_progress_bars()

"""Rows of data, wherever they lie: JSON lines, CSV, text, Parquet, a folder of these, the hub."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dsteer.data.jsonl import open_binary, read_lines, read_objects
from dsteer.errors import DataError
from dsteer.store import looks_like_hub_id

KINDS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".txt", ".txt.gz", ".parquet")

_SPLIT_WORDS = {"train", "test", "validation", "valid", "dev", "eval"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table.

    Attributes:
        columns: its values by name.
        source: file name or hub id.
        index: its 0-based number there.
        where: how an error message names it, with the 1-based line.
    """

    columns: dict[str, Any]
    source: str
    index: int
    where: str

    def error(self, problem: str) -> DataError:
        """The error to raise when this row is malformed."""
        return DataError(f"{self.where}: {problem}")

    def text(self, name: str) -> str:
        """A column that must be there and must be text.

        Raises:
            DataError: it is not.
        """
        if name not in self.columns:
            raise self.error(f"no column {name!r}; found {_names(self.columns)}")
        value = self.columns[name]
        if not isinstance(value, str):
            raise self.error(f"{name!r} is {_kind(value)}, expected text")
        return value


def _names(columns: dict[str, Any]) -> str:
    return ", ".join(map(repr, columns)) or "no column at all"


def _kind(value: object) -> str:
    names = {"NoneType": "null", "dict": "an object", "list": "a list", "str": "text"}
    return names.get(type(value).__name__, f"{value!r:.40}")


def read_rows(
    path: str,
    *,
    subset: str | None = None,
    subset_is_folder: bool = False,
    split: str = "train",
    revision: str | None = None,
    limit: int | None = None,
) -> Iterator[Row]:
    """Yield the rows of a local file, a local folder or a hub dataset.

    Args:
        path: a file; a folder (or its subfolder ``subset``, if there is one), of which the files
            named after ``split`` are read, and all where none is named after a split; or a hub id.
        subset: configuration of the hub dataset, or its folder.
        subset_is_folder: which of the two ``subset`` means on the hub.
        split: split of the hub dataset. A single local file is read whole, whatever its split.
        revision: hub revision.
        limit: stop after so many rows.

    Raises:
        DataError: nothing is there, it can't be read, or it holds no row.
    """
    rows: Iterator[Row]
    local = Path(path).expanduser()
    if local.is_dir():
        rows = chain.from_iterable(map(_read_file, _files(local, subset, split)))
    elif local.exists():
        rows = _read_file(local)
    elif path.endswith((*KINDS, ".json", ".zip", ".gz")) or not looks_like_hub_id(path):
        raise DataError(f"{path}: no such file or folder; check the path")
    else:
        rows = _read_hub(path, subset, subset_is_folder, split, revision)
    empty = True
    for row in islice(rows, limit):
        empty = False
        yield row
    if empty:
        raise DataError(f"{path}: empty, it holds no row")


def _files(folder: Path, subset: str | None, split: str) -> list[Path]:
    if subset and (folder / subset).is_dir():
        folder = folder / subset
    found = sorted(item for item in folder.iterdir() if item.name.endswith(KINDS))
    words = {item: set(re.split("[^a-z]+", item.name.lower())) for item in found}
    if found and not any(words[item] & _SPLIT_WORDS for item in found):
        return found
    named = [item for item in found if split in words[item]]
    if not named:
        names = ", ".join(item.name for item in found) or "no data file"
        raise DataError(
            f"{folder}: no file named after the split {split!r}; found {names[:200]}; "
            "name the file itself"
        )
    return named


def _read_file(path: Path) -> Iterator[Row]:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    match suffixes[-1] if suffixes else "":
        case ".jsonl":
            for number, value in read_objects(path):
                yield Row(value, path.name, number - 1, f"{path} line {number}")
        case ".txt":
            for number, line in read_lines(path):
                yield Row({"prompt": line}, path.name, number - 1, f"{path} line {number}")
        case ".csv":
            yield from _read_csv(path)
        case ".parquet":
            yield from _read_parquet(path)
        case _:
            raise DataError(f"{path}: unknown kind of file; expected {', '.join(KINDS)}")


def _read_csv(path: Path) -> Iterator[Row]:
    line = 1
    try:
        with io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or ()
            line = reader.line_num + 1
            for index, columns in enumerate(reader):
                row = Row(columns, path.name, index, f"{path} line {line}")
                if None in columns or None in columns.values():
                    raise row.error(f"expected {len(names)} fields, as the header has")
                yield row
                line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path} line {line}: not CSV ({error})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} after line {line}: not UTF-8 text ({error.reason})") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: can't be read ({error})") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for columns in batch.to_pylist():
                    yield Row(columns, path.name, index, f"{path} row {index + 1}")
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file ({_first_line(error)})") from None


def _read_hub(
    path: str, subset: str | None, subset_is_folder: bool, split: str, revision: str | None
) -> Iterator[Row]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    _check_connection(path)
    where = {"data_dir" if subset_is_folder else "name": subset}
    try:
        table = datasets.load_dataset(path, split=split, revision=revision, **where)
    except (
        datasets.exceptions.DatasetsError,
        HfHubHTTPError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:
        named = f"{path!r}" + (f" (subset {subset!r})" if subset else "")
        raise DataError(
            f"{named}: no such local path, and the hub gives no split {split!r} of a dataset of "
            f"that name ({_first_line(error)}); check the name, or name a local file"
        ) from None
    for index, columns in enumerate(table):
        yield Row(columns, path, index, f"{path} row {index + 1}")


def _check_connection(path: str) -> None:
    """Fail at once where there is no network, rather than after many retries.

    Raises:
        DataError: the hub can't be reached, and HF_HUB_OFFLINE doesn't say that this is known.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().dataset_info(path, timeout=10)
    except (HfHubHTTPError, OfflineModeIsEnabled):
        return  # load_dataset tells what is wrong, or has a cached copy
    except Exception as error:  # noqa: BLE001  # those of the HTTP library, which are its own
        raise DataError(
            f"{path!r}: no such local path, and the hub can't be reached ({_first_line(error)}); "
            "check the name and the network, or set HF_HUB_OFFLINE=1 to use a cached copy"
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".")

"""JSON lines: reading any, and the file of preference pairs that the stages share."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

from dsteer.data.types import PreferencePair
from dsteer.errors import DataError
from dsteer.store import atomic_path


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each line of a text file (gzipped or not) with its number, from 1.

    Raises:
        DataError: the file can't be read, is a gzip that is cut short, or is not UTF-8.
    """
    number = 0
    try:
        with open_binary(path) as file:
            for number, raw in enumerate(file, 1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                yield number, line.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} line {number}: not UTF-8 text ({error.reason})") from None
    except EOFError:
        raise DataError(
            f"{path}: a gzip file that is cut short after line {number}; fetch it again"
        ) from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path}: can't be read ({_reason(error)})") from None


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacking it if its name ends in .gz."""
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each JSON object of a ``.jsonl[.gz]`` file with its line number, from 1.

    Raises:
        DataError: as :func:`read_lines`; or a line is empty, not JSON, no object, or holds half a
            character (a lone surrogate).
    """
    for number, line in read_lines(path):
        where = f"{path} line {number}"
        if not line.strip():
            raise DataError(f"{where}: empty; expected a JSON object, so delete the line")
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        except RecursionError:
            raise DataError(f"{where}: JSON that is nested too deeply") from None
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}")
        if "\\ud" in line.lower() and _has_lone_surrogate(value):
            raise DataError(f"{where}: half a character (a lone \\ud… surrogate) in a text")
        yield number, value


def _has_lone_surrogate(value: dict[str, Any]) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def write_pairs(path: Path, pairs: Iterable[PreferencePair]) -> None:
    """Write pairs, one JSON object with all fields a line, atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for pair in pairs:
            file.write(json.dumps(asdict(pair), ensure_ascii=False).encode("utf-8") + b"\n")


def read_pairs(path: Path) -> list[PreferencePair]:
    """Read what :func:`write_pairs` wrote.

    Raises:
        DataError: the file is missing, or a line is no preference pair.
    """
    return list(stream_pairs(path))


def stream_pairs(path: Path) -> Iterator[PreferencePair]:
    """Yield the pairs of a file one by one, as :func:`read_pairs` reads them.

    Raises:
        DataError: as :func:`read_pairs`, where it gets there.
    """
    for number, fields in read_objects(path):
        try:
            yield PreferencePair(**fields)
        except TypeError:
            raise DataError(
                f"{path} line {number}: not a preference pair; run the stage `data` again"
            ) from None

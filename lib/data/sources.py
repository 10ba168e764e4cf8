"""Raw rows from JSONL and Parquet files, each with the place it came from; damage is reported by row, not raised."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from lib.core.errors import DataError

SUFFIXES = (".jsonl", ".parquet")
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class RawRow:
    """One row as read."""

    place: str
    """`file:line` (JSONL) or `file:row` (Parquet), counted from 1, the file relative to the source."""
    value: object
    """The parsed value; None where `problem` is set."""
    problem: str | None = None
    """Why the row could not be parsed."""


def source_files(source: Path) -> list[tuple[str, Path]]:
    """(name in places, path) of each data file of a source, in order of name. Hidden files are left out.

    Raises:
        DataError: no such file or folder, a file of another kind, or no file at all.
    """
    if source.is_file():
        found = [(source.name, source)]
    elif source.is_dir():
        paths = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
        found = sorted((path.as_posix(), source / path) for path in paths if not any(p.startswith(".") for p in path.parts))
    else:
        raise DataError(f"{source}: no such file or folder; pass a .jsonl or .parquet file, or a folder of them")
    for _, path in found:
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"{path}: a {path.suffix or 'nameless'} file; rows are read from {' and '.join(SUFFIXES)} files only"
            )
    if not found:
        raise DataError(f"{source}: the folder holds no {' or '.join(SUFFIXES)} file")
    return found


def read_raw(name: str, path: Path) -> Iterator[RawRow]:
    """All rows of one file; `name` is used in places.

    Raises:
        DataError: the file can't be opened as what its name says.
    """
    return _read_jsonl(name, path) if path.suffix == ".jsonl" else _read_parquet(name, path)


def _read_jsonl(name: str, path: Path) -> Iterator[RawRow]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            place = f"{name}:{number}"
            try:
                yield RawRow(place, _parse_json(line.decode("utf-8")))
            except UnicodeDecodeError as error:
                yield RawRow(
                    place, None, f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}; save the file as UTF-8"
                )
            except RecursionError:
                yield RawRow(place, None, "not JSON that can be read: nested too deeply")
            except ValueError as error:
                yield RawRow(place, None, f"not one JSON object on one line: {error}")


def _parse_json(text: str) -> object:
    if not text.strip():
        raise ValueError("the line is blank")
    if text.startswith("\ufeff"):
        raise ValueError("the file starts with a byte order mark; save it as UTF-8 without one")
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_twice)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"field {twice!r} is given twice")
    return values


def _read_parquet(name: str, path: Path) -> Iterator[RawRow]:
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(f"{name}:{number}", batch.slice(row, 1))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: can't be read as Parquet: {error}") from error


def _parquet_row(place: str, row: pa.RecordBatch) -> RawRow:
    try:
        return RawRow(place, row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return RawRow(place, None, f"not UTF-8: {error.reason} at position {error.start}")

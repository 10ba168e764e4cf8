"""Rows of Parquet files by row groups and of Arrow files by record batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lib.core.errors import DataError
from lib.data.sources_ahead import ReadAhead
from lib.data.sources_listing import SourceFile, reading
from lib.data.sources_types import RawRow, Split

_BATCH_ROWS = 1024
_READ_BYTES = 4 << 20
_CONVERTED_ROWS = 128
"""Rows made Python values of at a time."""

Table = tuple[str, int, pa.RecordBatch]
"""What its rows' places begin with, the number of its first row under that, and the batch."""


def parquet_splits(file: SourceFile) -> list[Split]:
    """One for each row group.

    Raises:
        DataError: not Parquet, or cut.
    """
    with _as_format(file, "Parquet"), file.open(_READ_BYTES) as raw:
        num_groups = pq.ParquetFile(raw).metadata.num_row_groups
    return [Split(file.name, number, number + 1) for number in range(num_groups)]


def arrow_splits(file: SourceFile) -> list[Split]:
    """One for each record batch; one for all of a file in Arrow's stream format, which has no index.

    Raises:
        DataError: not Arrow, or cut.
    """
    with _as_format(file, "Arrow"), file.open(_READ_BYTES) as raw:
        if _is_stream(raw):
            pa.ipc.open_stream(raw)
            return [Split(file.name, 0, 1)]
        num_batches = pa.ipc.open_file(raw).num_record_batches
    return [Split(file.name, number, number + 1) for number in range(num_batches)]


def read_parquet(file: SourceFile, split: Split, start: int, step: int) -> Iterator[RawRow]:
    """See `RowSource.read`."""

    def tables() -> Iterator[Table]:
        with _as_format(file, "Parquet"), file.open(_READ_BYTES) as raw:
            # A buffer for each column, so that a row group larger than memory is read bit by bit.
            parquet = pq.ParquetFile(raw, buffer_size=_READ_BYTES, pre_buffer=False)
            row = 1 + sum(parquet.metadata.row_group(group).num_rows for group in range(split.start))
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=[split.start]):
                yield file.name, row, batch
                row += batch.num_rows

    return _rows(ReadAhead(tables()), start, step)


def read_arrow(file: SourceFile, split: Split, start: int, step: int) -> Iterator[RawRow]:
    """See `RowSource.read`."""

    def tables() -> Iterator[Table]:
        with _as_format(file, "Arrow"), file.open(_READ_BYTES) as raw:
            if not _is_stream(raw):
                # How many rows the batches before it have can't be told without reading them.
                place = f"{file.name}@{split.start}" if split.start else file.name
                yield place, 1, pa.ipc.open_file(raw).get_batch(split.start)
                return
            row = 1
            for batch in pa.ipc.open_stream(raw):
                yield file.name, row, batch
                row += batch.num_rows

    return _rows(ReadAhead(tables()), start, step)


def _rows(tables: ReadAhead[Table], start: int, step: int) -> Iterator[RawRow]:
    try:
        wanted = start
        """The next row to give out, counted from the first of the table at hand."""
        for place, first, batch in tables:
            while wanted < batch.num_rows:
                chosen = range(wanted, min(batch.num_rows, wanted + step * _CONVERTED_ROWS), step)
                part = batch.slice(wanted, len(chosen)) if step == 1 else batch.take(pa.array(chosen))
                yield from _converted(part, [f"{place}:{first + row}" for row in chosen])
                wanted = chosen[-1] + step
            wanted -= batch.num_rows
    finally:
        tables.close()


def _converted(batch: pa.RecordBatch, places: list[str]) -> list[RawRow]:
    """The rows as Python values; where one can't be, the others are all the same."""
    try:
        batch.validate(full=True)
        return [RawRow(place, value) for place, value in zip(places, batch.to_pylist())]
    except (pa.ArrowException, ValueError) as error:
        if len(places) == 1:
            return [RawRow(places[0], None, f"not UTF-8, or otherwise not what its type says: {error}")]
        return [row for number, place in enumerate(places) for row in _converted(batch.slice(number, 1), [place])]


def _is_stream(raw: Any) -> bool:
    """Whether an Arrow file is in the stream format; the other one begins with its name."""
    begin: bytes = raw.read(6)
    raw.seek(0)
    return begin != b"ARROW1"


@contextmanager
def _as_format(file: SourceFile, format_: str) -> Iterator[None]:
    with reading(file.name):
        try:
            yield
        except OSError as error:
            if type(error) is not OSError or error.errno is not None:
                raise  # of the disk or the store
            raise DataError(f"{file.name}: can't be read as {format_}: {error}; write or copy the file again") from error
        except (pa.ArrowException, EOFError) as error:
            raise DataError(f"{file.name}: can't be read as {format_}: {error}; write or copy the file again") from error

"""Rows of JSON-lines files, plain in byte ranges or compressed; damage to a row is reported by row, not raised."""

from collections.abc import Iterator

import pyarrow as pa

from lib.core.errors import DataError
from lib.data.checks import strict_json
from lib.data.sources_ahead import ReadAhead
from lib.data.sources_listing import SourceFile, reading
from lib.data.sources_types import RawRow, Split

SPLIT_BYTES = 16 << 20
READ_BYTES = 1 << 20
"""Fetched at a time from a disk; four times as much from an object store, whose answers take longer to come."""
_TAIL_BYTES = 64 << 10
MAX_ROW_BYTES = 256 << 20
"""A longer line is reported as a bad row, and never held in memory."""

Line = tuple[int, bytes | None]
"""Position of its first byte, and the line without its end; None where it is longer than MAX_ROW_BYTES."""


def jsonl_splits(file: SourceFile) -> list[Split]:
    """Byte ranges of SPLIT_BYTES, the last one longer by up to half; one for a compressed file."""
    if file.compression:
        return [Split(file.name, 0, 1)]
    num_splits = max(1, round(file.size_bytes / SPLIT_BYTES))
    starts = [number * SPLIT_BYTES for number in range(num_splits)]
    return [Split(file.name, start, stop) for start, stop in zip(starts, [*starts[1:], file.size_bytes])]


def read_jsonl(file: SourceFile, split: Split, start: int, step: int) -> Iterator[RawRow]:
    """See `RowSource.read`."""
    if file.compression:
        lines = _lines(_compressed_blocks(file), 0, None)
    else:
        # From one byte before, which tells whether a line begins at the split's start.
        lines = _lines(_plain_blocks(file, max(0, split.start - 1), split.stop), split.start, split.stop)
    return _rows(file.name, split.start, ReadAhead(lines), start, step)


def _rows(name: str, split_start: int, batches: ReadAhead[list[Line]], start: int, step: int) -> Iterator[RawRow]:
    try:
        number = 0
        for lines in batches:
            for position, line in lines:
                if number >= start and (number - start) % step == 0:
                    # Within a later split nobody knows the number of the line without reading the file from its start.
                    yield _row(f"{name}@{position}" if split_start else f"{name}:{number + 1}", line)
                number += 1
    finally:
        batches.close()


def _row(place: str, line: bytes | None) -> RawRow:
    if line is None:
        return RawRow(place, None, f"longer than {MAX_ROW_BYTES >> 20} MiB; split it into several rows")
    try:
        return RawRow(place, _parse(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        bad = f"byte 0x{line[error.start]:02x} at position {error.start}"
        return RawRow(place, None, f"not UTF-8: {bad}; save the file as UTF-8")
    except RecursionError:
        return RawRow(place, None, "not JSON that can be read: nested too deeply")
    except ValueError as error:
        return RawRow(place, None, f"not one JSON object on one line: {error}")


def _plain_blocks(file: SourceFile, begin: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(position, bytes) from `begin` on; past `stop`, where only the end of a line is wanted, small ones first."""
    most, tail = READ_BYTES if file.is_local else 4 * READ_BYTES, _TAIL_BYTES
    position = begin
    while position < file.size_bytes:
        if position < stop:
            size = min(most, stop - position)
        else:
            size, tail = tail, min(most, 2 * tail)
        block = file.range(position, position + size)
        yield position, block
        position += len(block)


def _compressed_blocks(file: SourceFile) -> Iterator[tuple[int, bytes]]:
    position = 0
    with file.open(4 * READ_BYTES) as raw:
        stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), file.compression)
        while True:
            with reading(file.name):
                try:
                    block = stream.read(READ_BYTES)
                except OSError as error:
                    if type(error) is not OSError or error.errno is not None:
                        raise  # of the store
                    raise DataError(
                        f"{file.name}: the {file.compression} data is damaged after byte {position} of text ({error}); "
                        "compress or copy the file again"
                    ) from error
            if not block:
                return
            yield position, block
            position += len(block)


def _lines(blocks: Iterator[tuple[int, bytes]], start: int, stop: int | None) -> Iterator[list[Line]]:
    """The lines whose first byte lies in [start, stop), a list for each block; `blocks` begin one byte before `start`."""
    within_foreign = start > 0
    """Within the line that began before `start`."""
    line_start, num_bytes = start, 0
    parts: list[bytes] = []
    """The line so far; given up once it is too long."""
    for position, block in blocks:
        *ends, tail = block.split(b"\n")
        lines: list[Line] = []
        cursor = position
        for end in ends:
            cursor += len(end) + 1
            if not within_foreign:
                num_bytes += len(end)
                lines.append((line_start, b"".join([*parts, end]) if num_bytes <= MAX_ROW_BYTES else None))
            within_foreign, line_start, num_bytes = False, cursor, 0
            parts.clear()
            if stop is not None and cursor >= stop:
                yield lines
                return
        yield lines
        if within_foreign and stop is not None and position + len(block) >= stop:
            return
        num_bytes += len(tail)
        if within_foreign or num_bytes > MAX_ROW_BYTES:
            parts.clear()
        else:
            parts.append(tail)
    if num_bytes and not within_foreign:
        yield [(line_start, b"".join(parts) if num_bytes <= MAX_ROW_BYTES else None)]


def _parse(text: str) -> object:
    if not text.strip():
        raise ValueError("the line is blank")
    if text.startswith("\ufeff"):
        raise ValueError("the file starts with a byte order mark; save it as UTF-8 without one")
    return strict_json(text)

"""What a source of rows is: splits in a fixed order, each read from any of its rows on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class RawRow:
    """One row as read."""

    place: str
    """`file:line` (JSONL) or `file:row` (tables), counted from 1, the file relative to the source; `file@byte` for a line
    of a later split of a large JSONL file, where `byte` is the position of its first character, counted from 0."""
    value: object
    """The parsed value; None where `problem` is set."""
    problem: str | None = None
    """Why the row could not be parsed."""


@dataclass(frozen=True)
class Split:
    """A part of a source that is read on its own."""

    name: str
    """The file, as shown in places."""
    start: int
    stop: int
    """Half-open range of: bytes (uncompressed JSONL; a line belongs to the split its first byte lies in), row groups
    (Parquet), record batches (Arrow), rows (a data set's table); 0 to 1 for what can only be read whole (compressed files,
    shards of the Hub)."""


class RowSource(Protocol):
    """Rows in splits. Holds no open file and no thread, so it can be sent to another process."""

    @property
    def digest(self) -> str:
        """Identity of the listing: names, sizes and checksums of the files; the same wherever the files lie."""

    @property
    def splits(self) -> Sequence[Split]:
        """In order of file names; a split may turn out to hold no row."""

    @property
    def num_files(self) -> int:
        """Also those without rows."""

    def read(self, split: int, start: int = 0, step: int = 1) -> Iterator[RawRow]:
        """Rows `start`, `start + step`, ... of a split; rows in between are passed over without being parsed.

        Reading begins in a background thread at once and stays a bounded number of bytes ahead; it ends with the iterator.

        Raises (while iterating):
            DataError: a file is gone, was altered since the source was opened, or is damaged.
            InfraError: the store did not answer.
        """

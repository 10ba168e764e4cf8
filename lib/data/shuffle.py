"""The rows of one source as one virtual stream visits them: dealt out by epoch, shuffled within blocks, exact on resume.

A source is an ordered list of splits. Each epoch permutes the splits and deals them to groups of streams; the streams of a
group share its splits row by row. With many splits a group is one stream, which reads its splits whole; with few, such as
one small file, a group is all streams. A stream's rows are cut into blocks, and each block comes out in an order of its own.
All of it is a function of the source's name and splits, the seed and the number of streams.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np

from lib.core.errors import DataError
from lib.core.seeding import derive_seed, permutation

MIN_SPLITS_PER_GROUP = 4
"""Fewer splits in a group of streams, and the groups' shares of the rows would be too unlike."""
BLOCK_CHARACTERS = 4 << 20
"""Text of a shuffle block after which it closes, so that long rows don't fill the memory."""
_EMPTY_EPOCHS = 32
"""Times the streams of a group, epochs without a row after which a stream gives up: by chance that happens with e**-32."""


class SourceRow(NamedTuple):
    """A row as a source gives it."""

    row: int
    """Its number within the split."""
    num_characters: int
    """Of its text; the same however the row is stored, because shuffle blocks are cut by it."""
    example: Any
    """What the encoder takes."""


class ExampleSource(Protocol):
    """Checked rows, split by split."""

    @property
    def digest(self) -> str:
        """Names the content."""
        ...

    @property
    def num_splits(self) -> int: ...

    def read(self, split: int, start: int = 0, step: int = 1) -> Iterator[SourceRow]:
        """Rows `start`, `start + step`, ... of a split to its end, in bounded memory; those in between cost little.

        Raises (while iterating):
            DataError: one of these rows can't be used; names its place.
        """
        ...


class SourceOrder:
    """Which splits and rows of a source each stream visits in each epoch."""

    def __init__(self, source: ExampleSource, name: str, *, seed: int, num_streams: int) -> None:
        """Raises DataError when the source has no splits."""
        if not source.num_splits:
            raise DataError(f"source {name!r} holds no rows")
        self.source, self.name, self.seed, self.num_streams = source, name, seed, num_streams
        self.streams_per_group = streams_per_group(source.num_splits, num_streams)
        self._permuted = lru_cache(maxsize=4)(lambda epoch: permutation(source.num_splits, "splits", seed, name, epoch))

    def splits(self, stream: int, epoch: int) -> np.ndarray:
        """The splits that a stream reads in an epoch, in order; none is a stream's own unless it is alone in its group."""
        num_groups = self.num_streams // self.streams_per_group
        part: np.ndarray = self._permuted(epoch)[stream % num_groups :: num_groups]
        return part

    def first_row(self, stream: int, epoch: int, split: int) -> int:
        """The first row of a split that a stream visits in an epoch; every `streams_per_group`th one follows.

        Which of the group's streams begins where changes with the split and the epoch.
        """
        share = self.streams_per_group
        lane = stream // (self.num_streams // share)
        return (lane + derive_seed("deal", self.seed, self.name, epoch, split)) % share


def streams_per_group(num_splits: int, num_streams: int) -> int:
    """The fewest streams, a divisor of all, that must share splits for each group to have MIN_SPLITS_PER_GROUP of them."""
    divisors = (number for number in range(1, num_streams + 1) if num_streams % number == 0)
    return next((share for share in divisors if num_splits * share >= MIN_SPLITS_PER_GROUP * num_streams), num_streams)


class ShuffledRows:
    """A cursor over one stream's rows of a source, epoch after epoch.

    Its state is where the current block starts and how much of it was taken: a resume reads the block again.
    """

    def __init__(self, order: SourceOrder, stream: int, shuffle_rows: int) -> None:
        self.epoch = 0
        self._order, self._stream, self._shuffle_rows = order, stream, shuffle_rows
        self._start = (0, 0)
        """Position in the epoch's list of splits, and row number, from which the current block is read."""
        self._block = 0
        """Number of the current block within the epoch."""
        self._num_taken = 0
        self._rows: tuple[list[int], list[int], list[Any]] = ([], [], [])
        """Split, number and example of the rows of the current block, as they were read. Three lists, not a list of rows:
        the garbage collector looks at each object that lives as long as a block."""
        self._left: list[int] | None = None
        """Places in these lists of what is left of the block, the next one last; None before it is read."""
        self._reader: Iterator[SourceRow] | None = None
        """The rest of the epoch."""
        self._reads = (0, 0)
        """The split of the row that the reader gave last: its position in the epoch's list of splits, and its number."""
        self._ahead: SourceRow | None = None
        """The row that the next block starts with, the last one read; None where the current block ends the epoch."""
        self._num_empty = 0
        """Epochs without a row since the last one with any."""

    def take(self, num_rows: int) -> list[tuple[int, int, Any]]:
        """(split, row, example) of at most `num_rows` rows, all of one block; none only where an epoch has no row for this
        stream.

        Raises:
            DataError: a row can't be used, or there is none for this stream in many epochs.
        """
        if self._left is None:
            self._left = self._read_block()
        splits, rows, examples = self._rows
        taken = [(splits[place], rows[place], examples[place]) for place in self._left[: -num_rows - 1 : -1]]
        del self._left[-num_rows:]
        self._num_taken += len(taken)
        self._num_empty = 0 if taken else self._num_empty + 1
        if self._num_empty > _EMPTY_EPOCHS * self._order.streams_per_group:
            raise DataError(
                f"source {self._order.name!r} has no rows for stream {self._stream} of {self._order.num_streams}; "
                "lower data.num_streams"
            )
        if not self._left:
            self._next_block()
        return taken

    def state(self) -> list[int]:
        """[epoch, position in its splits, row, block, rows taken of the block]"""
        return [self.epoch, *self._start, self._block, self._num_taken]

    def load_state(self, state: Sequence[int]) -> None:
        """Go on exactly where `state` was taken."""
        self.epoch, position, row, self._block, self._num_taken = state
        self._start = (position, row)
        self._left = self._reader = self._ahead = None

    def _read_block(self) -> list[int]:
        """Read the block that starts at `_start`; the places of what was not yet taken of it, the next row last."""
        if self._reader is None:
            self._reader = self._rows_from(*self._start)
        splits, rows, examples = self._rows = ([], [], [])
        ahead, self._ahead = self._ahead, None
        num_characters, most_rows = 0, self._shuffle_rows
        for row in self._reader if ahead is None else chain((ahead,), self._reader):
            if len(rows) == most_rows or num_characters >= BLOCK_CHARACTERS:
                self._ahead = row
                break
            number, size, example = row
            splits.append(self._reads[1])
            rows.append(number)
            examples.append(example)
            num_characters += size
        order = self._order
        mixed = permutation(len(rows), "shuffle", order.seed, order.name, self.epoch, self._stream, self._block)
        left: list[int] = mixed[self._num_taken :][::-1].tolist()
        return left

    def _next_block(self) -> None:
        if self._ahead is None:
            self.epoch, self._start, self._block = self.epoch + 1, (0, 0), 0
            self._reader = None
        else:
            self._start, self._block = (self._reads[0], self._ahead.row), self._block + 1
        self._num_taken, self._left = 0, None

    def _rows_from(self, position: int, row: int) -> Iterator[SourceRow]:
        """The rest of the epoch, rows from number `row` on in the first of its splits; `_reads` says where each is from."""
        order, step = self._order, self._order.streams_per_group
        splits = order.splits(self._stream, self.epoch).tolist()
        for place, split in enumerate(splits[position:], start=position):
            first = order.first_row(self._stream, self.epoch, split)
            start = first if place > position else row + (first - row) % step
            self._reads = (place, split)
            yield from order.source.read(split, start, step)


def read_again(order: SourceOrder, places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Any]:
    """The examples at some (split, row) places; rows of one split that a stream visits in one epoch are read in one go."""
    wanted: dict[tuple[int, int], set[int]] = {}
    step = order.streams_per_group
    for split, row in places:
        wanted.setdefault((split, row % step), set()).add(row)
    found: dict[tuple[int, int], Any] = {}
    for (split, _), rows in wanted.items():
        last = max(rows)
        for read in order.source.read(split, min(rows), step):
            if read.row in rows:
                found[split, read.row] = read.example
            if read.row >= last:
                break
    return found

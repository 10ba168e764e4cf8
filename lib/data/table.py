"""A checked data set as a table that is read from disk row by row, or split by split in the order of its origin."""

import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import pyarrow as pa

from lib.core.artifact import verify
from lib.core.errors import DataError
from lib.core.examples import Conversation, Example, Message
from lib.data.in_place import FORMAT as IN_PLACE
from lib.data.schemas.arrow import KIND_OF, SCHEMAS, from_record
from lib.data.sources_types import Split

Row = TypeVar("Row", bound=Example)

_CONVERTED_ROWS = 64
"""Rows made Python values of at a time when a split is read."""


class ExampleTable(Generic[Row]):
    """The rows of a data set, memory-mapped: opening costs no memory, any row is read on its own."""

    def __init__(self, kind: str, batches: Sequence[pa.RecordBatch], splits: Sequence[Split], digest: str) -> None:
        self.kind = kind
        """Of its examples: one of KINDS."""
        self.digest = digest
        """Of the artifact."""
        self.splits = splits
        """Those of the source it was made from; `start` and `stop` are row numbers of this table."""
        self._batches = list(batches)
        self._starts: list[int] = list(accumulate((batch.num_rows for batch in batches), initial=0))
        self._is_plain = [kind == "conversation" and _holds_plain_messages(batch) for batch in batches]

    @staticmethod
    def open(folder: Path, row_type: type[Row]) -> "ExampleTable[Row]":
        """Open a data-set artifact that holds examples of a type.

        Raises:
            ArtifactCorruptError: a file is missing or altered.
            DataError: the artifact doesn't hold such examples.
        """
        kind = KIND_OF[row_type]
        manifest = verify(folder)
        found = manifest.meta.get("format")
        if found == IN_PLACE:
            raise DataError(f"{folder}: says where rows are and holds none; ingest them with `read: copy`")
        if found != kind:
            held = f"examples of kind {found!r}" if found in SCHEMAS else f"a {manifest.kind!r} artifact"
            raise DataError(f"{folder}: holds {held}, expected a data set of kind {kind!r}")
        batches: list[pa.RecordBatch] = []
        for entry in manifest.files:
            reader = pa.ipc.open_file(pa.memory_map(str(folder / entry.path)))
            batches += [reader.get_batch(index) for index in range(reader.num_record_batches)]
        sizes: list[tuple[str, int]] = [(name, rows) for name, rows in manifest.meta["splits"]]
        stops = accumulate(rows for _, rows in sizes)
        splits = [Split(name, stop - rows, stop) for (name, rows), stop in zip(sizes, stops)]
        return ExampleTable(kind, batches, splits, manifest.digest)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a table of {len(self)}")
        number = bisect.bisect_right(self._starts, index) - 1
        batch, row = self._batches[number], index - self._starts[number]
        if self._is_plain[number]:
            return cast(Row, _plain_conversation(batch, row))
        return self._from_record(batch.slice(row, 1).to_pylist()[0])

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The rows at `indices`, in that order."""
        return [self[index] for index in indices]

    def read(self, split: int, start: int = 0, step: int = 1) -> Iterator[Row]:
        """Rows `start`, `start + step`, ... of a split, as the source it was made from gives them."""
        place = self.splits[split]
        index = place.start + start
        while index < place.stop:
            number = bisect.bisect_right(self._starts, index) - 1
            first, end = self._starts[number], min(self._starts[number + 1], place.stop)
            chosen = range(index, end, step)[:_CONVERTED_ROWS]
            batch = self._batches[number]
            part = batch.slice(index - first, len(chosen)) if step == 1 else batch.take(pa.array(chosen) - first)
            yield from map(self._from_record, part.to_pylist())
            index = chosen[-1] + step

    def _from_record(self, record: dict[str, Any]) -> Row:
        return cast(Row, from_record(self.kind, record))


def _holds_plain_messages(batch: pa.RecordBatch) -> bool:
    """Whether all messages are a role and a content, and there are neither tools nor labels, so that other columns needn't be
    read."""
    if batch.column("labels").null_count < batch.num_rows:
        return False
    messages = batch.column("messages").values
    absent = all(messages.field(name).null_count == len(messages) for name in ("thinking", "name", "call_id", "weight"))
    return absent and not len(messages.field("tool_calls").values) and not len(batch.column("tools").values)


def _plain_conversation(batch: pa.RecordBatch, row: int) -> Conversation:
    messages = batch.column("messages")
    start, stop = messages.offsets[row].as_py(), messages.offsets[row + 1].as_py()
    turns = messages.values.slice(start, stop - start)
    return Conversation(
        sample_id=batch.column("id")[row].as_py(),
        messages=tuple(map(Message, turns.field("role").to_pylist(), turns.field("content").to_pylist())),
        source=batch.column("source")[row].as_py(),
        answer=batch.column("answer")[row].as_py(),
    )

"""Rows in, a checked data set out; and the data set as a table that is read from disk row by row."""

import bisect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lib.core.artifact import Staged, verify
from lib.core.errors import DataError
from lib.core.examples import Conversation, Message
from lib.data.checks import RowRefused, check_row
from lib.data.sources import open_source

FORMAT = "conversation"
MAX_SHOWN = 20
"""Bad rows listed in an error; all are counted."""

_MESSAGE = pa.struct([pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string(), nullable=False)])
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("messages", pa.list_(pa.field("item", _MESSAGE, nullable=False)), nullable=False),
        pa.field("answer", pa.string()),
    ]
)
"""Columns of a shard. Shards are uncompressed Arrow files, so that a row is found in a memory map without decoding others."""
_BATCH_ROWS = 1024
_BATCH_CHARACTERS = 8 << 20
_SHARD_BATCHES = 256
_PROGRESS_ROWS = 1000


def ingest_dataset(source: str | Path, staged: Staged, progress: Callable[[int], None] | None = None) -> None:
    """Check every row of `source` and write the shards `rows-00000.arrow`, ... into the staged artifact.

    A row is `{"messages": [{"role", "content"}, ...], "id"?: text, "answer"?: text}`; without an id its place is its id.

    Args:
        source: what `open_source` takes.
        staged: gets `counts` and `meta`.
        progress: called with the number of rows read since the last call.
    Raises:
        DataError: nothing to read, or bad rows: the first MAX_SHOWN with place and reason, and the number of all.
    """
    counts = {"files": 0, "rows_seen": 0, "rows_kept": 0, "messages": 0, "assistant_messages": 0, "rows_with_answer": 0}
    writer = _ShardWriter(staged.path)
    try:
        for conversation in _checked(source, counts, progress or (lambda _: None)):
            writer.add(conversation)
            counts["rows_kept"] += 1
            counts["messages"] += len(conversation.messages)
            counts["assistant_messages"] += sum(message.role == "assistant" for message in conversation.messages)
            counts["rows_with_answer"] += conversation.answer is not None
    finally:
        writer.close()
    staged.counts.update(counts)
    staged.meta.update(format=FORMAT)


def _checked(source: str | Path, counts: dict[str, int], progress: Callable[[int], None]) -> Iterator[Conversation]:
    """Good rows while there are only good ones; raises at the end if any was bad."""
    problems: list[str] = []
    num_bad = 0
    place_of: dict[str, str] = {}
    rows = open_source(source)
    counts["files"] = rows.num_files
    for split in range(len(rows.splits)):
        for raw in rows.read(split):
            counts["rows_seen"] += 1
            if counts["rows_seen"] % _PROGRESS_ROWS == 0:
                progress(_PROGRESS_ROWS)
            try:
                if raw.problem is not None:
                    raise RowRefused(raw.problem)
                conversation = check_row(raw.value, raw.place)
                if (earlier := place_of.setdefault(conversation.sample_id, raw.place)) != raw.place:
                    raise RowRefused(f"id {conversation.sample_id!r} is taken by {earlier}; give each row its own")
            except RowRefused as refused:
                num_bad += 1
                if len(problems) < MAX_SHOWN:
                    problems.append(f"{raw.place}: {refused}")
                continue
            if not num_bad:
                yield conversation
    progress(counts["rows_seen"] % _PROGRESS_ROWS)
    if num_bad:
        more = f", the first {MAX_SHOWN} are shown" if num_bad > MAX_SHOWN else ""
        problems.append(f"{num_bad} of {counts['rows_seen']} rows of {source} can't be used{more}; correct or remove them")
        raise DataError("\n".join(problems))
    if not counts["rows_seen"]:
        raise DataError(f"{source}: holds no rows")


class _ShardWriter:
    """Appends conversations to Arrow files of a bounded number of batches."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: list[dict[str, Any]] = []
        self._num_characters = 0
        self._num_shards = 0
        self._num_batches = 0
        self._file: Any = None

    def add(self, conversation: Conversation) -> None:
        messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
        self._pending.append(
            {"id": conversation.sample_id, "source": conversation.source, "messages": messages, "answer": conversation.answer}
        )
        self._num_characters += sum(len(message.content) for message in conversation.messages)
        if len(self._pending) >= _BATCH_ROWS or self._num_characters >= _BATCH_CHARACTERS:
            self._write_batch()

    def close(self) -> None:
        if self._pending:
            self._write_batch()
        self._close_file()

    def _write_batch(self) -> None:
        if self._file is None:
            self._file = pa.ipc.new_file(str(self._folder / f"rows-{self._num_shards:05d}.arrow"), SCHEMA)
            self._num_shards += 1
        self._file.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=SCHEMA))
        self._pending, self._num_characters = [], 0
        self._num_batches += 1
        if self._num_batches == _SHARD_BATCHES:
            self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._num_batches = None, 0


class ConversationTable:
    """The rows of a data set, memory-mapped: opening costs no memory, any row is read on its own."""

    def __init__(self, batches: Sequence[pa.RecordBatch], digest: str) -> None:
        self.digest = digest
        """Digest of the artifact."""
        self._batches = list(batches)
        self._starts = [0]
        for batch in self._batches:
            self._starts.append(self._starts[-1] + batch.num_rows)

    @staticmethod
    def open(folder: Path) -> "ConversationTable":
        """Open a data-set artifact.

        Raises:
            ArtifactCorruptError: a file is missing or altered.
            DataError: the artifact doesn't hold conversations.
        """
        manifest = verify(folder)
        if manifest.meta.get("format") != FORMAT:
            raise DataError(f"{folder}: holds a {manifest.kind!r} artifact, expected a data set of conversations")
        batches: list[pa.RecordBatch] = []
        for entry in manifest.files:
            reader = pa.ipc.open_file(pa.memory_map(str(folder / entry.path)))
            batches += [reader.get_batch(index) for index in range(reader.num_record_batches)]
        return ConversationTable(batches, manifest.digest)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a table of {len(self)}")
        number = bisect.bisect_right(self._starts, index) - 1
        batch, row = self._batches[number], index - self._starts[number]
        messages = batch.column(2)
        start, stop = messages.offsets[row].as_py(), messages.offsets[row + 1].as_py()
        turns = messages.values.slice(start, stop - start)
        return Conversation(
            sample_id=batch.column(0)[row].as_py(),
            messages=tuple(map(Message, turns.field(0).to_pylist(), turns.field(1).to_pylist())),
            source=batch.column(1)[row].as_py(),
            answer=batch.column(3)[row].as_py(),
        )

    def rows(self, indices: Sequence[int]) -> list[Conversation]:
        """The rows at `indices`, in that order."""
        return [self[index] for index in indices]

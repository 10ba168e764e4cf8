"""Rows in, a checked data set out."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from lib.config.rows import RowsConfig
from lib.core.artifact import Staged
from lib.core.errors import DataError
from lib.core.examples import Conversation, EventSequence, Example, PreferencePair, Prompt
from lib.data.checks import RowRefused
from lib.data.schemas.arrow import SCHEMAS, Record, num_characters, to_record
from lib.data.schemas.layouts import Layout, find_layout
from lib.data.sources import RowSource, open_source

MAX_SHOWN = 20
"""Bad rows listed in an error; all are counted."""
_BATCH_ROWS = 1024
_BATCH_CHARACTERS = 8 << 20
_SHARD_BATCHES = 256
_PROGRESS_ROWS = 1000


PLAIN = RowsConfig()
"""Conversations in whatever layout; bad rows are an error."""


def ingest_dataset(
    source: str | Path | RowSource,
    staged: Staged,
    progress: Callable[[int], None] | None = None,
    *,
    config: RowsConfig = PLAIN,
) -> None:
    """Check every row of `source` and write the shards `rows-00000.arrow`, ... into the staged artifact.

    A row has one of the layouts in lib/data/schemas/layouts.py; without an id its place is its id. No record batch holds
    rows of two splits, so that the data set is read in the splits of its source.

    Args:
        source: what `open_source` takes, or what it gave.
        staged: gets `counts` and `meta`, and where rows are dropped the reasons of the first MAX_SHOWN in `info`.
        progress: called with the number of rows read since the last call.
    Raises:
        DataError: nothing to read, rows of no known layout, or bad rows: the first MAX_SHOWN with place and reason, and
            the number of all.
    """
    name = str(source) if isinstance(source, str | Path) else "the source"
    rows = open_source(source) if isinstance(source, str | Path) else source
    try:
        layout = find_layout(rows, config)
    except DataError as error:
        raise DataError(f"{name}: {error}" if str(error).startswith("holds") else str(error)) from error
    checked = _Checked(layout, config.bad_rows, progress or (lambda _: None))
    counts: Counter[str] = Counter(files=rows.num_files)
    writer = _ShardWriter(staged.path, layout.kind)
    splits: list[list[Any]] = []
    try:
        for number, split in enumerate(rows.splits):
            before = checked.num_kept
            for example in checked.examples(rows, number):
                writer.add(to_record(example))
                counts.update(_counts(example))
            writer.end_split()
            splits.append([split.name, checked.num_kept - before])
    finally:
        writer.close()
    checked.finish(name)
    staged.counts.update(rows_seen=checked.num_seen, rows_kept=checked.num_kept, rows_dropped=checked.num_bad, **counts)
    staged.meta.update(format=layout.kind, layout=layout.name, splits=splits)
    if checked.problems:
        staged.info["dropped"] = checked.problems


@dataclass
class _Checked:
    """Tells good rows from bad ones and keeps count."""

    layout: Layout
    bad_rows: Literal["refuse", "drop"]
    progress: Callable[[int], None]
    num_seen: int = 0
    num_kept: int = 0
    num_bad: int = 0
    problems: list[str] = field(default_factory=list)
    place_of: dict[str, str] = field(default_factory=dict)
    """Id -> place, to find ids that are given twice."""

    def examples(self, rows: RowSource, split: int) -> Iterator[Example]:
        """The good rows of a split; none any more after a bad one that is not to be dropped."""
        for raw in rows.read(split):
            self.num_seen += 1
            if self.num_seen % _PROGRESS_ROWS == 0:
                self.progress(_PROGRESS_ROWS)
            try:
                if raw.problem is not None:
                    raise RowRefused(raw.problem)
                example = self.layout.check(raw.value, raw.place)
                if (earlier := self.place_of.setdefault(example.sample_id, raw.place)) != raw.place:
                    raise RowRefused(f"id {example.sample_id!r} is taken by {earlier}; give each row its own")
            except RowRefused as refused:
                self.num_bad += 1
                if len(self.problems) < MAX_SHOWN:
                    self.problems.append(f"{raw.place}: {refused}")
                continue
            if self.bad_rows == "drop" or not self.num_bad:
                self.num_kept += 1
                yield example

    def finish(self, source: str) -> None:
        """Raises DataError: no rows, or bad ones that are not to be dropped."""
        self.progress(self.num_seen % _PROGRESS_ROWS)
        if not self.num_seen:
            raise DataError(f"{source}: holds no rows")
        if self.num_bad and (self.bad_rows == "refuse" or not self.num_kept):
            more = f", the first {MAX_SHOWN} are shown" if self.num_bad > MAX_SHOWN else ""
            last = f"{self.num_bad} of {self.num_seen} rows of {source} can't be used{more}; correct or remove them"
            raise DataError("\n".join([*self.problems, last]))


def _counts(example: Example) -> dict[str, int]:
    match example:
        case Conversation():
            trained = sum(message.role == "assistant" for message in example.messages)
            with_answer = int(example.answer is not None)
            return {"messages": len(example.messages), "assistant_messages": trained, "rows_with_answer": with_answer}
        case PreferencePair():
            return {"messages": len(example.prompt) + len(example.chosen) + len(example.rejected)}
        case Prompt():
            return {"messages": len(example.messages)}
        case EventSequence():
            return {"events": len(example.events)}
    return {}


class _ShardWriter:
    """Appends records to Arrow files of a bounded number of batches; uncompressed, so that a row is found in a memory map."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder = folder
        self._schema = SCHEMAS[kind]
        self._pending: list[Record] = []
        self._num_characters = 0
        self._num_shards = 0
        self._num_batches = 0
        self._file: Any = None

    def add(self, record: Record) -> None:
        self._pending.append(record)
        self._num_characters += num_characters(record)
        if len(self._pending) >= _BATCH_ROWS or self._num_characters >= _BATCH_CHARACTERS:
            self._write_batch()

    def end_split(self) -> None:
        """What comes next is of another split, and so of another batch."""
        if self._pending:
            self._write_batch()

    def close(self) -> None:
        self.end_split()
        self._close_file()

    def _write_batch(self) -> None:
        if self._file is None:
            self._file = pa.ipc.new_file(str(self._folder / f"rows-{self._num_shards:05d}.arrow"), self._schema)
            self._num_shards += 1
        self._file.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=self._schema))
        self._pending, self._num_characters = [], 0
        self._num_batches += 1
        if self._num_batches == _SHARD_BATCHES:
            self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._num_batches = None, 0

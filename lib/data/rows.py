"""Rows in, a checked data set out."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from lib.data.sources import RawRow, RowSource, open_source

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
    checked = ingest_part(rows, staged, progress, config=settled(config, rows, name), title=name)
    if not checked.num_seen:
        raise DataError(f"{name}: holds no rows")
    if not checked.num_kept:
        raise DataError(checked.message(name))


def settled(config: RowsConfig, rows: RowSource, title: str) -> RowsConfig:
    """The configuration with the kind and the layout that the first rows have.

    Raises:
        DataError: no rows, or of no known layout; `title` is what it calls them.
    """
    try:
        layout = find_layout(rows, config)
    except DataError as error:
        raise DataError(f"{title}: {error}" if str(error).startswith("holds") else str(error)) from error
    return config.model_copy(update={"kind": layout.kind, "layout": layout.name})


def ingest_part(
    rows: RowSource,
    staged: Staged,
    progress: Callable[[int], None] | None = None,
    *,
    config: RowsConfig,
    title: str,
) -> "Checked":
    """As `ingest_dataset`, but there may be no rows, or none that is kept.

    Args:
        config: names kind and layout.
        title: what errors call the rows.
    """
    checked = Checked(find_layout(rows, config), config.bad_rows, config.verifiers, progress or (lambda _: None))
    layout = checked.layout
    counts: Counter[str] = Counter(files=rows.num_files)
    writer = ShardWriter(staged.path, layout.kind)
    splits: list[list[Any]] = []
    try:
        for number, split in enumerate(rows.splits):
            before = checked.num_kept
            for example in checked.examples(rows, number):
                writer.add(to_record(example))
                counts.update(counts_of(example))
            writer.end_split()
            splits.append([split.name, checked.num_kept - before])
    finally:
        writer.close()
    checked.finish(title)
    staged.counts.update(rows_seen=checked.num_seen, rows_kept=checked.num_kept, rows_dropped=checked.num_bad, **counts)
    staged.meta.update(format=layout.kind, layout=layout.name, splits=splits)
    if checked.problems:
        staged.info["dropped"] = checked.problems
    return checked


@dataclass
class Checked:
    """Tells good rows from bad ones and keeps count."""

    layout: Layout
    bad_rows: Literal["refuse", "drop"]
    verifiers: Sequence[str]
    """That prompts may name; empty: any."""
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
                example = checked_row(raw, self.layout, self.verifiers)
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
        """Raises DataError: bad rows that are not to be dropped."""
        self.progress(self.num_seen % _PROGRESS_ROWS)
        if self.num_bad and self.bad_rows == "refuse":
            raise DataError(self.message(source))

    def message(self, source: str) -> str:
        """The bad rows of `source`, as an error lists them."""
        return bad_rows_message(self.problems, self.num_bad, self.num_seen, source)


def checked_row(raw: RawRow, layout: Layout, verifiers: Sequence[str] = ()) -> Example:
    """A row as an example.

    Args:
        verifiers: that a prompt may name; empty: any.
    Raises:
        RowRefused: what is wrong with it.
    """
    if raw.problem is not None:
        raise RowRefused(raw.problem)
    example = layout.check(raw.value, raw.place)
    if isinstance(example, Prompt) and verifiers and example.verifier not in verifiers:
        raise RowRefused(f"verifier {example.verifier!r} is no reward; expected one of {', '.join(verifiers)}")
    return example


def bad_rows_message(problems: list[str], num_bad: int, num_seen: int, source: str) -> str:
    """The first MAX_SHOWN bad rows, and how many there are."""
    more = f", the first {MAX_SHOWN} are shown" if num_bad > MAX_SHOWN else ""
    return "\n".join([*problems, f"{num_bad} of {num_seen} rows of {source} can't be used{more}; correct or remove them"])


def counts_of(example: Example) -> dict[str, int]:
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


class ShardWriter:
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
            self._write_pending()

    @property
    def is_pending(self) -> bool:
        """Whether rows wait for others to make a batch with."""
        return bool(self._pending)

    def end_split(self) -> None:
        """What comes next is of another split, and so of another batch."""
        if self._pending:
            self._write_pending()

    def close(self) -> None:
        """Writes what is left; without any row a file that holds none, so that there is an artifact."""
        self.end_split()
        if not self._num_shards:
            self._open_file()
        self._close_file()

    def _write_pending(self) -> None:
        self.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=self._schema))
        self._pending, self._num_characters = [], 0

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """A whole batch of a data set, as it is; none may be pending."""
        if self._file is None:
            self._open_file()
        self._file.write_batch(batch)
        self._num_batches += 1
        if self._num_batches == _SHARD_BATCHES:
            self._close_file()

    def _open_file(self) -> None:
        self._file = pa.ipc.new_file(str(self._folder / f"rows-{self._num_shards:05d}.arrow"), self._schema)
        self._num_shards += 1

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._num_batches = None, 0

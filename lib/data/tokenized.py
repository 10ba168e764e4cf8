"""Tokenised rows on disk: one Arrow file a split, read without a tokenizer and with the batches of their origin."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lib.core.artifact import Staged, verify
from lib.core.errors import DataError
from lib.core.manifest import Json
from lib.data.document import Document
from lib.data.shuffle import ExampleSource, SourceRow
from lib.data.stream import Encoding

FORMAT = "tokenized"
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("num_characters", pa.int64(), nullable=False),
        pa.field("num_targets", pa.int64(), nullable=False),
        pa.field("token_ids", pa.large_list(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("loss_mask", pa.large_list(pa.field("item", pa.uint8(), nullable=False)), nullable=False),
        pa.field("weights", pa.large_list(pa.field("item", pa.float32(), nullable=False))),
        pa.field("labels", pa.string()),
    ]
)
"""Columns of a split's file; loss_mask is 0 or 1, a byte each, so that it is read without unpacking bits."""
_BATCH_ROWS = 1024
_CONVERTED_ROWS = 128
"""Rows whose ids and counts are made Python values of at a time."""


def split_name(split: int) -> str:
    return f"tokens-{split:06d}.arrow"


def write_split(source: ExampleSource, split: int, encoding: Encoding, folder: Path) -> int:
    """Tokenise one split into its file; returns the number of its rows. Splits can be written in any order, by anybody.

    Raises:
        DataError: a row can't be used or tokenised.
    """
    num_rows = 0
    rows = source.read(split)
    with pa.ipc.new_file(str(folder / split_name(split)), SCHEMA) as file:
        while batch := list(islice(rows, _BATCH_ROWS)):
            documents = encoding.encode([row.example for row in batch])
            file.write_batch(_record_batch(batch, documents))
            num_rows += len(batch)
    return num_rows


def finish(
    staged: Staged, source: ExampleSource, encoding: Encoding, rows_of_splits: Sequence[int], rules: Json | None = None
) -> None:
    """Turn the files of all splits into a data set.

    Args:
        rules: by which conversations became documents; none where rows are something else.
    Raises:
        DataError: the file of a split is missing.
    """
    for split in range(source.num_splits):
        if not (staged.path / split_name(split)).is_file():
            raise DataError(f"split {split} of {source.num_splits} was not tokenised; run it again")
    staged.counts.update(rows=sum(rows_of_splits))
    staged.meta.update(format=FORMAT, splits=list(rows_of_splits), source=source.digest)
    staged.meta.update(encoding=dict(encoding.decided_by), rules=rules or {})


@dataclass(frozen=True)
class TokenizedExamples:
    """The documents of a tokenised data set, memory-mapped. An ExampleSource."""

    batches: Sequence[Sequence[pa.RecordBatch]]
    """Of each split."""
    digest: str
    decided_by: dict[str, str]
    rules: Json
    """Of the conversations that the documents were."""

    @staticmethod
    def open(folder: Path) -> "TokenizedExamples":
        """Open an artifact that `finish` made.

        Raises:
            ArtifactCorruptError: a file is missing or altered.
            DataError: the artifact holds something else.
        """
        manifest = verify(folder)
        if manifest.meta.get("format") != FORMAT:
            raise DataError(f"{folder}: holds a {manifest.kind!r} artifact, expected tokenised rows")
        readers = [
            pa.ipc.open_file(pa.memory_map(str(folder / split_name(split)))) for split in range(len(manifest.meta["splits"]))
        ]
        if any(reader.schema != SCHEMA for reader in readers):
            raise DataError(f"{folder}: its columns are not {', '.join(SCHEMA.names)}; tokenise the data set again")
        batches = [[reader.get_batch(index) for index in range(reader.num_record_batches)] for reader in readers]
        return TokenizedExamples(batches, manifest.digest, manifest.meta["encoding"], manifest.meta["rules"])

    @property
    def encoding(self) -> Encoding:
        """Passes the documents on as they are."""
        return Encoding(list, self.decided_by)

    @property
    def num_splits(self) -> int:
        return len(self.batches)

    def read(self, split: int, start: int = 0, step: int = 1) -> Iterator[SourceRow]:
        """See ExampleSource.read."""
        first, wanted = 0, start
        for batch in self.batches[split]:
            if wanted < first + batch.num_rows:
                rows = range(wanted - first, batch.num_rows, step)
                for start in range(0, len(rows), _CONVERTED_ROWS):
                    yield from _documents(batch, rows[start : start + _CONVERTED_ROWS], first)
                wanted += len(rows) * step
            first += batch.num_rows


def _record_batch(rows: Sequence[SourceRow], documents: Sequence[Document]) -> pa.RecordBatch:
    weights = [document.weights for document in documents]
    return pa.RecordBatch.from_arrays(
        [
            pa.array([document.sample_id for document in documents], pa.string()),
            pa.array([row.num_characters for row in rows], pa.int64()),
            pa.array([document.num_targets for document in documents], pa.int64()),
            _lists([document.token_ids for document in documents], SCHEMA.field("token_ids").type),
            _lists([document.loss_mask.view(np.uint8) for document in documents], SCHEMA.field("loss_mask").type),
            pa.array(weights, SCHEMA.field("weights").type),
            pa.array([document.labels for document in documents], pa.string()),
        ],
        schema=SCHEMA,
    )


def _lists(values: Sequence[np.ndarray], kind: Any) -> pa.LargeListArray:
    offsets = np.concatenate(([0], np.cumsum([len(value) for value in values])))
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values)), type=kind)


def _documents(batch: pa.RecordBatch, rows: range, first: int) -> list[SourceRow]:
    """Views of the memory map: nothing is copied but ids and counts."""
    chosen = np.arange(rows.start, rows.stop, rows.step)
    ids = batch.column("id").take(pa.array(chosen)).to_pylist()
    characters, targets = (batch.column(name).to_numpy()[chosen].tolist() for name in ("num_characters", "num_targets"))
    tokens, masks, weights = (batch.column(name) for name in ("token_ids", "loss_mask", "weights"))
    offsets = tokens.offsets.to_numpy()
    starts, stops = offsets[chosen].tolist(), offsets[chosen + 1].tolist()
    token_ids, loss_mask = tokens.values.to_numpy(), masks.values.to_numpy().view(np.bool_)
    factors: Sequence[np.ndarray | None] = [None] * len(rows)
    if weights.null_count < len(weights):
        factors = [weights[row].values.to_numpy() if weights[row].is_valid else None for row in rows]
    labels: Sequence[str | None] = [None] * len(rows)
    if batch.column("labels").null_count < len(weights):
        labels = batch.column("labels").take(pa.array(chosen)).to_pylist()
    places = list(zip(starts, stops))
    parts = ([values[start:stop] for start, stop in places] for values in (token_ids, loss_mask))
    documents = map(Document, ids, *parts, factors, targets, labels)
    return list(map(SourceRow._make, zip(range(first + rows.start, first + rows.stop, rows.step), characters, documents)))

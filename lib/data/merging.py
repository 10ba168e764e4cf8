"""The data sets of a source's shards as one: the very bytes that ingesting the source in one go writes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from lib.core.artifact import Staged, read_manifest
from lib.core.errors import DataError
from lib.core.manifest import Manifest, digest_of
from lib.data.in_place import write_places
from lib.data.rows import MAX_SHOWN, ShardWriter, bad_rows_message, counts_of
from lib.data.schemas.arrow import from_record
from lib.data.shard import SourceShard


def merge_parts(
    shards: Sequence[SourceShard], parts: Sequence[Path], staged: Staged, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Write the data sets of all shards of a source as one.

    What no shard can see alone is looked for here: an id that rows of two shards have. The later row is a bad one.

    Args:
        shards: of the source, in order.
        parts: data sets made of them by `ingest_shard`, one for each.
        staged: see `ingest_dataset`.
        progress: called with the number of rows since the last call.
    Raises:
        DataError: no rows, none that is kept, or an id given twice where bad rows are refused; parts that are not of these
            shards.
    """
    if not parts:
        raise DataError("there are no shards to merge; the source holds no rows")
    manifests = [read_manifest(part) for part in parts]
    if shards[0].rows.read == "in_place":
        assert len(shards) == 1, f"a source that is read in place has {len(shards)} shards"
        staged.lineage["source"] = shards[0].content
        write_places(shards[0], staged)
        return
    _check_whole(shards, manifests)
    totals = _Totals(shards[0].source, shards[0].rows.bad_rows)
    first = manifests[0].meta
    writer = ShardWriter(staged.path, first["format"])
    taken = _Taken(first["format"], _repeated(parts))
    splits: list[list[object]] = []
    try:
        for part, manifest in zip(parts, manifests):
            totals.add(manifest)
            for (name, num_rows), batches in _splits(part, manifest):
                num_left = sum(taken.write(batch, writer, totals) for batch in batches)
                writer.end_split()
                progress(num_rows)
                splits.append([name, num_left])
    finally:
        writer.close()
    totals.finish()
    staged.counts.update(totals.counts)
    staged.meta.update(format=first["format"], layout=first["layout"], splits=splits)
    staged.lineage["source"] = digest_of([shard.content for shard in shards])
    if totals.problems:
        staged.info["dropped"] = totals.problems


@dataclass
class _Totals:
    """Counts over all parts, and what is wrong with rows."""

    title: str
    bad_rows: str
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, manifest: Manifest) -> None:
        for name, count in manifest.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self._tell(manifest.info.get("dropped", []))

    def drop(self, problem: str, counts: dict[str, int]) -> None:
        """A row that had been kept is a bad one."""
        self._tell([problem])
        for name, count in (*counts.items(), ("rows_kept", 1), ("rows_dropped", -1)):
            self.counts[name] -= count

    def _tell(self, problems: Sequence[str]) -> None:
        self.problems += problems[: MAX_SHOWN - len(self.problems)]

    def finish(self) -> None:
        """Raises DataError: there is nothing, or there are bad rows that are not to be dropped."""
        counts = self.counts
        if not counts["rows_seen"]:
            raise DataError(f"{self.title}: holds no rows")
        if not counts["rows_kept"] or (self.bad_rows == "refuse" and counts["rows_dropped"]):
            raise DataError(bad_rows_message(self.problems, counts["rows_dropped"], counts["rows_seen"], self.title))


@dataclass
class _Taken:
    """Leaves out rows whose id an earlier row has."""

    kind: str
    suspects: np.ndarray
    """Sorted hashes of ids, among them those of all ids that are given twice."""
    place_of: dict[str, str] = field(default_factory=dict)
    """Id -> place, of suspects."""

    def write(self, batch: pa.RecordBatch, writer: ShardWriter, totals: _Totals) -> int:
        """Write a batch of a split; returns the number of rows written.

        From the first row of a split that is left out on, batches are cut anew, as if it had never been there.
        """
        suspicious = np.isin(_hashes(batch), self.suspects)
        left_out = np.array([bool(flag) and self._is_taken(batch, row, totals) for row, flag in enumerate(suspicious)], bool)
        if not left_out.any() and not writer.is_pending:
            writer.write_batch(batch)
            return int(batch.num_rows)
        kept = batch.filter(pa.array(~left_out))
        for record in kept.to_pylist():
            writer.add(record)
        return int(kept.num_rows)

    def _is_taken(self, batch: pa.RecordBatch, row: int, totals: _Totals) -> bool:
        row_id, place = batch.column("id")[row].as_py(), batch.column("source")[row].as_py()
        earlier = self.place_of.setdefault(row_id, place)
        if earlier == place:
            return False
        example = from_record(self.kind, batch.slice(row, 1).to_pylist()[0])
        totals.drop(f"{place}: id {row_id!r} is taken by {earlier}; give each row its own", counts_of(example))
        return True


def _check_whole(shards: Sequence[SourceShard], manifests: Sequence[Manifest]) -> None:
    """Raises DataError: a part is missing, or is of another shard."""
    if len(shards) != len(manifests):
        raise DataError(f"{len(manifests)} parts of {len(shards)} shards; ingest the source again")
    for shard, manifest in zip(shards, manifests):
        names = {name for name, _ in manifest.meta["splits"]}
        range_ = [shard.first, shard.stop] if shard.num_shards > 1 else None
        if manifest.meta.get("range") != range_ or not names <= {file.name for file in shard.files}:
            raise DataError(f"{shard.title}: its part was made of other rows; ingest the source again")


def _repeated(parts: Sequence[Path]) -> np.ndarray:
    """Hashes that several rows' ids have; eight bytes a row are kept in memory, so that a source may have many."""
    hashes = [_hashes(batch) for part in parts for batch in _batches(part)]
    values, counts = np.unique(np.concatenate(hashes or [np.zeros(0, np.int64)]), return_counts=True)
    found: np.ndarray = values[counts > 1]
    return found


def _hashes(batch: pa.RecordBatch) -> np.ndarray:
    """[rows] one number for one id; of two ids it may be the same, so whatever it finds is looked at again."""
    return np.fromiter(map(hash, batch.column("id").to_pylist()), np.int64, batch.num_rows)


def _splits(part: Path, manifest: Manifest) -> Iterator[tuple[tuple[str, int], list[pa.RecordBatch]]]:
    """((name, rows), batches) of each split; no batch holds rows of two."""
    batches = _batches(part)
    for name, num_rows in manifest.meta["splits"]:
        found, num_left = [], num_rows
        while num_left:
            found.append(next(batches))
            num_left -= found[-1].num_rows
        yield (name, num_rows), found


def _batches(part: Path) -> Iterator[pa.RecordBatch]:
    for entry in read_manifest(part).files:
        reader = pa.ipc.open_file(pa.memory_map(str(part / entry.path)))
        yield from map(reader.get_batch, range(reader.num_record_batches))

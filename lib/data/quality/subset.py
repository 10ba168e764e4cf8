"""Some of a data set's rows as a data set: the same records, byte for byte, in the same splits."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.core.artifact import Staged, read_manifest
from lib.core.errors import DataError


def write_subset(folder: Path, kept: np.ndarray, staged: Staged) -> None:
    """Write the rows of the data set in `folder` that are kept.

    Args:
        kept: [num_rows] bool
        staged: gets files, `counts` and `meta`.
    Raises:
        DataError: no row is kept, or the flags are not of this data set.
    """
    manifest = read_manifest(folder)
    splits = [(name, rows) for name, rows in manifest.meta["splits"]]
    if sum(rows for _, rows in splits) != len(kept):
        raise DataError(f"{folder}: holds {sum(rows for _, rows in splits)} rows, {len(kept)} were looked at")
    if not kept.any():
        raise DataError(f"{folder}: none of its {len(kept)} rows is left; relax the settings")
    start, counts = 0, {"messages": 0, "assistant_messages": 0, "rows_with_answer": 0}
    for entry in manifest.files:
        reader = pa.ipc.open_file(pa.memory_map(str(folder / entry.path)))
        with pa.ipc.new_file(str(staged.path / entry.path), reader.schema) as file:
            for batch in map(reader.get_batch, range(reader.num_record_batches)):
                chosen = batch.filter(pa.array(kept[start : start + batch.num_rows]))
                start += batch.num_rows
                if chosen.num_rows:
                    file.write_batch(chosen)
                    _count(chosen, counts)
    offsets = np.concatenate(([0], np.cumsum([rows for _, rows in splits]))).tolist()
    sizes = [int(np.count_nonzero(kept[first:stop])) for first, stop in pairwise(offsets)]
    num_kept = int(np.count_nonzero(kept))
    staged.counts.update(rows_seen=len(kept), rows_kept=num_kept, rows_dropped=len(kept) - num_kept)
    staged.counts.update({name: counts[name] for name in counts if name in manifest.counts})
    staged.meta.update(manifest.meta, splits=[[name, size] for (name, _), size in zip(splits, sizes)])


def _count(batch: pa.RecordBatch, counts: dict[str, int]) -> None:
    """Conversations are counted as at ingestion."""
    if "messages" in batch.schema.names:
        roles = pc.list_flatten(batch.column("messages")).field("role")
        counts["messages"] += len(roles)
        counts["assistant_messages"] += pc.sum(pc.equal(roles, "assistant")).as_py() or 0
    if "answer" in batch.schema.names:
        counts["rows_with_answer"] += len(batch) - batch.column("answer").null_count

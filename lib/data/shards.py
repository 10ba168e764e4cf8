"""A source cut into shards, so that each is ingested on its own; one too large to be kept twice is a single shard."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from lib.config.rows import RowsConfig
from lib.core.artifact import Staged
from lib.core.errors import ConfigError
from lib.data.in_place import write_places
from lib.data.rows import ingest_part, settled
from lib.data.shard import ShardFile, SourceShard
from lib.data.sources import FileSource
from lib.data.sources_listing import SourceFile, filesystem_at

SHARD_BYTES = 512 << 20
"""A shard has about so many at most, of files as they are stored; a quarter of it makes a shard of its own."""
MAX_SHARDS = 1000
"""More data makes larger shards instead."""
MOST_COPIED_BYTES = 64 << 30
"""Sources with more are read in place, unless the configuration says otherwise."""


def plan_shards(source: FileSource, title: str, config: RowsConfig, shard_bytes: int = SHARD_BYTES) -> list[SourceShard]:
    """Cut a source into shards of about `shard_bytes`; a small one is one shard.

    Files that are added change the shards around them, and only those: where a shard ends is decided by the files in it.

    Args:
        title: what errors call the source.
    Raises:
        DataError: no rows, or of no known layout.
        ConfigError: rows shall be read in place, and bad ones dropped.
    """
    rows = settled(config, source, title).model_copy(update={"read": _how_read(source, config, title)})
    if rows.kind != "prompt":
        rows = rows.model_copy(update={"verifiers": ()})  # so that a new reward changes no other rows' shards
    while sum(file.size_bytes for file in source.files) > shard_bytes * MAX_SHARDS:
        shard_bytes *= 2
    whole = (source.files, 0, len(source.splits))
    parts = [whole] if rows.read == "in_place" else list(_parts(source, shard_bytes))
    return [
        SourceShard(
            source=title,
            number=number,
            num_shards=len(parts),
            files=tuple(map(_recorded, files)),
            first=first,
            stop=stop,
            rows=rows,
        )
        for number, (files, first, stop) in enumerate(parts, start=1)
    ]


def ingest_shard(shard: SourceShard, staged: Staged, progress: Callable[[int], None]) -> None:
    """Check every row of a shard and keep them, or record where they are.

    Args:
        staged: see `ingest_dataset`.
        progress: called with the number of rows read since the last call.
    Raises:
        DataError: rows that can't be used.
    """
    staged.lineage["source"] = shard.content
    if shard.rows.read == "in_place":
        write_places(shard, staged)
    else:
        ingest_part(open_shard(shard), staged, progress, config=shard.rows, title=shard.title)
        if shard.num_shards > 1:  # the only part is the whole, and is kept once
            staged.meta["range"] = [shard.first, shard.stop]


def open_shard(shard: SourceShard) -> FileSource:
    """The rows of a shard, wherever it was planned.

    Raises:
        DataError: a file is damaged. One that was altered since is refused when it is read.
    """
    files = [SourceFile(**dict(file), filesystem=filesystem_at(file.opened_by)[0]) for file in shard.files]
    return FileSource(files, first=shard.first, stop=shard.stop)


def _how_read(source: FileSource, config: RowsConfig, title: str) -> Literal["copy", "in_place"]:
    """Rows that are bad can be left out of a copy only: in place their neighbours' numbers would change with them."""
    if config.read == "in_place" and config.bad_rows == "drop":
        raise ConfigError(
            f"{title}: rows that are read in place (read: in_place) can't be dropped (bad_rows: drop); set read: copy, or "
            "bad_rows: refuse and correct the rows"
        )
    if config.read != "auto":
        return config.read
    num_bytes = sum(file.size_bytes for file in source.files)
    return "in_place" if num_bytes > MOST_COPIED_BYTES and config.bad_rows == "refuse" else "copy"


def _parts(source: FileSource, shard_bytes: int) -> Iterator[tuple[Sequence[SourceFile], int, int]]:
    """(files, first, stop) of each shard: small files together, a large one in several ranges of its splits."""
    group: list[SourceFile] = []
    num_splits, num_bytes = 0, 0
    for file, count in zip(source.files, source.num_splits_of):
        pieces = min(count, round(file.size_bytes / shard_bytes))
        if group and (pieces > 1 or num_bytes + file.size_bytes > shard_bytes):
            yield group, 0, num_splits
            group, num_splits, num_bytes = [], 0, 0
        if pieces > 1:
            for number in range(pieces):
                yield [file], number * count // pieces, (number + 1) * count // pieces
            continue
        group.append(file)
        num_splits, num_bytes = num_splits + count, num_bytes + file.size_bytes
        if num_bytes >= shard_bytes // 4 and _is_last(file.name):
            yield group, 0, num_splits
            group, num_splits, num_bytes = [], 0, 0
    if group:
        yield group, 0, num_splits


def _is_last(name: str) -> bool:
    """Whether a shard that is large enough ends with this file; so for one file of four, whatever files are around it."""
    return hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % 4 == 0


def _recorded(file: SourceFile) -> ShardFile:
    return ShardFile(**{name: getattr(file, name) for name in ShardFile.model_fields})

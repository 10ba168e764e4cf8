"""A data set that holds no rows, but says where they are: they are read and checked when they are used.

For sources too large to be kept twice. Its digest is of the content, as the source's listing has it; where the content was
found is beside it, so that a source that moved is the same data set, written anew.
"""

import json
from pathlib import Path

from lib.core.artifact import Staged, read_manifest
from lib.core.errors import DataError
from lib.core.manifest import canonical_json
from lib.data.shard import SourceShard

FORMAT = "in_place"
CONTENT_NAME = "content.json"


def write_places(shard: SourceShard, staged: Staged) -> None:
    """Record a whole source, planned as one shard."""
    staged.counts.update(files=len(shard.files), size_bytes=sum(file.size_bytes for file in shard.files))
    content = [{"name": file.name, "size_bytes": file.size_bytes, "stamp": file.stamp} for file in shard.files]
    (staged.path / CONTENT_NAME).write_text(canonical_json(content), encoding="utf-8")
    staged.meta.update(format=FORMAT, rows=shard.rows.model_dump(mode="json"))
    staged.info["places"] = shard.model_dump(mode="json")


def read_places(folder: Path) -> SourceShard:
    """The source that was recorded.

    Raises:
        DataError: the artifact records none.
    """
    manifest = read_manifest(folder)
    if manifest.meta.get("format") != FORMAT:
        raise DataError(f"{folder}: doesn't say where rows are, but holds a {manifest.kind!r} artifact; ingest the source")
    return SourceShard.model_validate_json(json.dumps(manifest.info["places"]))

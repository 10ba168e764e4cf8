"""Raw rows to a data set of checked examples.

pyflyte -c flyte.config run workflows/ingest.py ingest --source rows.jsonl
"""

from flytekit import workflow

from lib.config.rows import RowsConfig
from tasks.artifacts import Dataset
from tasks.ingest import ingest_shards, list_shards, merge_shards
from tasks.sources import RawData

ROWS = RowsConfig()


@workflow
def ingest(source: RawData, config: RowsConfig = ROWS) -> Dataset:
    """Check every row and keep them as a data set; a large source is read by many tasks, each of which is cached and retried.

    Args:
        source: rows in a layout of docs/data-formats.md: a file, a folder or a glob, a path or a URI.
        config: how the rows are read.
    """
    shards = list_shards(source=source, config=config)
    return merge_shards(shards=shards, parts=ingest_shards(shard=shards))

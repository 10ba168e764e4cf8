"""Raw rows to checked examples: a source is cut into shards, each is read by a task of its own, and the parts become one."""

from datetime import datetime
from typing import TYPE_CHECKING

from flytekit import task

from lib.config.rows import RowsConfig
from lib.data.window import day_before
from tasks.artifacts import Dataset, DatasetFolder
from tasks.cache import CACHED
from tasks.environments import CPU_IMAGE, MEDIUM, RETRIES, SHORT, SMALL, retry_infrastructure
from tasks.lazy import lazy
from tasks.mapping import MapTask
from tasks.progress import bar
from tasks.remote import share_credentials
from tasks.shard_type import Shard
from tasks.sources import RawData, RawDataSource

if TYPE_CHECKING:
    from lib.data import merging, shards, sources
    from lib.rewards import catalogue
else:
    catalogue = lazy("lib.rewards.catalogue")
    merging = lazy("lib.data.merging")
    shards = lazy("lib.data.shards")
    sources = lazy("lib.data.sources")

AT_ONCE = 32
"""Shards of a source that are ingested side by side."""


@task(container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def list_shards(source: RawData, config: RowsConfig) -> list[Shard]:
    """What is there now, in parts that are keyed by their content. Not cached, so that rows replaced in place are seen."""
    if not config.verifiers:
        config = config.model_copy(update={"verifiers": tuple(catalogue.REWARDS)})
    return shards.plan_shards(sources.open_source(source.address()), source.uri, config)


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def ingest_shard(shard: Shard) -> Dataset:
    """Check every row of a shard to be copied; a bad one is an error that names its place, unless it is to be dropped."""
    share_credentials(shard.files[0].opened_by)
    dataset = DatasetFolder.create()
    with dataset.write() as staged, bar("ingest", "rows") as shown:
        shards.ingest_shard(shard, staged, shown.add)
    return dataset


ingest_shards = MapTask(ingest_shard, concurrency=AT_ONCE, min_success_ratio=1.0)


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def merge_shards(shards: list[Shard], parts: list[Dataset]) -> Dataset:
    """The parts as one data set, the same that ingesting the source in one go gives."""
    dataset = DatasetFolder.create()
    with dataset.write() as staged, bar("merge", "rows") as shown:
        merging.merge_parts(shards, [part.open() for part in parts], staged, shown.add)
    return dataset


@task(container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES)
@retry_infrastructure
def data_window(pattern: str, kickoff_time: datetime) -> RawData:
    """The rows of the day before a kickoff. Not cached: what is there at kickoff is what counts."""
    return RawDataSource(day_before(pattern, kickoff_time)).stamped()

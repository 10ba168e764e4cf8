"""Raw rows to checked conversations."""

from datetime import datetime
from typing import TYPE_CHECKING

from flytekit import task

from lib.config.rows import RowsConfig
from lib.data.window import day_before
from tasks.artifacts import Dataset, DatasetFolder
from tasks.cache import CACHED
from tasks.environments import CPU_IMAGE, MEDIUM, RETRIES, SHORT, SMALL, retry_infrastructure
from tasks.lazy import lazy
from tasks.progress import bar
from tasks.remote import fingerprint
from tasks.sources import RawData, RawDataSource

if TYPE_CHECKING:
    from lib.data import rows
else:
    rows = lazy("lib.data.rows")

DEFAULT = RowsConfig()


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def ingest(source: RawData, config: RowsConfig = DEFAULT) -> Dataset:
    """Check every row and keep them as a data set; a bad row is an error that names its place, unless it is to be dropped."""
    dataset = DatasetFolder.create()
    with dataset.write() as staged, bar("ingest", "rows") as shown:
        staged.lineage["source"] = source.content_hash()
        rows.ingest_dataset(source.address(), staged, progress=shown.add, config=config)
    return dataset


@task(container_image=CPU_IMAGE, requests=SMALL, retries=RETRIES)
@retry_infrastructure
def data_window(pattern: str, kickoff_time: datetime) -> RawData:
    """The rows of the day before a kickoff. Not cached: what is there at kickoff is what counts."""
    address = day_before(pattern, kickoff_time)
    return RawDataSource(address, fingerprint(address))

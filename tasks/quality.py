"""Quality gates: what a data set holds, and data sets without duplicates, without evaluation rows, in two parts."""

from typing import TYPE_CHECKING, NamedTuple

from flytekit import task

from lib.config.quality import CleanConfig, ContaminationConfig, SplitConfig
from tasks.artifacts import Dataset, DatasetFolder, QualityReport, QualityReportFolder
from tasks.cache import CACHED
from tasks.environments import CPU_IMAGE, MEDIUM, RETRIES, SHORT, retry_infrastructure
from tasks.lazy import lazy
from tasks.progress import bar

if TYPE_CHECKING:
    from lib.data.quality import datasets
else:
    datasets = lazy("lib.data.quality.datasets")

CLEAN, CONTAMINATION, SPLIT = CleanConfig(), ContaminationConfig(), SplitConfig()


class TwoParts(NamedTuple):
    """A data set, divided."""

    train: Dataset
    evaluation: Dataset


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def check_data(data: Dataset, config: CleanConfig = CLEAN) -> QualityReport:
    """Lengths, scripts, duplicates, and counts of secrets and personal data; leaves the data as it is."""
    report = QualityReportFolder.create()
    with report.write() as staged, bar("check", "rows") as shown:
        staged.lineage["data"] = data.digest
        datasets.write_report(data.open(), staged, config, progress=shown.add)
    return report


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def clean_data(data: Dataset, config: CleanConfig = CLEAN) -> Dataset:
    """The rows that no earlier row equals or resembles."""
    cleaned = DatasetFolder.create()
    with cleaned.write() as staged, bar("clean", "rows") as shown:
        staged.lineage["data"] = data.digest
        datasets.write_clean(data.open(), staged, config, progress=shown.add)
    return cleaned


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def decontaminate(data: Dataset, evaluation: Dataset, config: ContaminationConfig = CONTAMINATION) -> Dataset:
    """The rows that hold no row of an evaluation set."""
    rest = DatasetFolder.create()
    with rest.write() as staged, bar("decontaminate", "rows") as shown:
        staged.lineage.update(data=data.digest, evaluation=evaluation.digest)
        datasets.write_decontaminated(data.open(), evaluation.open(), staged, config, progress=shown.add)
    return rest


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def split_data(data: Dataset, config: SplitConfig = SPLIT) -> TwoParts:
    """The rows for training and those held out, by a hash of what is asked in each."""
    parts = TwoParts(DatasetFolder.create(), DatasetFolder.create())
    with parts.train.write() as train, parts.evaluation.write() as held_out, bar("split", "rows") as shown:
        train.lineage["data"] = held_out.lineage["data"] = data.digest
        datasets.write_split(data.open(), train, held_out, config, progress=shown.add)
    return parts

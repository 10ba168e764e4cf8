"""Quality gates: what a data set holds, and data sets without duplicates, without evaluation rows, in two parts."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from flytekit import Deck, task

from lib.config.base import Frozen
from lib.config.quality import CleanConfig, ContaminationConfig, PreviewConfig, SplitConfig
from tasks.artifacts import (
    Dataset,
    DatasetFolder,
    QualityReport,
    QualityReportFolder,
    Report,
    ReportFolder,
    TokenizerFiles,
)
from tasks.cache import CACHED
from tasks.environments import CPU_IMAGE, MEDIUM, RETRIES, SHORT, retry_infrastructure
from tasks.lazy import lazy
from tasks.progress import bar

if TYPE_CHECKING:
    from lib.data.quality import datasets
    from lib.evals import data_report
else:
    data_report = lazy("lib.evals.data_report")
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
    return _some_rows("clean", datasets.write_clean, config, data=data)


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def decontaminate(data: Dataset, evaluation: Dataset, config: ContaminationConfig = CONTAMINATION) -> Dataset:
    """The rows that hold no row of an evaluation set."""
    return _some_rows("decontaminate", datasets.write_decontaminated, config, data=data, evaluation=evaluation)


def _some_rows(title: str, write: Callable[..., None], config: Frozen, **inputs: DatasetFolder) -> DatasetFolder:
    """What `write` keeps of the rows of the first input."""
    kept = DatasetFolder.create()
    with kept.write() as staged, bar(title, "rows") as shown:
        staged.lineage.update({name: data.digest for name, data in inputs.items()})
        write(*(data.open() for data in inputs.values()), staged, config, progress=shown.add)
    return kept


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT)
@retry_infrastructure
def split_data(data: Dataset, config: SplitConfig = SPLIT) -> TwoParts:
    """The rows for training and those held out, by a hash of what is asked in each."""
    parts = TwoParts(DatasetFolder.create(), DatasetFolder.create())
    with parts.train.write() as train, parts.evaluation.write() as held_out, bar("split", "rows") as shown:
        train.lineage["data"] = held_out.lineage["data"] = data.digest
        datasets.write_split(data.open(), train, held_out, config, progress=shown.add)
    return parts


@task(cache=CACHED, container_image=CPU_IMAGE, requests=MEDIUM, retries=RETRIES, timeout=SHORT, enable_deck=True)
@retry_infrastructure
def describe_data(
    stages: list[Dataset],
    train: Dataset,
    evaluation: Dataset,
    report: QualityReport,
    tokenizer: TokenizerFiles,
    config: PreviewConfig,
) -> Report:
    """One page about a data set: what is left of the rows and why, what they hold, how they pack, what of them is trained.

    Args:
        stages: the data set ingested, without duplicates, and without benchmark rows.
    """
    parts = {"train": train, "evaluation": evaluation, "quality": report, "tokenizer": tokenizer}
    page = ReportFolder.create()
    with page.write() as staged:
        staged.lineage.update({name: part.digest for name, part in parts.items()})
        opened = {name: part.open() for name, part in parts.items()}
        folders = data_report.DataFolders(stages=[stage.open() for stage in stages], **opened)
        data_report.write_data_report(staged, folders, config)
        Deck("data", (staged.path / "report.html").read_text(encoding="utf-8"))
    return page

"""Raw rows to data sets that are fit for training: checked, without duplicates and benchmark rows, with a part held out.

pyflyte -c flyte.config run workflows/data.py data --inputs-file configs/data/chain_sum.yaml
"""

from typing import NamedTuple

from flytekit import workflow

from lib.config.quality import CleanConfig, ContaminationConfig, PreviewConfig, SplitConfig
from lib.config.rows import RowsConfig
from tasks.artifacts import Dataset, QualityReport, Report
from tasks.quality import check_data, clean_data, decontaminate, describe_data, split_data
from tasks.sources import RawData, TokenizerSource
from tasks.tokenize import find_tokenizer
from workflows.ingest import ROWS, ingest

CLEAN = CleanConfig()
CONTAMINATION = ContaminationConfig()
SPLIT = SplitConfig()
PREVIEW = PreviewConfig()


class DataOutputs(NamedTuple):
    """What a run hands over."""

    train: Dataset
    evaluation: Dataset
    report: QualityReport
    page: Report


@workflow
def data(  # noqa: PLR0913 - a workflow's inputs are its form in the console
    source: RawData,
    benchmarks: RawData,
    tokenizer: TokenizerSource,
    rows: RowsConfig = ROWS,
    benchmark_rows: RowsConfig = ROWS,
    clean: CleanConfig = CLEAN,
    contamination: ContaminationConfig = CONTAMINATION,
    split: SplitConfig = SPLIT,
    preview: PreviewConfig = PREVIEW,
) -> DataOutputs:
    """Ingest rows, report on them, and give out what may be trained on and what is held out.

    Args:
        source: rows, a file or a folder of them, a path or a URI.
        benchmarks: rows that models are compared by, which must not be trained on.
        tokenizer: folder with the tokenizer of the model to be trained, to show what of the rows is trained.
        rows: how the rows of `source` are read.
        benchmark_rows: how those of `benchmarks` are read.
        clean: which duplicates are left out.
        contamination: when a row is taken to hold a benchmark row.
        split: how many rows are held out, and which stay together.
        preview: what the page shows of packing and training.
    """
    ingested = ingest(source=source, config=rows)
    compared = ingest(source=benchmarks, config=benchmark_rows)
    report = check_data(data=ingested, config=clean)
    cleaned = clean_data(data=ingested, config=clean)
    apart = decontaminate(data=cleaned, evaluation=compared, config=contamination)
    sides = split_data(data=apart, config=split)
    page = describe_data(
        stages=[ingested, cleaned, apart],
        train=sides.train,
        evaluation=sides.evaluation,
        report=report,
        tokenizer=find_tokenizer(source=tokenizer),
        config=preview,
    )
    return DataOutputs(train=sides.train, evaluation=sides.evaluation, report=report, page=page)

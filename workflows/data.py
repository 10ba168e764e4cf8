"""Raw rows to data sets that are fit for training: checked, without duplicates and benchmark rows, with a part held out.

pyflyte -c flyte.config run workflows/data.py data --inputs-file configs/data/chain_sum.yaml
"""

from typing import NamedTuple

from flytekit import workflow

from lib.config.quality import CleanConfig, ContaminationConfig, SplitConfig
from lib.config.rows import RowsConfig
from tasks.artifacts import Dataset, QualityReport
from tasks.ingest import ingest
from tasks.quality import check_data, clean_data, decontaminate, split_data
from tasks.sources import RawData

ROWS = RowsConfig()
CLEAN = CleanConfig()
CONTAMINATION = ContaminationConfig()
SPLIT = SplitConfig()


class DataOutputs(NamedTuple):
    """What a run hands over."""

    train: Dataset
    evaluation: Dataset
    report: QualityReport


@workflow
def data(
    source: RawData,
    benchmarks: RawData,
    rows: RowsConfig = ROWS,
    benchmark_rows: RowsConfig = ROWS,
    clean: CleanConfig = CLEAN,
    contamination: ContaminationConfig = CONTAMINATION,
    split: SplitConfig = SPLIT,
) -> DataOutputs:
    """Ingest rows, report on them, and give out what may be trained on and what is held out.

    Args:
        source: rows, a file or a folder of them, a path or a URI.
        benchmarks: rows that models are compared by, which must not be trained on.
        rows: how the rows of `source` are read.
        benchmark_rows: how those of `benchmarks` are read.
        clean: which duplicates are left out.
        contamination: when a row is taken to hold a benchmark row.
        split: how many rows are held out, and which stay together.
    """
    ingested = ingest(source=source, config=rows)
    report = check_data(data=ingested, config=clean)
    cleaned = clean_data(data=ingested, config=clean)
    apart = decontaminate(data=cleaned, evaluation=ingest(source=benchmarks, config=benchmark_rows), config=contamination)
    sides = split_data(data=apart, config=split)
    return DataOutputs(train=sides.train, evaluation=sides.evaluation, report=report)

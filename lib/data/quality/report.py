"""What was found out about a data set."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lib.config.quality import CleanConfig
from lib.data.quality.clean import Choice, find_duplicates
from lib.data.quality.duplicates import Rows
from lib.data.quality.findings import Findings
from lib.data.quality.statistics import TextStatistics

REPORT_NAME = "quality.json"


@dataclass(frozen=True)
class DataQualityReport:
    """Rows of a data set, and which of them cleaning leaves out."""

    rows_in: int
    rows_out: int
    left_out: dict[str, dict[str, Any]]
    """Reason -> rows, first_ids."""
    text: dict[str, Any]
    """See TextStatistics."""
    findings: dict[str, dict[str, Any]]
    """Kind of secret or personal data -> hits, rows, first_ids; never what was found."""
    ingested: dict[str, int]
    """What reading the rows counted: seen, kept, dropped because they can't be used."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_rows(
    rows: Rows, config: CleanConfig, ingested: dict[str, int], progress: Callable[[int], None] = lambda _: None
) -> DataQualityReport:
    """Look at every row; leaves none out."""
    text, findings = TextStatistics(), Findings()

    def looked_at() -> Iterator[Any]:
        for index in range(len(rows)):
            example = rows[index]
            text.add(example)
            findings.add(example)
            progress(1)
            yield example

    choice: Choice = find_duplicates(rows, looked_at(), config)
    return DataQualityReport(
        rows_in=len(rows),
        rows_out=int(np.count_nonzero(choice.kept)),
        left_out=choice.to_json(),
        text=text.to_json(),
        findings=findings.to_json(),
        ingested=ingested,
    )

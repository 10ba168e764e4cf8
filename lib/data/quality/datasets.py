"""The quality gates on data-set artifacts: what each reads and what it writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.config.quality import CleanConfig, ContaminationConfig, SplitConfig
from lib.core.artifact import Staged, read_manifest
from lib.core.errors import DataError
from lib.core.manifest import canonical_json
from lib.data.in_place import FORMAT as IN_PLACE
from lib.data.in_place import read_places
from lib.data.quality.clean import Choice, find_contaminated, find_duplicates, held_out, read_all
from lib.data.quality.report import REPORT_NAME, check_rows
from lib.data.quality.subset import write_subset
from lib.data.schemas.arrow import TYPE_OF
from lib.data.table import ExampleTable

Progress = Callable[[int], None]
"""Called with the number of rows read since the last call."""


def write_report(folder: Path, staged: Staged, config: CleanConfig, *, progress: Progress) -> None:
    """Look at every row of a data set and write the DataQualityReport; changes nothing."""
    report = check_rows(open_rows(folder), config, read_manifest(folder).counts, progress)
    (staged.path / REPORT_NAME).write_text(canonical_json(report.to_json()), encoding="utf-8")
    staged.counts.update(rows_in=report.rows_in, rows_out=report.rows_out)


def write_clean(folder: Path, staged: Staged, config: CleanConfig, *, progress: Progress) -> None:
    """Write a data set without its duplicates.

    Raises:
        DataError: nothing is left.
    """
    rows = open_rows(folder)
    _write_chosen(folder, find_duplicates(rows, read_all(rows, progress), config), staged)


def write_decontaminated(
    folder: Path, evaluation: Path, staged: Staged, config: ContaminationConfig, *, progress: Progress
) -> None:
    """Write a data set without the rows that hold a row of `evaluation`, a data set of any kind.

    Raises:
        DataError: nothing is left.
    """
    choice = find_contaminated(open_rows(folder), open_rows(evaluation), config, progress)
    _write_chosen(folder, choice, staged)


def write_split(folder: Path, train: Staged, evaluation: Staged, config: SplitConfig, *, progress: Progress) -> None:
    """Write the two sides of a data set.

    Raises:
        DataError: one of them would be empty.
    """
    found = held_out(open_rows(folder), config, progress)
    write_subset(folder, ~found, train)
    write_subset(folder, found, evaluation)


def open_rows(folder: Path) -> ExampleTable[Any]:
    """The rows of a data set of any kind.

    Raises:
        ArtifactCorruptError: a file is missing or altered.
        DataError: the artifact is no data set.
    """
    found = read_manifest(folder).meta.get("format")
    if found == IN_PLACE:
        found = read_places(folder).rows.kind
    if found not in TYPE_OF:
        raise DataError(f"{folder}: no data set of examples, but {found!r}; ingest the rows first")
    return ExampleTable.open(folder, TYPE_OF[found])


def _write_chosen(folder: Path, choice: Choice, staged: Staged) -> None:
    write_subset(folder, choice.kept, staged)
    staged.counts.update({f"dropped_{reason}": count for reason, (count, _) in choice.reasons.items()})
    staged.info["left_out"] = choice.to_json()

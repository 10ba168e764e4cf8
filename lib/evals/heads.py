"""What a model's output heads are worth on held-out rows."""

from pathlib import Path

from lib.config.base import Frozen
from lib.core.artifact import Staged
from lib.core.errors import ArtifactCorruptError, ConfigError

FILE_NAME = "heads_report.json"


class HeadScore(Frozen):
    """Of one head."""

    name: str
    loss: float
    """The mean that training lowers, over its targets; 0 where it has none."""
    num_targets: float
    """Documents or tokens of which a label is told, by their weights where they have any."""
    accuracy: float | None
    """Share of them that the greatest logit, or the side of 0, tells right; None for plain numbers."""


class HeadsReport(Frozen):
    """Scores of a model's heads on a data set; a function of model, data, configuration and code alone."""

    loss: float
    """The heads' losses by their weights, which training lowers."""
    heads: tuple[HeadScore, ...]
    num_rows: int
    num_tokens: int
    num_not_finite: int
    """Rows that are in none of these figures: the model gives a NaN or an infinity for them."""


def write_heads_report(report: HeadsReport, staged: Staged) -> None:
    """Fill an artifact."""
    (staged.path / FILE_NAME).write_text(report.model_dump_json(indent=1), encoding="utf-8")
    staged.counts.update(rows=report.num_rows, tokens=report.num_tokens, not_finite=report.num_not_finite)
    staged.meta.update(loss=report.loss, heads=[score.name for score in report.heads])


def read_heads_report(folder: Path) -> HeadsReport:
    """From a verified artifact folder. Raises ArtifactCorruptError when the file isn't a report."""
    try:
        return HeadsReport.model_validate_json((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, ConfigError) as error:
        raise ArtifactCorruptError(f"{folder / FILE_NAME}: not a report about heads: {error}") from error

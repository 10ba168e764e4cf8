"""What an evaluation found, row by row, with intervals; and two of them compared on the same rows."""

import math
from pathlib import Path
from statistics import NormalDist
from typing import Literal

from pydantic import Field

from lib.config.base import Frozen
from lib.core.artifact import Staged
from lib.core.errors import ArtifactCorruptError, ConfigError, DataError

FILE_NAME = "eval_report.json"


class EvalRow(Frozen):
    """One row that was answered."""

    id: str
    prompt: str
    """Text of the last user message."""
    expected: str
    answer: str
    """Text that the model wrote, without its end-of-turn token."""
    value: float
    """Score of the verifier, 0 to 1."""
    correct: bool
    """Whether the score is 1."""
    stop_reason: Literal["stop", "length"]
    num_tokens: int
    """Tokens written."""
    mean_logprob: float
    """Of the tokens written, under the model."""


class EvalReport(Frozen):
    """Scores of a model on a data set. A function of model, data, configuration and code alone, but for `timings`."""

    verifier: str
    accuracy: float
    """Rows answered correctly over rows answered."""
    confidence: float
    interval: tuple[float, float]
    """Wilson's, of the accuracy."""
    num_eval: int
    """Rows answered: those of the set that have an `answer`."""
    num_correct: int
    num_cut: int
    """Answers that were cut at the limit of new tokens."""
    loss: float | None
    """Held-out loss: mean negative log-likelihood of a trained token, over all rows whose is finite; None where none's is."""
    num_loss_rows: int
    num_loss_tokens: int
    num_not_finite: int
    """Rows left out of the loss: the model gives a NaN or an infinity for them."""
    rows: tuple[EvalRow, ...]
    """[num_eval] in the order of the data set."""
    timings: dict[str, float] = Field(default_factory=dict, exclude=True)
    """Seconds of each part; not part of the content."""


class Paired(Frozen):
    """The 2 x 2 table of two evaluations on the same rows, and how surprising it is."""

    both_right: int
    gained: int
    """Wrong before, right after."""
    lost: int
    """Right before, wrong after."""
    both_wrong: int
    p_value: float
    """McNemar's exact test, two-sided: the chance of a split this uneven if gains and losses were equally likely."""


def write_eval_report(report: EvalReport, staged: Staged) -> None:
    """Fill an artifact; the timings go where they don't enter its digest."""
    (staged.path / FILE_NAME).write_text(report.model_dump_json(indent=1), encoding="utf-8")
    staged.counts.update(
        rows=report.num_eval,
        correct=report.num_correct,
        cut=report.num_cut,
        loss_tokens=report.num_loss_tokens,
        not_finite=report.num_not_finite,
    )
    staged.meta.update(verifier=report.verifier, accuracy=report.accuracy, loss=report.loss)
    staged.info.update(timings=report.timings)


def read_eval_report(folder: Path) -> EvalReport:
    """From a verified artifact folder. Raises ArtifactCorruptError when the file isn't a report."""
    try:
        return EvalReport.model_validate_json((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, ConfigError) as error:
        raise ArtifactCorruptError(f"{folder / FILE_NAME}: not an evaluation report: {error}") from error


def compare(before: EvalReport, after: EvalReport) -> Paired:
    """Pair two evaluations by row.

    Raises:
        DataError: they are not of the same rows with the same expected answers.
    """
    asked = {row.id: row.expected for row in before.rows}
    if asked != {row.id: row.expected for row in after.rows}:
        raise DataError(
            f"the evaluations ({before.num_eval} and {after.num_eval} rows) are not of the same rows; "
            "evaluate both models on one data set"
        )
    earlier = {row.id: row.correct for row in before.rows}
    counts = {(old, new): 0 for old in (True, False) for new in (True, False)}
    for row in after.rows:
        counts[earlier[row.id], row.correct] += 1
    gained, lost = counts[False, True], counts[True, False]
    return Paired(
        both_right=counts[True, True],
        gained=gained,
        lost=lost,
        both_wrong=counts[False, False],
        p_value=mcnemar_exact(gained, lost),
    )


def wilson_interval(num_correct: int, num_rows: int, confidence: float) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), which stays inside [0, 1] and is right for few rows too."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = num_correct / num_rows
    shrink = 1 + z * z / num_rows
    centre = (share + z * z / (2 * num_rows)) / shrink
    half = z * math.sqrt(share * (1 - share) / num_rows + z * z / (4 * num_rows * num_rows)) / shrink
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided binomial p-value of `gained` against `lost` at even odds, in integers until the last division."""
    total = gained + lost
    tail = sum(math.comb(total, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / (1 << total))

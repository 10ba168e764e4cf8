"""Laws of the statistics and of the report's file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from lib.core.artifact import read_manifest, stage_artifact
from lib.core.errors import ArtifactCorruptError, DataError
from lib.evals.report import EvalReport, EvalRow, compare, mcnemar_exact, read_eval_report, wilson_interval, write_eval_report


def _report(correct: list[bool], **changes: object) -> EvalReport:
    rows = tuple(
        EvalRow(
            id=str(index),
            prompt="?",
            expected="1",
            answer="1",
            value=float(right),
            correct=right,
            stop_reason="stop",
            num_tokens=2,
            mean_logprob=-0.5,
        )
        for index, right in enumerate(correct)
    )
    values = {
        "verifier": "exact",
        "accuracy": sum(correct) / len(correct),
        "confidence": 0.95,
        "interval": (0.1, 0.9),
        "num_eval": len(correct),
        "num_correct": sum(correct),
        "num_cut": 0,
        "loss": 1.25,
        "num_loss_rows": len(correct),
        "num_loss_tokens": 7,
        "num_not_finite": 0,
        "rows": rows,
        **changes,
    }
    return EvalReport.model_validate(values)


@given(st.integers(1, 400), st.data(), st.floats(0.5, 0.999))
def test_wilson_equals_scipys(num_rows: int, data: st.DataObject, confidence: float) -> None:
    num_correct = data.draw(st.integers(0, num_rows))
    low, high = wilson_interval(num_correct, num_rows, confidence)
    reference = binomtest(num_correct, num_rows).proportion_ci(confidence, method="wilson")
    assert low == pytest.approx(reference.low, abs=1e-9)
    assert high == pytest.approx(reference.high, abs=1e-9)
    assert 0.0 <= low <= num_correct / num_rows <= high <= 1.0


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_binomial_test_at_even_odds(gained: int, lost: int) -> None:
    reference = binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar_exact(gained, lost) == pytest.approx(reference, rel=1e-9)
    assert mcnemar_exact(gained, lost) == mcnemar_exact(lost, gained) <= 1.0


def test_pairs_are_made_by_row() -> None:
    """Rows: kept right, gained twice, lost, kept wrong; p = 2 (1 + 3) / 8 = 1."""
    paired = compare(_report([True, False, False, True, False]), _report([True, True, True, False, False]))
    assert (paired.both_right, paired.gained, paired.lost, paired.both_wrong, paired.p_value) == (1, 2, 1, 1, 1.0)


def test_evaluations_of_different_rows_are_not_compared() -> None:
    with pytest.raises(DataError, match="not of the same rows"):
        compare(_report([True]), _report([True, False]))


def test_the_file_gives_the_report_back_and_timings_stay_out_of_the_digest(tmp_path: Path) -> None:
    """Two runs that find the same and take different times are the same artifact; [C10] one without a finite loss too."""
    digests = []
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        report = _report([True, False], loss=None, num_not_finite=2, timings={"loss_seconds": seconds})
        with stage_artifact(tmp_path / name, "eval_report") as staged:
            write_eval_report(report, staged)
        again = read_eval_report(tmp_path / name)
        assert again == report.model_copy(update={"timings": {}})
        manifest = read_manifest(tmp_path / name)
        assert manifest.info["timings"] == {"loss_seconds": seconds} and manifest.counts["not_finite"] == 2
        digests.append(manifest.digest)
    assert digests[0] == digests[1]


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "eval_report.json").write_text('{"accuracy": 2}', encoding="utf-8")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ArtifactCorruptError, match="not an evaluation report"):
            read_eval_report(folder)

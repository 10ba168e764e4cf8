"""Laws of the step log: one line a step whatever was killed, and nothing of the clock in it."""

import json
from pathlib import Path

import pytest
import torch

from lib.core.errors import ArtifactCorruptError
from lib.train.meters import SpeedMeter, StepLog, StepReport, peak_flops, read_rows, report_row, speed_summary
from lib.train.times import StepTimes


def _report(step: int) -> StepReport:
    return StepReport(
        step=step, loss=1 / step, grad_norm=0.1, learning_rate=1e-5, num_targets=3, num_tokens=7, num_slots=8,
        sample_ids=("a", "b"), figures={"accuracy": 0.5},
    )  # fmt: skip


def test_a_resumed_log_is_that_of_a_run_never_killed(tmp_path: Path) -> None:
    """[K2] Killed in the middle of line 5 with checkpoints at 3: lines 4 and 5 are cut and written again."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    for path, steps in ((whole, range(1, 7)), (cut, range(1, 5))):
        log = StepLog(path, resume_step=0)
        for step in steps:
            log.write(report_row(_report(step)))
        log.close()
    with cut.open("a", encoding="utf-8") as stream:
        stream.write('{"step":5,"lo')
    log = StepLog(cut, resume_step=3)
    for step in range(4, 7):
        log.write(report_row(_report(step)))
    log.close()
    assert cut.read_bytes() == whole.read_bytes()
    assert [row["step"] for row in read_rows(cut)] == [1, 2, 3, 4, 5, 6]


def test_a_log_with_a_gap_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 3}) + "\n")
    with pytest.raises(ArtifactCorruptError, match="doesn't hold steps 1 to 3"):
        StepLog(path, resume_step=3)


def test_lines_hold_no_times() -> None:
    assert not {"seconds", "tokens_per_second", "mfu", "time", "timestamp"} & report_row(_report(1)).keys()


def test_speed_is_tokens_and_flops_over_seconds() -> None:
    meter = SpeedMeter(steps=10, peak_flops=1e9)
    found = meter.step_done(step=4, num_tokens=100, flops=10**6, times=StepTimes.over_ranks(torch.device("cpu")))
    assert found["tokens_per_second"] == pytest.approx(100 / found["seconds"])
    assert found["mfu"] == pytest.approx(1e6 / found["seconds"] / 1e9)
    assert found["eta_seconds"] == pytest.approx(6 * found["seconds"])
    summary = speed_summary([found, found, found])
    assert summary["train_seconds"] == pytest.approx(3 * found["seconds"]) and summary["median_mfu"] == found["mfu"]
    assert summary["part_seconds"]["data"] == pytest.approx(3 * found["parts"]["data"])
    assert speed_summary([])["train_seconds"] == 0


def test_peak_is_measured_where_no_data_sheet_is_known() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8

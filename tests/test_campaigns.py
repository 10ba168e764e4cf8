"""The campaigns at a size for the suite; `python -m tests.campaigns` runs them whole."""

from pathlib import Path

import pytest

from tests import campaigns


def test_a_huge_row_does_not_stop_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 short rows, one of 5 MB in the middle: it is dropped and counted, the others come."""
    monkeypatch.setattr(campaigns, "LONG_ROW_CHARACTERS", 5_000_000)
    campaigns.write_short_rows(tmp_path / "rows.jsonl", 4000)
    warm, last, num_dropped = campaigns.stream_short_rows(tmp_path / "rows.jsonl", 4000)
    assert warm > 0 and last > 0 and num_dropped >= 1

"""The command says which samples a step was made of, and which steps a sample was part of."""

import json
from pathlib import Path

import pytest

from lib.train.compact_ids import compact_ids
from tasks.samples import main

STEPS = (["row-1", "row-2", "row-3", "bad\x1b\nid"], ["row-2", "row-9"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [json.dumps({"step": step, "samples": compact_ids(ids)}) + "\n" for step, ids in enumerate(STEPS, start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def test_steps_and_samples_are_shown_one_a_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids are foreign text: what a terminal could obey is shown as its code."""
    assert main([str(run), "--step", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == ["bad\\x1b\\nid", "row-1", "row-2", "row-3"]
    assert main([str(run), "--id", "row-2"]) == 0
    assert capsys.readouterr().out.splitlines() == ["1", "2"]


def test_what_is_not_there_is_one_message(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--step", "3"]) == 1
    assert capsys.readouterr().err == f"samples: {run}: has no step 3; its last one is 2\n"

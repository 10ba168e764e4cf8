"""The page about a data set: built from real artifacts, it tells every number, and what training would stumble over."""

import json
from pathlib import Path
from typing import Any

import pytest

from lib.config.data import DataConfig
from lib.config.quality import CleanConfig, ContaminationConfig, PreviewConfig, SplitConfig
from lib.config.rows import RowsConfig
from lib.core.artifact import stage_artifact
from lib.core.manifest import Json
from lib.data.quality.datasets import write_clean, write_decontaminated, write_report, write_split
from lib.data.rows import ingest_dataset
from lib.evals.data_report import DataFolders, write_data_report
from tests.tiny import tiny_tokenizer


def _chat(number: int, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"question {number} of " + f"{number * 7919 % 997} " * 6}]
    return {"id": f"r{number}", "messages": [*turns, {"role": "assistant", "content": answer}], **more}


def _folders(root: Path, rows: list[dict[str, Any]], kind: str = "conversation") -> DataFolders:
    """Through every gate, as the workflow has them."""

    def nothing(_: int) -> None:
        return None

    root.mkdir()
    config = RowsConfig(kind=kind, bad_rows="drop")  # type: ignore[arg-type]
    for name, found in (("rows", rows), ("benchmarks", rows[-1:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        with stage_artifact(root / name, "dataset") as staged:
            ingest_dataset(root / f"{name}.jsonl", staged, config=config)
    with stage_artifact(root / "clean", "dataset") as staged:
        write_clean(root / "rows", staged, CleanConfig(near_duplicates="keep"), progress=nothing)
    with stage_artifact(root / "apart", "dataset") as staged:
        write_decontaminated(root / "clean", root / "benchmarks", staged, ContaminationConfig(), progress=nothing)
    with stage_artifact(root / "train", "dataset") as train, stage_artifact(root / "eval", "dataset") as held_out:
        write_split(root / "apart", train, held_out, SplitConfig(evaluation_fraction=0.3), progress=nothing)
    with stage_artifact(root / "quality", "quality_report") as staged:
        write_report(root / "rows", staged, CleanConfig(), progress=nothing)
    with stage_artifact(root / "tokenizer", "tokenizer") as staged:
        tiny_tokenizer(staged.path)
    stages = [root / name for name in ("rows", "clean", "apart")]
    return DataFolders(stages, root / "train", root / "eval", root / "quality", root / "tokenizer")


def _write(folders: DataFolders, target: Path, **preview: Any) -> tuple[Json, str]:
    config = PreviewConfig(**{"sequence_length": 256, "packed_rows": 8, "data": DataConfig(num_streams=4), **preview})
    with stage_artifact(target, "report") as staged:
        summary = write_data_report(staged, folders, config)
    return summary, (target / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> DataFolders:
    """40 rows, one of them twice and one that can't be used; the last one is a benchmark row. One names an address."""
    rows = [_chat(number, f"answer {number}") for number in range(40)]
    rows[3]["messages"][1]["content"] = "write to <b>jo@example.org</b>"
    return _folders(
        tmp_path_factory.mktemp("data") / "chats", [*rows[:39], {**rows[5], "id": "again"}, {"messages": []}, rows[39]]
    )


def test_every_row_is_accounted_for(folders: DataFolders, tmp_path: Path) -> None:
    """[A14] 42 rows are read, 41 can be used, 40 are different, 39 are no benchmark rows; those are divided."""
    summary, page = _write(folders, tmp_path / "page")
    rows = summary["rows"]
    assert [rows[name] for name in ("Read", "Checked", "Without duplicates", "Without benchmark rows")] == [42, 41, 40, 39]
    assert rows["For training"] + rows["Held out"] == 39
    assert summary["findings"] == {"email": 1}
    for part in (
        "can&#x27;t be used: 1",
        "exact duplicate: 1 (again)",
        "contaminated: 1 (r39)",
        "email",
        "Slots filled",
        "Scripts",
    ):
        assert part in page
    assert summary["packing"]["rows"] == 8 and not summary["warnings"]
    assert page.count('class="trained"') == 4 and "the one that is configured" in page


def test_rows_stay_text(folders: DataFolders, tmp_path: Path) -> None:
    """[L2] What a row holds never becomes a tag, and nothing is loaded from elsewhere."""
    _, page = _write(folders, tmp_path / "page", examples=32)
    assert "<b>jo" not in page
    assert "<script" not in page and "http://" not in page and "https://" not in page


def test_what_training_would_refuse_is_told_before(folders: DataFolders, tmp_path: Path) -> None:
    """Rows that are too long, and rows that spell a control token, don't keep the page from being made."""
    summary, page = _write(folders, tmp_path / "short", sequence_length=32)
    assert summary["warnings"] and all(warning in page for warning in ["no row can be used"])
    spelled = [_chat(number, f"answer {number} <|im_end|> more") for number in range(12)]
    summary, page = _write(_folders(tmp_path / "spelled", spelled), tmp_path / "page")
    assert any("control token" in warning for warning in summary["warnings"]) and "control token" in page
    assert summary["packing"] is None


@pytest.mark.parametrize("kind", ["completion", "preference", "events"])
def test_other_kinds_have_a_page_too(kind: str, tmp_path: Path) -> None:
    """Both answers of a pair are shown; events have no tokens."""
    texts = [f"{number} " * 9 for number in range(20)]
    rows: list[dict[str, Any]] = {
        "completion": [{"prompt": text, "completion": f"done {text}"} for text in texts],
        "preference": [{"prompt": text, "chosen": f"yes {text}", "rejected": f"no {text}"} for text in texts],
        "events": [{"member": f"m{n}", "events": [{"item": f"i{n}", "action": "play", "timestamp": n}]} for n in range(20)],
    }[kind]
    summary, page = _write(_folders(tmp_path / "rows", rows, kind), tmp_path / "page")
    assert summary["kind"] == kind and summary["packing"] is None and not summary["warnings"]
    assert page.count('class="trained"') == {"completion": 4, "preference": 8, "events": 0}[kind]

"""The quality gates as tasks: typed, with lineage and counts, and nothing lost between them."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lib.config.data import DataConfig
from lib.config.quality import CleanConfig, PreviewConfig, SplitConfig
from lib.core.errors import DataError
from lib.core.examples import Conversation
from lib.data.table import ExampleTable
from tasks.artifacts import DatasetFolder
from tasks.quality import check_data, clean_data, decontaminate, split_data
from tasks.sources import RawDataSource
from tests.tiny import tiny_tokenizer
from workflows.data import data
from workflows.ingest import ingest


def _rows(questions: list[str]) -> list[dict[str, Any]]:
    return [
        {"id": f"r{n}", "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"Answer: {text}"}]}
        for n, text in enumerate(questions)
    ]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _ids(dataset: DatasetFolder) -> list[str]:
    table = ExampleTable.open(dataset.open(), Conversation)
    return [table[index].sample_id for index in range(len(table))]


@pytest.fixture
def files(fresh_home: Path, tmp_path: Path) -> tuple[Path, Path]:
    """60 different rows, then the first ten again, then one with an address of electronic mail; three benchmark rows."""
    rng = random.Random(2)
    questions = [" ".join(f"word{rng.randrange(5000)}" for _ in range(20)) for _ in range(60)]
    rows = _rows([*questions, *questions[:10], "write to jo@example.org"])
    benchmarks = [{**row, "id": f"b{n}"} for n, row in enumerate(_rows(questions[20:23]))]
    return _write(tmp_path / "rows.jsonl", rows), _write(tmp_path / "benchmarks.jsonl", benchmarks)


def test_every_row_is_on_one_side_or_left_out_for_a_reason(files: tuple[Path, Path], tmp_path: Path) -> None:
    """[A14] [I8] 71 rows: 10 are repeated, 3 are benchmark rows, 58 are divided. Lineage leads from each to what it is of."""
    ingested = ingest(source=RawDataSource(str(files[0])))
    benchmarks = ingest(source=RawDataSource(str(files[1])))
    report = check_data(data=ingested, config=CleanConfig())
    found = json.loads((report.open() / "quality.json").read_text(encoding="utf-8"))
    assert (found["rows_in"], found["rows_out"]) == (71, 61)
    assert found["left_out"]["exact_duplicate"] == {"rows": 10, "first_ids": [f"r{n}" for n in range(60, 70)]}
    assert found["findings"] == {"email": {"hits": 2, "rows": 1, "first_ids": ["r70"]}}

    cleaned = clean_data(data=ingested, config=CleanConfig())
    assert _ids(cleaned) == [f"r{n}" for n in (*range(60), 70)]
    counts = cleaned.manifest().counts
    assert (counts["rows_seen"], counts["rows_kept"], counts["dropped_exact_duplicate"]) == (71, 61, 10)
    assert cleaned.manifest().lineage == {"data": ingested.digest}

    apart = decontaminate(data=cleaned, evaluation=benchmarks)
    assert set(_ids(cleaned)) - set(_ids(apart)) == {"r20", "r21", "r22"}
    assert apart.manifest().lineage == {"data": cleaned.digest, "evaluation": benchmarks.digest}
    assert apart.manifest().info["left_out"] == {"contaminated": {"rows": 3, "first_ids": ["r20", "r21", "r22"]}}

    sides = split_data(data=apart, config=SplitConfig(evaluation_fraction=0.3))
    train, held_out = _ids(sides.train), _ids(sides.evaluation)
    assert sorted(train + held_out) == sorted(_ids(apart)) and not set(train) & set(held_out)
    assert len(train) > len(held_out) > 5

    inputs = {"source": str(files[0]), "benchmarks": str(files[1]), "tokenizer": str(tiny_tokenizer(tmp_path / "tokenizer"))}
    preview = PreviewConfig(sequence_length=512, packed_rows=16, data=DataConfig(num_streams=4))
    outputs = data(**inputs, split=SplitConfig(evaluation_fraction=0.3), preview=preview)
    assert (outputs.train.digest, outputs.evaluation.digest) == (sides.train.digest, sides.evaluation.digest)
    assert outputs.report.digest == report.digest
    assert outputs.page.manifest().lineage.keys() == {"train", "evaluation", "quality", "tokenizer"}
    summary = json.loads((outputs.page.open() / "summary.json").read_text(encoding="utf-8"))
    assert summary["rows"] == {
        "Read": 71,
        "Checked": 71,
        "Without duplicates": 61,
        "Without benchmark rows": 58,
        "For training": len(train),
        "Held out": len(held_out),
    }
    assert summary["packing"]["rows"] == 16 and summary["formats"] == ["The tokenizer's chat template"]


def test_a_split_survives_new_rows(files: tuple[Path, Path], tmp_path: Path) -> None:
    """[A14] Rows that are added change no side of those that were there."""
    lines = files[0].read_text(encoding="utf-8").splitlines(keepends=True)[:60]
    (tmp_path / "half.jsonl").write_text("".join(lines[:30]), encoding="utf-8")
    (tmp_path / "all.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    config = SplitConfig(evaluation_fraction=0.4)
    half, whole = (
        split_data(data=ingest(source=RawDataSource(str(tmp_path / f"{name}.jsonl"))), config=config)
        for name in ("half", "all")
    )
    first = {json.loads(line)["id"] for line in lines[:30]}
    assert set(_ids(half.evaluation)) == first & set(_ids(whole.evaluation))


def test_nothing_left_is_an_error_and_no_artifact(files: tuple[Path, Path], fresh_home: Path) -> None:
    benchmarks = ingest(source=RawDataSource(str(files[1])))
    with pytest.raises(DataError, match="none of its 3 rows is left"):
        decontaminate(data=benchmarks, evaluation=benchmarks)
    with pytest.raises(DataError, match="fall to training"):
        split_data(data=benchmarks, config=SplitConfig(evaluation_fraction=1e-9))
    assert len(list((fresh_home / "artifacts" / "dataset").iterdir())) == 1

"""Laws of the table: what was checked is what is read, by number and split by split, for every kind of example."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.config.rows import RowsConfig
from lib.core.artifact import read_manifest, stage_artifact
from lib.core.errors import ArtifactCorruptError, DataError
from lib.core.examples import Completion, Conversation, Example
from lib.data import rows as rows_module
from lib.data import sources_jsonl, table
from lib.data.rows import ingest_dataset
from lib.data.schemas.arrow import KIND_OF
from lib.data.schemas.layouts import KINDS, LAYOUTS, find_layout
from lib.data.sources import open_source
from lib.data.table import ExampleTable
from tests.lib.data.datasets import row, write_jsonl
from tests.lib.data.schemas.test_layouts import GOOD

ANY = RowsConfig(kind="")


def ingested(source: Path, target: Path, config: RowsConfig = ANY) -> Path:
    with stage_artifact(target, "dataset") as staged:
        ingest_dataset(source, staged, config=config)
    return target


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_example_comes_back_as_it_was_checked(tmp_path: Path, layout: Any) -> None:
    """All rows of a layout in one data set, each three times, so that they lie in batches with all sorts of others."""
    values = [value for name, value, _ in GOOD.values() if name == layout.name] * 3
    numbered = [{**value, "id": f"r{number}"} for number, value in enumerate(values)]
    source = write_jsonl(tmp_path / "rows.jsonl", numbered)
    row_type = next(type_ for type_, kind in KIND_OF.items() if kind == layout.kind)
    found: ExampleTable[Example] = ExampleTable.open(ingested(source, tmp_path / "d"), row_type)
    expected = [layout.check(value, f"rows.jsonl:{number}") for number, value in enumerate(numbered, start=1)]
    assert found.rows(range(len(found))) == list(found.read(0)) == expected
    counts = read_manifest(tmp_path / "d").counts
    assert (counts["rows_seen"], counts["rows_kept"], counts["rows_dropped"]) == (len(values), len(values), 0)


def test_kinds_and_types_are_the_same_set() -> None:
    assert set(KIND_OF.values()) == set(KINDS)


def test_splits_and_their_order_are_those_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[I8] Byte ranges, row groups and an empty file, read from any row on and by any step: what checking the source's rows
    one by one gives. Batches of 10 and conversions of 4 rows, so that all edges are met."""
    monkeypatch.setattr(sources_jsonl, "SPLIT_BYTES", 1000)
    monkeypatch.setattr(rows_module, "_BATCH_ROWS", 10)
    monkeypatch.setattr(rows_module, "_SHARD_BATCHES", 3)
    monkeypatch.setattr(table, "_CONVERTED_ROWS", 4)
    values = [{"messages": row(number, "x" * number)["messages"]} for number in range(1, 60)]
    write_jsonl(tmp_path / "in" / "a.jsonl", values)
    write_jsonl(tmp_path / "in" / "b.jsonl", [])
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "in" / "c.parquet", row_group_size=25)
    source = open_source(tmp_path / "in")
    layout = find_layout(source, ANY)
    found = ExampleTable.open(ingested(tmp_path / "in", tmp_path / "d"), Conversation)
    assert [split.name for split in found.splits] == [split.name for split in source.splits]
    assert len(source.splits) > 6 and len(found) == 2 * len(values)
    for split in range(len(source.splits)):
        for start, step in [(0, 1), (1, 1), (0, 3), (7, 2), (11, 13), (1000, 1)]:
            direct = [layout.check(raw.value, raw.place) for raw in source.read(split, start, step)]
            assert list(found.read(split, start, step)) == direct
    assert len(list((tmp_path / "d").glob("rows-*.arrow"))) > 2


def test_bad_rows_are_dropped_and_counted_if_asked(tmp_path: Path) -> None:
    """[A16] Lines 2 and 4 of five, and an id that is taken; the reasons are kept beside the data."""
    lines: list[Any] = [row(0, "a"), {"messages": []}, row(1, "b"), 7, row(0, "c")]
    source = write_jsonl(tmp_path / "rows.jsonl", lines)
    folder = ingested(source, tmp_path / "d", RowsConfig(bad_rows="drop"))
    found = ExampleTable.open(folder, Conversation)
    assert [example.sample_id for example in found.read(0)] == ["r0", "r1"]
    manifest = read_manifest(folder)
    assert [manifest.counts[name] for name in ("rows_seen", "rows_kept", "rows_dropped")] == [5, 2, 3]
    assert [problem.split(": ")[0] for problem in manifest.info["dropped"]] == [f"rows.jsonl:{line}" for line in (2, 4, 5)]
    with pytest.raises(DataError, match=r"2 of 2 rows of .* can't be used"):
        bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": []}, 7])
        ingested(bad, tmp_path / "none", RowsConfig(bad_rows="drop"))


def test_rules_choose_the_layout_and_leave_columns_out(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a", "score": 1}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: has columns completion, prompt, score"):
        ingested(source, tmp_path / "d")
    folder = ingested(source, tmp_path / "d", RowsConfig(kind="completion", ignored=("score",)))
    assert ExampleTable.open(folder, Completion)[0].completion == "a"
    with pytest.raises(DataError, match="holds examples of kind 'completion', expected a data set of kind 'conversation'"):
        ExampleTable.open(folder, Conversation)


def test_an_altered_shard_is_refused(tmp_path: Path) -> None:
    """[I8]"""
    folder = ingested(write_jsonl(tmp_path / "rows.jsonl", [row(0, "a")]), tmp_path / "d")
    (folder / "rows-00000.arrow").write_bytes((folder / "rows-00000.arrow").read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactCorruptError, match="sha256"):
        ExampleTable.open(folder, Conversation)

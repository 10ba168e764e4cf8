"""Shards that are ingested alone and merged are the data set of the whole source, byte for byte."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config.rows import RowsConfig
from lib.core.artifact import read_manifest, stage_artifact
from lib.core.errors import DataError
from lib.data import rows as rows_module
from lib.data import sources_jsonl
from lib.data.merging import merge_parts
from lib.data.rows import ingest_dataset
from lib.data.shard import SourceShard
from lib.data.shards import ingest_shard, plan_shards
from lib.data.sources import open_source

DROP = RowsConfig(bad_rows="drop")


def _row(row_id: str | None, text: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text}!"}]
    return {"messages": turns} if row_id is None else {"messages": turns, "id": row_id}


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"id": None} | row for row in rows]), sink, row_group_size=3)
    return sink.getvalue()


def _shards(folder: Path, config: RowsConfig, shard_bytes: int) -> list[SourceShard]:
    return plan_shards(open_source(folder), str(folder), config, shard_bytes)


def _parts(shards: list[SourceShard], out: Path) -> list[Path]:
    found = [out / f"part-{number}" for number in range(len(shards))]
    for shard, part in zip(shards, found):
        with stage_artifact(part, "dataset") as staged:
            ingest_shard(shard, staged, lambda _: None)
    return found


def _merge(shards: list[SourceShard], parts: list[Path], target: Path) -> Path:
    with stage_artifact(target, "dataset") as staged:
        merge_parts(shards, parts, staged)
    return target


def _whole(folder: Path, config: RowsConfig, target: Path) -> Path:
    with stage_artifact(target, "dataset") as staged:
        ingest_dataset(folder, staged, config=config)
    return target


def _small_pieces(patch: pytest.MonkeyPatch) -> None:
    """Splits of 400 bytes, batches of 4 rows, files of 3 batches."""
    patch.setattr(sources_jsonl, "SPLIT_BYTES", 400)
    patch.setattr(rows_module, "_BATCH_ROWS", 4)
    patch.setattr(rows_module, "_SHARD_BATCHES", 3)


_IDS = st.one_of(st.none(), st.integers(0, 60).map("id-{}".format))
_FILES = st.lists(st.lists(st.tuples(_IDS, st.text("ab ", max_size=30)), max_size=25), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(files=_FILES, shard_bytes=st.sampled_from([1, 700, 3000, 1 << 30]), tables=st.booleans())
def test_merged_shards_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[tuple[str | None, str]]], shard_bytes: int, tables: bool
) -> None:
    """Rows without text are bad, and ids come up in several files: whatever is dropped, the bytes are the same."""
    folder = tmp_path_factory.mktemp("merge")
    (folder / "rows").mkdir()
    for number, found in enumerate(files):
        values = [_row(*row) for row in found]
        is_table = tables and number % 2 and values
        path = folder / "rows" / f"{number}.{'parquet' if is_table else 'jsonl'}"
        path.write_bytes(_parquet(values) if is_table else _jsonl(values))
    with pytest.MonkeyPatch.context() as patch:
        _small_pieces(patch)
        try:
            whole = read_manifest(_whole(folder / "rows", DROP, folder / "whole"))
        except DataError as error:
            with pytest.raises(DataError) as raised:
                shards = _shards(folder / "rows", DROP, shard_bytes)
                _merge(shards, _parts(shards, folder), folder / "merged")
            assert str(raised.value).splitlines()[-1] == str(error).splitlines()[-1]
            return
        shards = _shards(folder / "rows", DROP, shard_bytes)
        assert len(shards) > 1 or shard_bytes > 1 or len(files) == 1
        merged = read_manifest(_merge(shards, _parts(shards, folder), folder / "merged"))
    assert merged.digest == whole.digest
    assert (merged.files, merged.counts, merged.meta) == (whole.files, whole.counts, whole.meta)


def test_an_id_of_two_shards_is_refused_with_both_places(tmp_path: Path) -> None:
    """[A14] No shard can see it alone."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_bytes(_jsonl([_row("one", "q"), _row("two", "q")]))
    (tmp_path / "rows" / "b.jsonl").write_bytes(_jsonl([_row("three", "q"), _row("two", "p")]))
    shards = _shards(tmp_path / "rows", RowsConfig(), 1)
    with pytest.raises(DataError, match=r"id 'two' is taken by a.jsonl:2; give each row its own\n1 of 4 rows of") as raised:
        _merge(shards, _parts(shards, tmp_path), tmp_path / "merged")
    assert str(raised.value).startswith("b.jsonl:2: ")
    assert not (tmp_path / "merged").exists()


def test_a_gap_is_refused(tmp_path: Path) -> None:
    """A part that is missing, given twice or of another shard never becomes a data set."""
    (tmp_path / "rows").mkdir()
    for name in "abc":
        (tmp_path / "rows" / f"{name}.jsonl").write_bytes(_jsonl([_row(None, name)]))
    shards = _shards(tmp_path / "rows", RowsConfig(), 1)
    parts = _parts(shards, tmp_path)
    assert len(parts) == 3
    for wrong in (parts[:2], [parts[0], parts[0], parts[2]], [parts[1], parts[0], parts[2]], []):
        with pytest.raises(DataError, match=r"ingest the source again|no shards"):
            _merge(shards, wrong, tmp_path / "merged")


def test_ranges_of_one_file_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    """Parts of as many splits and rows as wanted, of the right file, but in another order."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.parquet").write_bytes(_parquet([_row(None, f"{number:04d}") for number in range(12)]))
    shards = _shards(tmp_path / "rows", RowsConfig(), 1)
    parts = _parts(shards, tmp_path)
    assert len(parts) == 4
    with pytest.raises(DataError, match=r"rows \(part 2 of 4\): its part was made of other rows"):
        _merge(shards, [parts[0], parts[2], parts[1], parts[3]], tmp_path / "merged")


def test_a_bad_row_names_its_part(tmp_path: Path) -> None:
    """So the task of a shard says which of many it was."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_bytes(_jsonl([_row("one", "q")]))
    (tmp_path / "rows" / "b.jsonl").write_bytes(_jsonl([_row("two", " ")]))
    with pytest.raises(DataError, match=r"b.jsonl:1: .*\n1 of 1 rows of .*rows \(part 2 of 2\) can't be used"):
        _parts(_shards(tmp_path / "rows", RowsConfig(), 1), tmp_path)

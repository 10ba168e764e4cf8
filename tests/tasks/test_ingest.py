"""Ingestion over shards: each is cached and made again alone, and what lies at an address counts, not the address."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from flytekit import FlyteContextManager
from flytekit.core.local_cache import LocalTaskCache
from flytekit.core.promise import Promise
from flytekit.core.type_engine import TypeEngine
from fsspec.implementations.memory import MemoryFileSystem

from lib.config.rows import RowsConfig
from lib.core.artifact import read_manifest, stage_artifact
from lib.core.errors import DataError
from lib.data import shards
from lib.data.rows import ingest_dataset
from tasks.artifacts import DatasetFolder
from tasks.sources import RawData
from workflows.ingest import ROWS, ingest

EXECUTED, CACHED = "executed", "cached"


@pytest.fixture
def ledger(fresh_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache and a ledger of this test's own, and a shard for each file."""
    monkeypatch.setenv("FLYTE_LOCAL_CACHE_ENABLED", "true")
    monkeypatch.setenv("POSTFLYTE_LEDGER", str(tmp_path / "ledger.jsonl"))
    monkeypatch.setattr("flytekit.core.local_cache.CACHE_LOCATION", str(tmp_path / "cache"))
    monkeypatch.setattr(LocalTaskCache, "_initialized", False)
    monkeypatch.setattr(shards, "plan_shards", partial(shards.plan_shards, shard_bytes=1))
    yield tmp_path / "ledger.jsonl"
    LocalTaskCache._initialized = False


def _rows(*texts: str) -> str:
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "a"}] for text in texts]
    return "".join(json.dumps({"messages": found}) + "\n" for found in turns)


def _run(ledger: Path, source: Path | Promise, config: RowsConfig = ROWS) -> tuple[DatasetFolder, list[tuple[str, str]]]:
    """The data set, and what the ledger says about this run: (event, task)."""
    ledger.unlink(missing_ok=True)
    TypeEngine._LITERAL_CACHE.clear()  # one launch of pyflyte converts its inputs once
    dataset = ingest(source=str(source) if isinstance(source, Path) else source, config=config)
    return dataset, _events(ledger)


def _events(ledger: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    return [(line["event"], line["task"].removeprefix("tasks.ingest.")) for line in lines]


def _each(*events: str, merge: str) -> list[tuple[str, str]]:
    return [*((event, "ingest_shard") for event in events), (merge, "merge_shards")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.jsonl").write_text(_rows(name, name * 2), encoding="utf-8")
    return folder


def test_a_grown_data_set_ingests_only_what_is_new(ledger: Path, source: Path, tmp_path: Path) -> None:
    """[I9] Unchanged: nothing executes. With one more file: its shard and the merge; the result is that of one task."""
    assert _run(ledger, source)[1] == _each(EXECUTED, EXECUTED, EXECUTED, merge=EXECUTED)
    assert _run(ledger, source)[1] == _each(CACHED, CACHED, CACHED, merge=CACHED)
    (source / "bb.jsonl").write_text(_rows("new"), encoding="utf-8")
    dataset, events = _run(ledger, source)
    assert events == _each(CACHED, CACHED, EXECUTED, CACHED, merge=EXECUTED)
    with stage_artifact(tmp_path / "whole", "dataset") as staged:
        ingest_dataset(source, staged)
    assert dataset.digest == read_manifest(tmp_path / "whole").digest


def test_a_failed_shard_is_ingested_again_alone(ledger: Path, source: Path) -> None:
    """[I9] Those before it are kept."""
    (source / "b.jsonl").write_text(_rows("b", " "), encoding="utf-8")
    with pytest.raises(DataError, match=r"b.jsonl:2: .*\n1 of 2 rows of .*rows \(part 2 of 3\)"):
        _run(ledger, source)
    assert _events(ledger) == [(EXECUTED, "ingest_shard")]
    (source / "b.jsonl").write_text(_rows("b"), encoding="utf-8")
    assert _run(ledger, source)[1] == _each(CACHED, EXECUTED, EXECUTED, merge=EXECUTED)


def test_a_data_set_that_moved_or_was_touched_is_the_same(ledger: Path, source: Path, tmp_path: Path) -> None:
    """[I2] The key is the content."""
    _run(ledger, source)
    (source / "a.jsonl").touch()
    moved = source.rename(tmp_path / "elsewhere")
    assert _run(ledger, moved)[1] == _each(CACHED, CACHED, CACHED, merge=CACHED)


def test_rows_left_in_place_are_recorded_anew_when_they_move(ledger: Path, source: Path, tmp_path: Path) -> None:
    """[I2] One shard, however many files. Unchanged: cached. Moved: written again, so that no old place is handed on, as the
    same data set: nothing after it runs."""
    in_place = RowsConfig(read="in_place")
    first, events = _run(ledger, source, in_place)
    assert events == _each(EXECUTED, merge=EXECUTED)
    assert _run(ledger, source, in_place)[1] == _each(CACHED, merge=CACHED)
    second, events = _run(ledger, source.rename(tmp_path / "elsewhere"), in_place)
    assert events == _each(EXECUTED, merge=EXECUTED)
    assert second.digest == first.digest


def test_rows_replaced_behind_a_fixed_address_are_ingested(ledger: Path) -> None:
    """[I2] A launch plan's address, in a store without checksums; the new rows are as long as the old ones."""
    store = MemoryFileSystem()
    context = FlyteContextManager.current_context()
    literal = TypeEngine.to_literal(context, "memory://fixed/", RawData, TypeEngine.to_literal_type(RawData))
    assert literal.hash == "address:memory://fixed/"
    fixed = Promise("source", literal)
    try:
        store.pipe_file("/fixed/a.jsonl", _rows("one").encode())
        store.pipe_file("/fixed/b.jsonl", _rows("two").encode())
        first, events = _run(ledger, fixed)
        assert events == _each(EXECUTED, EXECUTED, merge=EXECUTED)
        assert _run(ledger, fixed)[1] == _each(CACHED, CACHED, merge=CACHED)
        store.pipe_file("/fixed/b.jsonl", _rows("six").encode())
        second, events = _run(ledger, fixed)
        assert events == _each(CACHED, EXECUTED, merge=EXECUTED)
        assert second.digest != first.digest
    finally:
        store.rm("/fixed", recursive=True)

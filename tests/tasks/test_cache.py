"""A hit is only a hit when what it stands for is there, unaltered, and made by the same code."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from flytekit import FlyteContextManager, dynamic, task, workflow
from flytekit.core.local_cache import LocalTaskCache
from flytekit.core.promise import Promise
from flytekit.core.type_engine import TypeEngine
from fsspec.implementations.memory import MemoryFileSystem

from tasks import cache
from tasks.artifacts import Dataset, DatasetFolder
from tasks.cache import CACHED, code_version
from tasks.sources import RawData
from tests.s3_server import s3_server

THIS = "tests.tasks.test_cache"


@task(cache=CACHED)
def make(source: RawData) -> Dataset:
    dataset = DatasetFolder.create()
    with dataset.write() as staged:
        (staged.path / "rows").write_bytes(source.open().read_bytes().lower())
    return dataset


@task(cache=CACHED)
def count(data: Dataset, times: int) -> int:
    return len((data.open() / "rows").read_bytes()) * times


@dynamic(cache=CACHED)
def count_sized(data: Dataset, times: int) -> int:
    return count(data=data, times=times)


@task
def stamp(source: RawData) -> RawData:
    return source.stamped()


@workflow
def chain(source: RawData, times: int) -> int:
    return count_sized(data=make(source=stamp(source=source)), times=times)


@pytest.fixture
def ledger(fresh_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache and a ledger of this test's own."""
    monkeypatch.setenv("FLYTE_LOCAL_CACHE_ENABLED", "true")
    monkeypatch.setenv("POSTFLYTE_LEDGER", str(tmp_path / "ledger.jsonl"))
    monkeypatch.setattr("flytekit.core.local_cache.CACHE_LOCATION", str(tmp_path / "cache"))
    monkeypatch.setattr(LocalTaskCache, "_initialized", False)
    yield tmp_path / "ledger.jsonl"
    LocalTaskCache._initialized = False


def _run(ledger: Path, source: Path | str | Promise, times: int = 2) -> tuple[int, list[tuple[str, str]]]:
    """Result of the chain, and what the ledger says about this run: (event, task)."""
    ledger.unlink(missing_ok=True)
    TypeEngine._LITERAL_CACHE.clear()  # one launch of pyflyte converts its inputs once
    result = chain(source=str(source) if isinstance(source, Path) else source, times=times)
    lines = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    return result, [(line["event"], line["task"].removeprefix(f"{THIS}.")) for line in lines]


ALL_EXECUTED = [("executed", "make"), ("executed", "count"), ("executed", "count_sized")]
ALL_CACHED = [("cached", "make"), ("cached", "count_sized")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_text("ABC")
    return path


def test_an_unchanged_rerun_executes_nothing(ledger: Path, source: Path) -> None:
    """The dynamic that sizes a task is a hit itself, so its task isn't even asked for."""
    assert _run(ledger, source) == (6, ALL_EXECUTED)
    assert _run(ledger, source) == (6, ALL_CACHED)


def test_only_what_a_change_touches_executes(ledger: Path, source: Path) -> None:
    _run(ledger, source)
    assert _run(ledger, source, times=3) == (9, [("cached", "make"), ("executed", "count"), ("executed", "count_sized")])


def test_edited_input_under_the_same_path_executes(ledger: Path, source: Path) -> None:
    _run(ledger, source)
    source.write_text("ABCD")
    assert _run(ledger, source) == (8, ALL_EXECUTED)


def test_a_replaced_object_under_the_same_address_executes(ledger: Path) -> None:
    """The key of a remote address is what the store's listing says of it."""
    with s3_server("bucket") as store:
        store.pipe_file("bucket/source", b"ABC")
        assert _run(ledger, "s3://bucket/source") == (6, ALL_EXECUTED)
        assert _run(ledger, "s3://bucket/source") == (6, ALL_CACHED)
        store.pipe_file("bucket/source", b"ABCD")
        assert _run(ledger, "s3://bucket/source") == (8, ALL_EXECUTED)


def test_an_object_replaced_behind_a_fixed_input_executes(ledger: Path) -> None:
    """A launch plan's literals are made without a look at the store, which here has no checksums; the content has one size."""
    store = MemoryFileSystem()
    context = FlyteContextManager.current_context()
    fixed = TypeEngine.to_literal(context, "memory://fixed/source", RawData, TypeEngine.to_literal_type(RawData))
    try:
        for content, events in ((b"ABC", ALL_EXECUTED), (b"ABC", ALL_CACHED), (b"ABD", ALL_EXECUTED), (b"ABC", ALL_CACHED)):
            store.pipe_file("/fixed/source", content)
            assert _run(ledger, Promise("source", fixed)) == (6, events)
    finally:
        store.rm("/fixed", recursive=True)


def test_equal_output_from_another_input_hits_downstream(ledger: Path, source: Path) -> None:
    """ "abc" and "ABC" give the same artifact, so what follows is a hit."""
    _run(ledger, source)
    source.write_text("abc")
    assert _run(ledger, source) == (6, [("executed", "make"), ("cached", "count_sized")])


@pytest.mark.parametrize("damage", ["altered", "file missing", "all gone", "manifest altered"])
def test_a_damaged_blob_behind_a_hit_is_made_again(ledger: Path, source: Path, fresh_home: Path, damage: str) -> None:
    """[I2]"""
    _run(ledger, source)
    (folder,) = (fresh_home / "artifacts" / "dataset").iterdir()
    if damage == "altered":
        (folder / "rows").write_text("xyz")
    elif damage == "file missing":
        (folder / "rows").unlink()
    elif damage == "manifest altered":
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"size_bytes": 3', '"size_bytes": 4'))
    else:
        shutil.rmtree(folder)
    assert _run(ledger, source) == (6, [("executed", "make"), ("cached", "count_sized")])
    assert (folder / "rows").read_text() == "abc"


def test_another_code_version_executes(ledger: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[I1]"""
    _run(ledger, source)
    monkeypatch.setattr(make.metadata, "cache_version", "another")
    assert _run(ledger, source) == (6, [("executed", "make"), ("cached", "count_sized")])


def test_the_version_of_a_library_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """[I1]"""
    before = code_version(THIS, "make", __file__)
    monkeypatch.setattr(cache, "library_versions", lambda: {"torch": "2.0"})
    assert code_version(THIS, "make", __file__) != before


def test_a_ledger_line_says_where_outputs_are_and_how_long_it_took(ledger: Path, source: Path) -> None:
    _run(ledger, source)
    first = json.loads(ledger.read_text(encoding="utf-8").splitlines()[0])
    assert (Path(first["outputs"]["o0"]) / "rows").read_text() == "abc"
    assert first["seconds"] >= 0

"""What users bring is keyed by content, and what isn't there is refused with its path."""

import json
from pathlib import Path

import pytest
from flytekit import FlyteContextManager
from flytekit.core.data_persistence import FileAccessProvider
from flytekit.core.type_engine import TypeEngine
from fsspec.implementations.memory import MemoryFileSystem

from lib.core.errors import UserError
from tasks.sources import ModelSource, ModelSourceFolder, RawData, RawDataSource, TokenizerSourceFolder
from tasks.tokenize import find_tokenizer
from tests.s3_server import s3_server
from tests.tiny import tiny_tokenizer
from workflows.ingest import ingest


def test_the_key_is_the_content_and_not_the_place(tmp_path: Path) -> None:
    """Same bytes elsewhere: same key; edited in place: another key."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("a")
    two.write_text("a")
    key = RawDataSource(str(one)).content_hash()
    assert RawDataSource(str(two)).content_hash() == key
    one.write_text("b")
    assert RawDataSource(str(one)).content_hash() != key


def test_a_folder_counts_names_and_contents_but_not_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    key = RawDataSource(str(tmp_path)).content_hash()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x").write_text("2")
    assert RawDataSource(str(tmp_path)).content_hash() == key
    (tmp_path / "a").rename(tmp_path / "b")
    assert RawDataSource(str(tmp_path)).content_hash() != key


@pytest.mark.parametrize("case", ["missing", "empty file", "empty folder", "folder of empty files", "file for a model"])
def test_what_is_not_there_is_refused_with_its_path(tmp_path: Path, case: str) -> None:
    path, python_type = tmp_path / "given", RawData
    if case == "empty file":
        path.touch()
    elif case == "empty folder":
        path.mkdir()
    elif case == "folder of empty files":
        path.mkdir()
        (path / "a.jsonl").touch()
    elif case == "file for a model":
        path.write_text("x")
        python_type = ModelSource
    with pytest.raises(UserError, match=f"{path}: .*expected"):
        TypeEngine.to_literal(
            FlyteContextManager.current_context(), str(path), python_type, TypeEngine.to_literal_type(python_type)
        )


def test_a_local_folder_reaches_a_cluster_through_the_object_store(fresh_home: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    access = FileAccessProvider(str(tmp_path / "sandbox"), "memory://bucket")
    builder = FlyteContextManager.current_context().with_file_access(access)
    with FlyteContextManager.with_context(builder) as ctx:
        lit = TypeEngine.to_literal(ctx, str(tmp_path / "model"), ModelSource, TypeEngine.to_literal_type(ModelSource))
        assert lit.scalar.primitive.string_value.startswith("memory://")
        source = TypeEngine.to_python_value(ctx, lit, ModelSource)
        assert (source.open() / "config.json").read_text() == "{}"
        with pytest.raises(UserError, match="nothing there"):
            ModelSourceFolder("memory://bucket/other").open()


def test_remote_rows_are_read_where_they_lie_and_keyed_by_their_listing(fresh_home: Path, tmp_path: Path) -> None:
    """A folder and a glob over it have one key, which a copy elsewhere shares and a changed object doesn't; the data set is
    the one of the same rows here."""
    rows = "".join(
        json.dumps({"id": f"r{n}", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
        + "\n"
        for n in range(20)
    )
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text(rows)
    with s3_server("bucket") as store:
        for folder in ("one", "copy"):
            store.pipe_file(f"bucket/{folder}/a.jsonl", rows.encode())
        keys = {
            RawDataSource(f"s3://bucket/{where}").content_hash() for where in ("one", "one/*.jsonl", "copy", "copy/a.jsonl")
        }
        assert len(keys) == 1
        there = ingest(source=RawDataSource("s3://bucket/one"))
        store.pipe_file("bucket/one/a.jsonl", rows.replace("q", "p").encode())
        assert RawDataSource("s3://bucket/one").content_hash() not in keys
        with pytest.raises(UserError, match="s3://bucket/none: nothing there"):
            RawDataSource("s3://bucket/none").content_hash()
    assert ingest(source=RawDataSource(str(tmp_path / "rows"))).digest == there.digest


def test_a_tokenizer_is_taken_from_a_remote_model_without_its_weights(fresh_home: Path, tmp_path: Path) -> None:
    """What is cached downstream is keyed by the tokenizer's files alone, and is the same as that of a folder here."""
    tiny_tokenizer(tmp_path / "model")
    store = MemoryFileSystem()
    try:
        for file in (tmp_path / "model").iterdir():
            store.pipe_file(f"/models/one/{file.name}", file.read_bytes())
        store.pipe_file("/models/one/model.safetensors", b"weights")
        source = TokenizerSourceFolder("memory://models/one/")
        assert "model.safetensors" not in {path.name for path in source.open().iterdir()}
        assert (
            find_tokenizer(source=source).digest == find_tokenizer(source=TokenizerSourceFolder(str(tmp_path / "model"))).digest
        )
    finally:
        store.rm("/models", recursive=True)


def test_a_model_altered_between_the_look_and_the_download_is_refused(fresh_home: Path) -> None:
    """[I2] It would be cached as what was looked at."""
    store = MemoryFileSystem()
    try:
        store.pipe_file("/models/two/config.json", b"{ }")
        seen = ModelSourceFolder("memory://models/two").stamped()
        assert (seen.open() / "config.json").read_bytes() == b"{ }"
        store.pipe_file("/models/two/config.json", b"[ ]")
        with pytest.raises(UserError, match="memory://models/two: was altered since this run looked at it"):
            seen.open()
    finally:
        store.rm("/models", recursive=True)

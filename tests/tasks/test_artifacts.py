"""What travels between tasks: artifacts by content, whole or an error."""

from pathlib import Path

import fsspec
import pytest
from flytekit import FlyteContext, FlyteContextManager
from flytekit.core.data_persistence import FileAccessProvider
from flytekit.core.type_engine import TypeEngine
from flytekit.models.literals import Literal

from lib.core.errors import PostflyteError
from lib.core.manifest import MANIFEST_NAME
from tasks.artifacts import ARTIFACT_FORMATS, Artifact, Dataset, DatasetFolder, ModelArtifact


def _dataset(texts: dict[str, str]) -> DatasetFolder:
    dataset = DatasetFolder.create()
    with dataset.write() as staged:
        for name, text in texts.items():
            (staged.path / name).write_text(text, encoding="utf-8")
    return dataset


def _to_literal(ctx: FlyteContext, value: object, python_type: object = Dataset) -> Literal:
    return TypeEngine.to_literal(ctx, value, python_type, TypeEngine.to_literal_type(python_type))


@pytest.fixture
def ctx() -> FlyteContext:
    return FlyteContextManager.current_context()


def test_equal_content_gives_equal_literals(fresh_home: Path, ctx: FlyteContext) -> None:
    """The hash in the literal, which is the cache key, is the manifest's digest."""
    one, same, other = (_to_literal(ctx, _dataset({"a": text})) for text in ("1", "1", "2"))
    assert one.hash == same.hash != other.hash
    assert one.scalar.blob.uri == same.scalar.blob.uri
    assert DatasetFolder(one.scalar.blob.uri).digest == one.hash


def test_a_path_is_taken_for_an_artifact(fresh_home: Path, ctx: FlyteContext) -> None:
    made = _to_literal(ctx, _dataset({"a": "1"}))
    assert _to_literal(ctx, made.scalar.blob.uri).hash == made.hash


def test_a_round_trip_gives_the_same_files(fresh_home: Path, ctx: FlyteContext) -> None:
    """[I7] nested folders and empty files too."""
    dataset = DatasetFolder.create()
    with dataset.write() as staged:
        (staged.path / "deep" / "er").mkdir(parents=True)
        (staged.path / "deep" / "er" / "a").write_text("1", encoding="utf-8")
        (staged.path / "empty").touch()
    back = TypeEngine.to_python_value(ctx, _to_literal(ctx, dataset), Dataset).open()
    assert (back / "deep" / "er" / "a").read_text(encoding="utf-8") == "1"
    assert (back / "empty").read_bytes() == b""


def test_another_kind_is_refused(fresh_home: Path, ctx: FlyteContext) -> None:
    uri = _to_literal(ctx, _dataset({"a": "1"})).scalar.blob.uri
    with pytest.raises(PostflyteError, match="'dataset', expected a 'model'"):
        _to_literal(ctx, uri, ModelArtifact)


def test_a_folder_that_is_no_artifact_is_refused(fresh_home: Path, ctx: FlyteContext, tmp_path: Path) -> None:
    with pytest.raises(PostflyteError, match=MANIFEST_NAME):
        _to_literal(ctx, str(tmp_path))
    with pytest.raises(PostflyteError, match="no such folder"):
        _to_literal(ctx, str(tmp_path / "missing"))


def test_an_artifact_without_files_is_refused_at_its_producer(fresh_home: Path) -> None:
    """[I7]"""
    with pytest.raises(PostflyteError, match="no files"), DatasetFolder.create().write():
        pass


def test_each_artifact_has_its_own_format() -> None:
    literal_types = {TypeEngine.to_literal_type(cls).blob.format for cls in Artifact.__subclasses__()}
    assert literal_types == set(ARTIFACT_FORMATS)


FILES = {"a": "1", "b": "22", "c": "333"}


@pytest.fixture
def object_store(fresh_home: Path, tmp_path: Path) -> FlyteContext:
    """A context whose outputs go to fsspec's in-memory object store."""
    access = FileAccessProvider(str(tmp_path / "sandbox"), "memory://bucket")
    return FlyteContextManager.current_context().with_file_access(access).build()


def test_an_object_store_gives_back_what_was_put(object_store: FlyteContext) -> None:
    with FlyteContextManager.with_context(object_store.new_builder()) as ctx:
        literal = _to_literal(ctx, _dataset(FILES))
        assert literal.scalar.blob.uri.startswith("memory://")
        back = TypeEngine.to_python_value(ctx, literal, Dataset)
        assert back.digest == literal.hash
        assert {path.name: path.read_text() for path in back.open().iterdir() if path.name in FILES} == FILES


@pytest.mark.parametrize("lost", [*FILES, MANIFEST_NAME])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_damaged_object_store_is_an_error_and_never_half_an_artifact(object_store: FlyteContext, lost: str, how: str) -> None:
    """[I7] for every object of the artifact: missing or cut short, the reader gets a typed error."""
    with FlyteContextManager.with_context(object_store.new_builder()) as ctx:
        literal = _to_literal(ctx, _dataset(FILES))
        store = fsspec.filesystem("memory")
        target = f"{literal.scalar.blob.uri}/{lost}"
        if how == "missing":
            store.rm(target)
        else:
            store.pipe(target, store.cat(target)[:-1])
        with pytest.raises(PostflyteError, match=lost):
            TypeEngine.to_python_value(ctx, literal, Dataset).open()

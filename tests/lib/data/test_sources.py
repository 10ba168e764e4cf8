"""Laws of sources: every row once and in order, however the files are cut, compressed and stored; from any row on."""

import gc
import gzip
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import zstandard
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.core.errors import DataError, InfraError
from lib.data import sources_columns, sources_jsonl
from lib.data.sources import FileSource, RawRow, RowSource, open_source
from lib.data.sources_ahead import ReadAhead
from lib.data.sources_hub import is_hub_name, resolved_files
from tests.s3_server import s3_server

ROWS: list[dict[str, Any]] = [{"id": number, "text": "é" * (number * 7 % 50)} for number in range(1500)]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in rows).encode()


def _parquet(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=400)
    return sink.getvalue()


def _arrow(rows: list[Any], stream: bool) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=400)
    return sink.getvalue()


FORMATS: dict[str, Callable[[list[Any]], bytes]] = {
    "a.jsonl": jsonl,
    "b.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "c.jsonl.zst": lambda rows: zstandard.compress(jsonl(rows)),
    "d.parquet": _parquet,
    "e.arrow": lambda rows: _arrow(rows, stream=False),
    "f.arrow": lambda rows: _arrow(rows, stream=True),
}


def everything(source: RowSource) -> list[RawRow]:
    return [row for split in range(len(source.splits)) for row in source.read(split)]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 5,000 and blocks of 999 bytes, tables read 64 rows at a time and converted 10 at a time."""
    for module, name, value in [
        (sources_jsonl, "SPLIT_BYTES", 5000),
        (sources_jsonl, "READ_BYTES", 999),
        (sources_jsonl, "_TAIL_BYTES", 3),
        (sources_columns, "_BATCH_ROWS", 64),
        (sources_columns, "_CONVERTED_ROWS", 10),
    ]:
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.usefixtures("small_parts")
def test_every_format_gives_every_row_once_and_in_order(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMATS[name](ROWS))
    source = open_source(tmp_path / name)
    rows = everything(source)
    assert [row.value for row in rows] == ROWS
    assert all(row.problem is None for row in rows)
    assert len({row.place for row in rows}) == len(ROWS)
    assert rows[0].place == f"{name}:1"
    # 70 KB in splits of 5,000 bytes; 1,500 rows in groups or batches of 400; what can't be cut.
    expected = {"a.jsonl": round((tmp_path / name).stat().st_size / 5000), "d.parquet": 4, "e.arrow": 4}.get(name, 1)
    assert len(source.splits) == expected


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.usefixtures("small_parts")
def test_a_split_is_read_from_any_row_on_and_by_steps(tmp_path: Path, name: str) -> None:
    """[A10] `read(split, start, step)` is `read(split)[start::step]`, up to and past the split's end."""
    (tmp_path / name).write_bytes(FORMATS[name](ROWS))
    source = open_source(tmp_path / name)
    for split in {0, len(source.splits) // 2, len(source.splits) - 1}:
        whole = list(source.read(split))
        for start, step in [(0, 1), (1, 1), (0, 7), (65, 64), (len(whole) - 1, 1), (len(whole), 1), (len(whole) + 5, 3)]:
            assert list(source.read(split, start, step)) == whole[start::step]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 30), max_size=12),
    st.booleans(),
    st.integers(10, 60),
    st.integers(1, 25),
    st.integers(1, 9),
)
def test_any_cut_of_a_jsonl_file_keeps_all_lines(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    ended: bool,
    split_bytes: int,
    read_bytes: int,
    tail_bytes: int,
) -> None:
    """Lines of any length (the shortest is blank), last one ended or not, splits and blocks of any size: the lines of the
    splits, one after the other, are those of the file, and each is at the byte its place says."""
    content = b"\n".join(b"1" * length for length in lengths) + (b"\n" if ended else b"")
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_jsonl, "SPLIT_BYTES", split_bytes)
        patch.setattr(sources_jsonl, "READ_BYTES", read_bytes)
        patch.setattr(sources_jsonl, "_TAIL_BYTES", tail_bytes)
        source = open_source(path)
        rows = everything(source)
    lines = content.split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    assert [row.value for row in rows] == [int(line) if line else None for line in lines]
    assert sum(split.stop - split.start for split in source.splits) == len(content)
    for row, line in zip(rows, lines):
        if "@" in row.place:
            begin = int(row.place.rsplit("@", 1)[1])
            assert content[begin : begin + len(line)] == line


def test_a_folder_is_read_in_order_of_names_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl", "a/y.jsonl", ".hidden.jsonl", ".git/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]))
    names = ["a/y.jsonl", "a/z.jsonl", "b.jsonl"]
    assert [row.value for row in everything(open_source(tmp_path))] == names
    assert [row.value for row in everything(open_source(tmp_path / "**" / "*.jsonl"))] == names
    assert [row.value for row in everything(open_source(f"{tmp_path}/a/[y]*.jsonl"))] == names[:1]
    assert [split.name for split in open_source(tmp_path / "*.jsonl").splits] == ["b.jsonl"]


def test_the_digest_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    """[A11] A copy has it; another name, a changed character, one byte more has another, also in a file of 3 MiB."""
    large = jsonl([{"text": "x" * 1000}] * 3000)
    for folder, name, content in [
        ("one", "a.jsonl", large),
        ("copy", "a.jsonl", large),
        ("renamed", "b.jsonl", large),
        ("first", "a.jsonl", b" " + large[1:]),
        ("last", "a.jsonl", large[:-1] + b" "),
        ("longer", "a.jsonl", large + b"\n"),
    ]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
    digest = open_source(tmp_path / "one").digest
    assert open_source(tmp_path / "copy").digest == open_source(tmp_path / "copy" / "a.jsonl").digest == digest
    others = [open_source(tmp_path / folder).digest for folder in ("renamed", "first", "last", "longer")]
    assert len({digest, *others}) == 5


def test_a_row_of_50_mb_does_not_stop_the_rows_around_it(tmp_path: Path) -> None:
    """[A17] Within splits of 16 MiB it covers the whole of the second, which comes out empty."""
    rows = [{"text": "a"}, {"text": "b" * 50_000_000}, {"text": "c"}]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    source = open_source(tmp_path / "a.jsonl")
    found = [[len(row.value["text"]) for row in source.read(split)] for split in range(len(source.splits))]  # type: ignore[index]
    assert found == [[1, 50_000_000], [], [1]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_row_too_long_to_be_held_is_reported_and_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """[A17] With a bound of 1,000 bytes and blocks of 64."""
    monkeypatch.setattr(sources_jsonl, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(sources_jsonl, "READ_BYTES", 64)
    (tmp_path / name).write_bytes(FORMATS[name.replace("a.jsonl.gz", "b.jsonl.gz")](["x" * 998, "x" * 999, "y", "z" * 5000]))
    first, second, third, last = everything(open_source(tmp_path / name))
    assert (first.value, third.value) == ("x" * 998, "y")
    assert second.problem is not None and last.problem is not None
    assert second.problem.startswith("longer than") and second.place == f"{name}:2"


class CountingStore(MemoryFileSystem):  # type: ignore[misc]
    """A store that counts the bytes it gives out, and fails once told to."""

    protocol = "counting"
    num_bytes = 0
    failure: Exception | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("counting://").strip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        if CountingStore.failure is not None:
            raise CountingStore.failure
        found: bytes = super().cat_file(path, start=start, end=end, **kwargs)
        CountingStore.num_bytes += len(found)
        return found


@pytest.fixture
def store() -> Iterator[CountingStore]:
    fsspec.register_implementation("counting", CountingStore, clobber=True)
    CountingStore.store.clear()
    CountingStore.failure = None
    yield CountingStore()


def test_only_a_few_blocks_are_read_ahead(store: CountingStore) -> None:
    """Of 60 MB: one line read, at most the block at hand, two in the queue and one in the thread's hands."""
    store.pipe_file("/a.jsonl", jsonl([{"text": "x" * 1000}] * 60_000))
    source = open_source("counting://a.jsonl")
    assert len(source.splits) == 4
    CountingStore.num_bytes = 0
    rows = source.read(0)
    assert next(rows).place == "a.jsonl:1"
    settled = -1
    while settled != CountingStore.num_bytes:
        settled = CountingStore.num_bytes
        time.sleep(0.2)
    assert 1 <= settled <= 4 * (4 << 20)


def test_an_unfinished_read_leaves_no_thread(tmp_path: Path) -> None:
    """Closed half-way, dropped half-way, and dropped before its first row."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x" * 1000] * 8000))
    source = open_source(tmp_path / "a.jsonl")
    before = threading.active_count()
    closed, dropped, unused = source.read(0), source.read(0), source.read(0)
    next(closed), next(dropped)
    closed.close()  # type: ignore[attr-defined]
    del dropped, unused
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before


def test_read_ahead_raises_in_place_and_ends(tmp_path: Path) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise DataError("bad")

    ahead = ReadAhead(items())
    assert next(ahead) == 1
    with pytest.raises(DataError, match="bad"):
        next(ahead)
    assert list(ahead) == []


def test_a_source_can_be_sent_to_another_process(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    source = open_source(tmp_path)
    assert everything(ForkingPickler.loads(ForkingPickler.dumps(source))) == everything(source)


@pytest.mark.parametrize("change", ["removed", "longer", "touched"])
def test_a_file_that_is_not_the_one_opened_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(ROWS))
    source = open_source(path)
    if change == "removed":
        path.unlink()
    else:
        path.write_bytes(jsonl(ROWS[1:] if change == "touched" else [*ROWS, 1]))
    with pytest.raises(DataError, match=r"a\.jsonl: (is gone|was altered)"):
        list(source.read(0))


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst"])
def test_cut_compressed_data_is_an_error_after_the_rows_before_it(tmp_path: Path, name: str) -> None:
    """[M18] Never a silent end."""
    whole = FORMATS[name]([f"{number:x}" * 50 for number in range(20_000)])
    (tmp_path / name).write_bytes(whole[: len(whole) * 3 // 4])
    found: list[RawRow] = []
    with pytest.raises(DataError, match=f"{name}: the (gzip|zstd) data is damaged"):
        found.extend(open_source(tmp_path / name).read(0))
    assert len(found) > 1000 and not any(row.problem for row in found)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(TimeoutError("slow"), InfraError), (PermissionError("no"), DataError), (RuntimeError("reset"), InfraError)],
)
def test_a_store_that_fails_is_told_from_data_that_is_wrong(
    store: CountingStore, failure: Exception, expected: type[Exception]
) -> None:
    """[I10] What a retry may mend is an InfraError."""
    store.pipe_file("/a.jsonl", jsonl(ROWS))
    source = open_source("counting://a.jsonl")
    CountingStore.failure = failure
    with pytest.raises(expected, match=r"a\.jsonl: "):
        list(source.read(0))


@pytest.fixture(scope="module")
def s3() -> Iterator[s3fs.S3FileSystem]:
    with s3_server("corpus") as store:
        yield store


def test_s3_gives_what_the_disk_gives(tmp_path: Path, s3: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """All formats in one folder, as a folder, a glob and one file by one file; credentials from the environment."""
    monkeypatch.setattr(sources_jsonl, "SPLIT_BYTES", 20_000)
    for name, write in FORMATS.items():
        (tmp_path / name).write_bytes(write(ROWS))
        s3.pipe_file(f"corpus/all/{name}", write(ROWS))
    here, there = open_source(tmp_path), open_source("s3://corpus/all")
    assert everything(there) == everything(here)
    assert there.splits == here.splits
    assert open_source("s3://corpus/all/*").digest == open_source("s3://corpus/all/").digest == there.digest
    assert [row.value for row in open_source("s3://corpus/all/d.parquet").read(2, 50)] == ROWS[850:1200]
    for split in (1, len(there.splits) - 1):
        assert list(there.read(split, 3, 2)) == list(here.read(split, 3, 2))


def test_s3_object_that_was_replaced_or_removed_is_refused(s3: s3fs.S3FileSystem) -> None:
    s3.pipe_file("corpus/changing/a.jsonl", jsonl(ROWS))
    source = open_source("s3://corpus/changing/a.jsonl")
    digest = source.digest
    s3.pipe_file("corpus/changing/a.jsonl", jsonl(ROWS[::-1]))
    assert open_source("s3://corpus/changing/a.jsonl").digest != digest
    with pytest.raises(DataError, match=r"a\.jsonl: was altered"):
        list(source.read(0))
    s3.rm("corpus/changing/a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl: is gone"):
        list(source.read(0))
    for where in ("s3://corpus/none", "s3://no-such-bucket/a.jsonl", "s3://corpus/none/*.jsonl"):
        with pytest.raises(DataError, match=r"no such file|no file matches"):
            open_source(where)


def test_saved_data_set_is_read_without_being_loaded(tmp_path: Path) -> None:
    """A folder of `save_to_disk`, in the order it was saved in; of several splits one must be named."""
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    assert [row.value for row in everything(open_source(tmp_path / "one"))] == ROWS
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="splits train, test; pass the folder of one of them"):
        open_source(tmp_path / "two")
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00003\.arrow: is missing"):
        open_source(tmp_path / "one")


def test_a_data_set_in_the_hubs_layout_is_resolved_by_datasets(tmp_path: Path) -> None:
    """Configurations from the card, shards in order; what isn't there is said with what is."""
    files = "".join(f"  - split: {split}\n    path: s/{split}-*\n" for split in ("train", "test"))
    card = f"---\nconfigs:\n- config_name: small\n  data_files:\n{files}---\n"
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "s").mkdir()
    for number, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"]):
        (tmp_path / "s" / f"{name}.parquet").write_bytes(_parquet(ROWS[number * 500 : number * 500 + 500]))
    where = "hf://datasets/owner/name"
    train = FileSource(resolved_files(str(tmp_path), where, "small", "train"))
    assert [row.value for row in everything(train)] == ROWS[:1000]
    assert train.splits[0].name == "s/train-00000-of-00002.parquet"
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        resolved_files(str(tmp_path), where, "small", "dev")
    with pytest.raises(DataError, match=f"{where}: `datasets` can't resolve it.*config"):
        resolved_files(str(tmp_path), where, "large", "train")


@pytest.mark.parametrize(
    ("where", "is_name"),
    [
        ("hf://datasets/owner/name", True),
        ("hf://datasets/owner/name?config=a&split=b", True),
        ("hf://datasets/owner/name@refs/convert/parquet", True),
        ("hf://datasets/owner/name/data/*.parquet", False),
        ("hf://owner/name", False),
        ("s3://datasets/owner/name", False),
    ],
)
def test_a_data_set_of_the_hub_is_told_from_files_in_it(where: str, is_name: bool) -> None:
    assert is_hub_name(where) == is_name


def test_links(tmp_path: Path) -> None:
    """A link to a file is read; a link to a folder could lead round in a circle and is refused; so is one to nothing."""
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "a.jsonl").write_bytes(jsonl([1]))
    (data / "a.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert [row.value for row in everything(open_source(data))] == [1]
    (data / "loop").symlink_to(data)
    with pytest.raises(DataError, match="loop: a link to a folder is not followed"):
        open_source(data)
    assert len(open_source(data / "*.jsonl").splits) == 1
    (data / "loop").unlink()
    (data / "b.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"b\.jsonl: a link to nothing"):
        open_source(data)
    shutil.rmtree(data)

"""[A16][A17][M18] The matrix of bad input: whatever a source holds, its outcome is the one declared here.

Each case is a folder with a file or several, and the error that ingestion must end with: of our classes, with the place, what
was found and, where the case says so, the remedy. Where rows may be dropped, the same case must end with the bad rows counted
and the good ones kept. No case may raise anything else, pass silently or hang.
"""

import gzip
import io
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import zstandard

from lib.config.rows import RowsConfig
from lib.core.artifact import read_manifest, stage_artifact
from lib.core.errors import DataError, InfraError
from lib.data import sources_jsonl
from lib.data.rows import ingest_dataset
from lib.data.sources import open_source
from tests.lib.data.test_rows import BAD_LINES

ANY = RowsConfig(kind="")
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}

GOOD: dict[str, dict[str, Any]] = {
    "messages": {"messages": [U, A]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "output": "a"},
    "completion": {"prompt": "q", "completion": "a"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "prompt": {"prompt": "q", "verifier": "exact", "answer": "1"},
    "events": {"member": "m", "events": [{"item": "i", "action": "play", "timestamp": 5}]},
}
"""A good row of each layout that the matrix damages."""


def line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def arrow(rows: list[dict[str, Any]], *, stream: bool = False) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def ends(source: object, target: Path, config: RowsConfig = ANY) -> str:
    """The text of the error that ingestion ends with; nothing is written."""
    with pytest.raises(DataError) as caught, stage_artifact(target, "dataset") as staged:
        ingest_dataset(str(source), staged, config=config)
    assert not target.exists()
    assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 10_000
    return str(caught.value)


# --- damage to a line, in every layout: 8 kinds x 7 layouts, plain and compressed by turns

LINE_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda text: text[: len(text) // 2], "not one JSON object on one line"),
    "invalid UTF-8": (lambda text: text.replace(b'"', b'"\xff', 1), "not UTF-8: byte 0xff"),
    "UTF-16": (lambda text: text.decode().encode("utf-16-be"), "not one JSON object|not UTF-8"),
    "NUL bytes": (lambda text: text[:5] + b"\0\0" + text[5:], "not one JSON object on one line"),
    "a key twice": (lambda text: text[:-1] + b"," + text[1:], "is given twice"),
    "two rows on a line": (lambda text: text + text, "not one JSON object on one line: Extra data"),
    "another column": (lambda text: text[:-1] + b', "extra": 1}', "unknown field 'extra'; a row of the layout"),
    "lone surrogate in the id": (lambda text: text[:-1] + b', "id": "\\ud800"}', "id holds half a surrogate pair"),
}
COMPRESS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("rows.jsonl", lambda content: content),
    ("rows.jsonl.gz", gzip.compress),
    ("rows.jsonl.zst", zstandard.compress),
]


@pytest.mark.parametrize("damage", LINE_DAMAGE)
@pytest.mark.parametrize("layout", GOOD)
def test_a_damaged_line_is_named_or_dropped(tmp_path: Path, layout: str, damage: str) -> None:
    """56 cases: the second of three lines."""
    harm, reason = LINE_DAMAGE[damage]
    good = line(GOOD[layout])
    number = list(GOOD).index(layout) + list(LINE_DAMAGE).index(damage)
    name, compress = COMPRESS[number % len(COMPRESS)]
    (tmp_path / name).write_bytes(compress(good + harm(good.strip()) + b"\n" + good))
    text = ends(tmp_path / name, tmp_path / "d")
    assert re.match(f"{name}:2: .*({reason})", text), text
    assert f"1 of 3 rows of {tmp_path / name} can't be used; correct or remove them" in text
    with stage_artifact(tmp_path / "d", "dataset") as staged:
        ingest_dataset(tmp_path / name, staged, config=RowsConfig(kind="", bad_rows="drop"))
    counts = read_manifest(tmp_path / "d").counts
    assert (counts["rows_seen"], counts["rows_kept"], counts["rows_dropped"]) == (3, 2, 1)


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_dropped_and_counted_if_asked(tmp_path: Path, bad: bytes, reason: str) -> None:
    """60 cases, which without being asked are errors (tests/lib/data/test_rows.py)."""
    first, last = ({"id": f"r{number}", "messages": [U, A]} for number in (0, 2))
    (tmp_path / "rows.jsonl").write_bytes(line(first) + bad + b"\n" + line(last))
    with stage_artifact(tmp_path / "d", "dataset") as staged:
        ingest_dataset(tmp_path / "rows.jsonl", staged, config=RowsConfig(bad_rows="drop"))
    manifest = read_manifest(tmp_path / "d")
    assert (manifest.counts["rows_kept"], manifest.counts["rows_dropped"]) == (2, 1)
    assert re.search(reason, manifest.info["dropped"][0])


# --- files: name -> (content, what the error says)

R = GOOD["messages"]
ROWS = [R] * 50
CUT = {"gz": gzip.compress(line(R) * 5000), "zst": zstandard.compress(line({"x": os.urandom(3000).hex()}) * 3)}
STRUCT = pa.struct([("role", pa.string()), ("content", pa.string())])


def nulled(messages: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"messages": pa.array([messages], pa.list_(STRUCT))}), sink)
    return sink.getvalue()


def no_rows() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"messages": pa.array([], pa.list_(STRUCT))}), sink)
    return sink.getvalue()


def late_text(position: int) -> list[dict[str, Any]]:
    """Answers that are numbers until one is a text."""
    return [R | {"id": f"r{n}", "answer": "text" if n == position else n} for n in range(position + 1)]


def deep(levels: int) -> bytes:
    return b'{"messages": ' + b"[" * levels + b"]" * levels + b"}\n"


FILES: dict[str, tuple[str, bytes, str]] = {
    "empty jsonl": ("a.jsonl", b"", "holds no rows"),
    "empty gz": ("a.jsonl.gz", b"", "holds no rows"),
    "gz of nothing": ("a.jsonl.gz", gzip.compress(b""), "holds no rows"),
    "empty zst": ("a.jsonl.zst", b"", "holds no rows"),
    "empty parquet": ("a.parquet", b"", "a.parquet: can't be read as Parquet"),
    "empty arrow": ("a.arrow", b"", "a.arrow: can't be read as Arrow"),
    "parquet without rows": ("a.parquet", no_rows(), "holds no rows"),
    "only a line end": ("a.jsonl", b"\n", "a.jsonl:1: not one JSON object on one line: the line is blank"),
    "only blank lines": ("a.jsonl", b"\n \n\t\n", "a.jsonl:1: .*blank"),
    "blank line at the end": ("a.jsonl", line(R) + b"\n", "a.jsonl:2: .*the line is blank"),
    "last line cut off": ("a.jsonl", line(R) + line(R)[:-20], "a.jsonl:2: not one JSON object on one line"),
    "old Mac line ends": ("a.jsonl", line(R).strip() + b"\r" + line(R).strip(), "a.jsonl:1: .*Extra data"),
    "byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + line(R), "a.jsonl:1: .*byte order mark; save it as UTF-8 without one"),
    "UTF-16 with a mark": ("a.jsonl", line(R).decode().encode("utf-16"), "a.jsonl:1: not UTF-8: byte 0xff at position 0"),
    "UTF-32": ("a.jsonl", line(R).decode().encode("utf-32"), "a.jsonl:1: not UTF-8"),
    "Latin-1": ("a.jsonl", line(R).replace(b'"q"', b'"\xe9"'), "a.jsonl:1: not UTF-8: byte 0xe9 at position 43"),
    "a JSON array": ("a.jsonl", json.dumps(ROWS).encode(), "a.jsonl:1: is of type list, expected an object"),
    "pretty JSON": ("a.jsonl", json.dumps(R, indent=1).encode(), "a.jsonl:1: not one JSON object on one line"),
    "CSV under the name": ("a.jsonl", b"prompt,completion\nq,a\n", "a.jsonl:1: not one JSON object"),
    "YAML under the name": ("a.jsonl", b"messages: []\n", "a.jsonl:1: not one JSON object"),
    "HTML under the name": ("a.jsonl", b"<!DOCTYPE html><html>404</html>", "a.jsonl:1: not one JSON object"),
    "an LFS pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a.jsonl:1: not one JSON object"),
    "random bytes": ("a.jsonl", bytes(range(128, 256)) * 50, "a.jsonl:1: not UTF-8"),
    "zeros": ("a.jsonl", bytes(5000), "a.jsonl:1: not one JSON object"),
    "gzip without its suffix": ("a.jsonl", gzip.compress(line(R)), "a.jsonl:1: not UTF-8"),
    "plain text as gz": ("a.jsonl.gz", line(R), "a.jsonl.gz: the gzip data is damaged.*compress or copy the file again"),
    "plain text as zst": ("a.jsonl.zst", line(R), "a.jsonl.zst: the zstd data is damaged"),
    "zst as gz": ("a.jsonl.gz", zstandard.compress(line(R)), "the gzip data is damaged"),
    "gz as zst": ("a.jsonl.zst", gzip.compress(line(R)), "the zstd data is damaged"),
    "cut gz": ("a.jsonl.gz", CUT["gz"][:-9], "a.jsonl.gz: the gzip data is damaged after byte .*Truncated"),
    "cut gz, by the half": ("a.jsonl.gz", CUT["gz"][: len(CUT["gz"]) // 2], "the gzip data is damaged"),
    "cut zst": ("a.jsonl.zst", CUT["zst"][:-5], "a.jsonl.zst: the zstd data is damaged.*Truncated"),
    "cut zst, by the half": ("a.jsonl.zst", CUT["zst"][: len(CUT["zst"]) // 2], "the zstd data is damaged"),
    "gz with a flipped byte": (
        "a.jsonl.gz",
        CUT["gz"][:50] + bytes([CUT["gz"][50] ^ 255]) + CUT["gz"][51:],
        "is damaged|not one JSON",
    ),
    "gz with something behind": ("a.jsonl.gz", gzip.compress(line(R)) + b"more", "the gzip data is damaged"),
    "zst with something behind": ("a.jsonl.zst", zstandard.compress(line(R)) + b"more", "the zstd data is damaged"),
    "gz in a gz": ("a.jsonl.gz", gzip.compress(gzip.compress(line(R))), "a.jsonl.gz:1: not UTF-8"),
    "text as parquet": ("a.parquet", line(R), "a.parquet: can't be read as Parquet.*write or copy the file again"),
    "parquet's name alone": ("a.parquet", b"PAR1PAR1", "can't be read as Parquet"),
    "cut parquet": ("a.parquet", parquet(ROWS)[:-4], "can't be read as Parquet"),
    "parquet without its start": ("a.parquet", parquet(ROWS)[300:], "can't be read as Parquet"),
    "parquet with damaged pages": ("a.parquet", parquet(ROWS)[:4] + bytes(60) + parquet(ROWS)[64:], "can't be read as Parquet"),
    "gz of a parquet": ("a.parquet", gzip.compress(parquet(ROWS)), "can't be read as Parquet"),
    "text as arrow": ("a.arrow", line(R), "a.arrow: can't be read as Arrow"),
    "arrow's name alone": ("a.arrow", b"ARROW1\0\0", "can't be read as Arrow"),
    "cut arrow": ("a.arrow", arrow(ROWS)[:-10], "can't be read as Arrow"),
    "cut arrow stream": ("a.arrow", arrow(ROWS, stream=True)[:-40], "can't be read as Arrow"),
    "parquet as arrow": ("a.arrow", parquet(ROWS), "can't be read as Arrow"),
    "arrow as parquet": ("a.parquet", arrow(ROWS), "can't be read as Parquet"),
    "null struct": ("a.parquet", nulled([None, None]), "a.parquet:1: message 1 is missing or null"),
    "null content": (
        "a.parquet",
        nulled([U, {"role": "assistant", "content": None}]),
        "a.parquet:1: message 2 .*content is missing or null",
    ),
    "null role": ("a.parquet", nulled([U, {"role": None, "content": "a"}]), "a.parquet:1: message 2 has role None"),
    "empty list": ("a.parquet", nulled([]), "a.parquet:1: messages is an empty list"),
    "NaN in a column": (
        "a.parquet",
        parquet([{**GOOD["preference"], "margin": float("nan")}]),
        "a.parquet:1: margin is nan, expected a finite",
    ),
    "infinity in a column": ("a.arrow", arrow([{**GOOD["preference"], "margin": float("-inf")}]), "a.arrow:1: margin is -inf"),
    "bytes in a column": ("a.parquet", parquet([{"text": b"abc"}]), "a.parquet:1: text is of type bytes"),
    "numbers in a column": ("a.parquet", parquet([{"text": 5}]), "a.parquet:1: text is of type int"),
    "structs with a null filled in": (
        "a.parquet",
        parquet([{"prompt": "q", "verifier": "v", "payload": {"a": 1}}, {"prompt": "q", "verifier": "v", "payload": {"b": 1}}]),
        "a.parquet:1: payload holds a null, which may be a key that another row has.*write it as JSON in a text",
    ),
    "answers that turn text": ("a.jsonl", b"".join(map(line, late_text(40))), "a.jsonl:1: answer is of type int.*\n"),
    "a number among texts": (
        "a.jsonl",
        line(R | {"answer": "1"}) * 3 + line(R | {"answer": 1}),
        "a.jsonl:4: answer is of type int",
    ),
    "other layout later": (
        "a.jsonl",
        line(R) + line(GOOD["sharegpt"]),
        "a.jsonl:2: has unknown field 'conversations'; a row of the layout",
    ),
    "texts and messages mixed": (
        "a.jsonl",
        line(GOOD["completion"]) + line({"prompt": [U], "completion": [A]}),
        "a.jsonl:2: prompt is of type list",
    ),
    "one id twice": ("a.jsonl", line(R | {"id": "x"}) * 2, "a.jsonl:2: id 'x' is taken by a.jsonl:1; give each row its own"),
    "an id like a place": (
        "a.jsonl",
        line(R | {"id": "a.jsonl:2"}) + line(R),
        "a.jsonl:2: id 'a.jsonl:2' is taken by a.jsonl:1",
    ),
    "columns of no layout": (
        "a.jsonl",
        line({"question": "q", "answer": "a"}),
        "a.jsonl:1: has columns answer, question, which fit no layout",
    ),
    "columns of two layouts": (
        "a.jsonl",
        line(R | {"text": "x"}),
        "a.jsonl:1: has columns messages, text, which fit no layout.*\n.*text",
    ),
    "no columns": ("a.jsonl", b"{}\n", "a.jsonl:1: has columns of no name"),
    "nested 900 deep": ("a.jsonl", deep(900), "a.jsonl:1: (message 1 is of type list|not JSON)"),
    "nested 100,000 deep": ("a.jsonl", deep(100_000), "a.jsonl:1: not JSON that can be read: nested too deeply"),
    "a number of 10,000 digits": ("a.jsonl", b'{"text": ' + b"9" * 10_000 + b"}\n", "a.jsonl:1: not one JSON object"),
    "a number beyond floats": ("a.jsonl", line(GOOD["preference"])[:-2] + b', "margin": 1e999}\n', "a.jsonl:1: margin is inf"),
    "100,000 fields": (
        "a.jsonl",
        b"{" + b",".join(b'"k%d":0' % n for n in range(100_000)) + b"}\n",
        "a.jsonl:1: has columns k0, .* and 99980 more, which fit no layout",
    ),
    "wrong suffix": ("a.csv", b"x", "a.csv: a .csv file; rows are read from .jsonl"),
    "json suffix": ("a.json", line(R), "a.json: a .json file"),
    "txt suffix": ("a.txt", line(R), "a.txt: a .txt file"),
    "no suffix": ("rows", line(R), "rows: a nameless file"),
    "upper case": ("a.JSONL", line(R), "a.JSONL: a .JSONL file"),
    "gz of parquet by name": ("a.parquet.gz", gzip.compress(parquet(ROWS)), "a .parquet.gz file"),
    "bz2": ("a.jsonl.bz2", b"BZh9", "a .bz2 file"),
    "temporary name": ("a.jsonl.tmp", line(R), "a .tmp file"),
    "a name that can't be shown": ("a\nb.jsonl", line(R), "a file name with characters that can't be printed; rename it"),
}


@pytest.mark.parametrize(("name", "content", "reason"), FILES.values(), ids=FILES.keys())
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    for source in (tmp_path / "in" / name, tmp_path / "in"):
        text = ends(source, tmp_path / "d")
        assert re.search(reason, text, re.DOTALL), text


# --- what lies around files

PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: folder / "none", "none: no such file or folder; pass a file, a folder, a glob or an address"),
    "empty folder": (lambda folder: folder, "holds no file of rows"),
    "only hidden files": (lambda folder: (folder / ".a.jsonl").write_bytes(line(R)) and folder, "holds no file of rows"),
    "glob without a match": (lambda folder: folder / "*.jsonl", "no file matches"),
    "glob of folders": (lambda folder: (folder / "a.jsonl").mkdir() or folder / "*.jsonl", "no file matches"),
    "loop of links": (
        lambda folder: (folder / "loop").symlink_to(folder) or folder,
        "loop: a link to a folder is not followed",
    ),
    "link to itself": (
        lambda folder: (folder / "a.jsonl").symlink_to(folder / "a.jsonl") or folder,
        "a.jsonl: a link to nothing",
    ),
    "link to itself, alone": (
        lambda folder: (folder / "a.jsonl").symlink_to(folder / "a.jsonl") or folder / "a.jsonl",
        "can't be listed|no such",
    ),
    "link to nothing": (lambda folder: (folder / "a.jsonl").symlink_to(folder / "b") or folder, "a.jsonl: a link to nothing"),
    "named pipe": (lambda folder: os.mkfifo(folder / "a.jsonl") or folder, "a.jsonl: not a plain file"),
    "named pipe, alone": (lambda folder: os.mkfifo(folder / "a.jsonl") or folder / "a.jsonl", "neither a file nor a folder"),
    "device": (lambda folder: "/dev/zero", "/dev/zero: neither a file nor a folder"),
    "unknown kind of address": (lambda folder: "s9://bucket/a.jsonl", "s9://bucket/a.jsonl: not an address that can be opened"),
    "address without anything": (lambda folder: "memory://none.jsonl", "no such file or folder"),
    "address of nobody": (lambda folder: "http://127.0.0.1:1/a.jsonl", "a.jsonl: no such file"),
    "hub name with a wrong option": (lambda folder: "hf://datasets/a/b?part=x", "unknown option 'part'"),
    "data and something else": (
        lambda folder: (folder / "a.jsonl").write_bytes(line(R)) and (folder / "README.md").write_text("x") and folder,
        "README.md: a .md file.*remove it, or pass a glob",
    ),
    "good and bad file": (
        lambda folder: (folder / "a.jsonl").write_bytes(line(R)) and (folder / "b.parquet").write_bytes(b"x") and folder,
        "b.parquet: can't be read as Parquet",
    ),
    "one id in two files": (
        lambda folder: [(folder / f"{name}.jsonl").write_bytes(line(R | {"id": "x"})) for name in "ab"] and folder,
        "b.jsonl:1: id 'x' is taken by a.jsonl:1",
    ),
    "two kinds in two files": (
        lambda folder: (
            [(folder / f"{name}.jsonl").write_bytes(line(GOOD[name])) for name in ("messages", "preference")] and folder
        ),
        "preference.jsonl:1: has unknown field 'chosen'",
    ),
    "saved data set without its rows": (
        lambda folder: (
            (folder / "dataset_info.json").write_text("{}")
            and (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
            and folder
        ),
        "data.arrow: is missing from the saved data set; copy the folder again",
    ),
    "saved data set with a broken state": (
        lambda folder: (folder / "dataset_info.json").write_text("{}") and (folder / "state.json").write_text("{") and folder,
        "can't be listed: JSONDecodeError",
    ),
    "name too long": (lambda folder: folder / ("x" * 300), "can't be listed|no such file"),
    "name with a NUL": (lambda folder: f"{folder}/a\0.jsonl", "can't be listed|no such file"),
    "empty name": (lambda folder: "", "holds no|a nameless file|file"),
}


@pytest.mark.parametrize(("make", "reason"), PLACES.values(), ids=PLACES.keys())
def test_a_place_that_gives_no_rows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], reason: str
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    source = make(tmp_path / "in")
    text = ends(source, tmp_path / "d")
    assert re.search(reason, text, re.DOTALL), text


def test_a_socket_is_no_data(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "a.jsonl"))
        assert "a.jsonl: not a plain file" in ends(tmp_path, tmp_path.parent / "d")


def test_a_row_of_50_mb_is_refused_or_kept_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text is not in the error; under a bound of 1 MiB it is refused by its length."""
    huge = line({"messages": [U, {"role": "robot", "content": "x" * 50_000_000}]})
    (tmp_path / "a.jsonl").write_bytes(line(R) + huge)
    assert "a.jsonl:2: message 2 has role 'robot'" in ends(tmp_path / "a.jsonl", tmp_path / "d")
    monkeypatch.setattr(sources_jsonl, "MAX_ROW_BYTES", 1 << 20)
    assert "a.jsonl:2: longer than 1 MiB; split it into several rows" in ends(tmp_path / "a.jsonl", tmp_path / "d")


@pytest.mark.parametrize("what", ["removed", "cut", "replaced"])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Changed after the first 1,000 rows of many blocks."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(R) * 20_000)
    monkeypatch.setattr(sources_jsonl, "READ_BYTES", 4096)
    done: list[int] = []

    def change(_: int) -> None:
        if not done:
            {"removed": path.unlink, "cut": lambda: os.truncate(path, 100_000), "replaced": lambda: path.write_bytes(b"")}[
                what
            ]()
        done.append(1)

    with (
        pytest.raises(DataError, match=r"a\.jsonl: (is gone|ends before|was altered)"),
        stage_artifact(tmp_path / "d", "dataset") as staged,
    ):
        ingest_dataset(path, staged, change)


def test_a_store_that_does_not_answer_is_no_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """[I10] Nobody listens at port 1: the error is one that is retried, and names the address."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InfraError, match=r"s3://bucket/a\.jsonl: can't be listed"):
        open_source("s3://bucket/a.jsonl")
    s3fs.S3FileSystem.clear_instance_cache()


def test_credentials_that_are_missing_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"s3://bucket/a\.jsonl: can't be listed: NoCredentialsError.*check address and rights"):
        open_source("s3://bucket/a.jsonl")
    s3fs.S3FileSystem.clear_instance_cache()


def test_ingested_rows_are_not_taken_for_raw_ones(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(line(R))
    with stage_artifact(tmp_path / "d", "dataset") as staged:
        ingest_dataset(tmp_path / "a.jsonl", staged)
    assert "rows that were ingested already" in ends(tmp_path / "d", tmp_path / "again")


def test_the_matrix_is_as_large_as_it_says() -> None:
    assert len(LINE_DAMAGE) * len(GOOD) + len(BAD_LINES) + len(FILES) + len(PLACES) + 5 >= 220

"""Laws of ingestion: a row comes through unchanged, or is refused with its place and reason; nothing in between."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config.rows import RowsConfig
from lib.core.artifact import Staged, read_manifest, stage_artifact
from lib.core.errors import ArtifactCorruptError, DataError
from lib.core.examples import Conversation, Message
from lib.data.checks import RowRefused
from lib.data.rows import ingest_dataset
from lib.data.schemas.layouts import LAYOUTS
from lib.data.table import ExampleTable
from tests.lib.data.datasets import ingested, row, table, write_jsonl

U = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}


def _line(value: object) -> bytes:
    return json.dumps(value).encode()


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "blank line": (b"", "blank"),
    "white space": (b"   ", "blank"),
    "cut off": (b'{"messages": [{"role": "us', "not one JSON object"),
    "two objects": (b"{} {}", "not one JSON object"),
    "comma at the end": (b'{"messages": [],}', "not one JSON object"),
    "single quotes": (b"{'messages': []}", "not one JSON object"),
    "NaN": (b'{"messages": NaN}', "NaN is not a JSON value"),
    "Infinity": (b'{"messages": -Infinity}', "-Infinity is not"),
    "byte order mark": ("\ufeff".encode() + _line({"messages": [U, A]}), "byte order mark"),
    "Latin-1": ('{"messages": "é"}'.encode("latin-1"), "not UTF-8: byte 0xe9 at position 14"),
    "UTF-16": ("{}".encode("utf-16"), "not UTF-8"),
    "bare NUL": (b"\x00", "not one JSON object"),
    "nested without end": (b"[" * 100_000, "nested too deeply"),
    "key twice": (b'{"messages": [], "messages": []}', "'messages' is given twice"),
    "role twice": (b'{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}', "'role' is given twice"),
    "a list": (_line([U, A]), "of type list"),
    "a string": (_line("hi"), "of type str"),
    "a number": (b"7", "of type int"),
    "null": (b"null", "missing or null"),
    "empty object": (b"{}", "messages is missing"),
    "other field": (_line({"messages": [U, A], "prompt": "x"}), "unknown field 'prompt'"),
    "misspelt field": (_line({"message": [U, A]}), "unknown field 'message'"),
    "messages null": (_line({"messages": None}), "messages is missing or null"),
    "messages empty": (_line({"messages": []}), "messages is an empty list"),
    "messages a string": (_line({"messages": "hi"}), "messages is of type str"),
    "messages an object": (_line({"messages": U}), "messages is of type dict"),
    "message a string": (_line({"messages": ["hi", A]}), "message 1 is of type str"),
    "message null": (_line({"messages": [U, None]}), "message 2 is missing or null"),
    "no role": (_line({"messages": [{"content": "q"}, A]}), "message 1 has no 'role'"),
    "no content": (_line({"messages": [U, {"role": "assistant"}]}), "message 2 has no 'content'"),
    "extra in message": (_line({"messages": [U, A | {"score": 1}]}), "message 2 has unknown field 'score'"),
    "tool calls": (
        _line({"messages": [U | {"tool_calls": [{}]}, A]}),
        "message 1 has 'tool_calls', which a message of role user",
    ),
    "role human": (_line({"messages": [{"role": "human", "content": "q"}, A]}), "role 'human'; expected one of system"),
    "role User": (_line({"messages": [{"role": "User", "content": "q"}, A]}), "role 'User'"),
    "role tool": (
        _line({"messages": [U, {"role": "tool", "content": "q"}, A]}),
        "message 2 is of the tool, expected of the assistant",
    ),
    "role null": (_line({"messages": [{"role": None, "content": "q"}, A]}), "role None"),
    "role a list": (_line({"messages": [{"role": ["user"], "content": "q"}, A]}), "role "),
    "content null": (
        _line({"messages": [U, {"role": "assistant", "content": None}]}),
        r"message 2 \(assistant\): content is missing",
    ),
    "content a number": (
        _line({"messages": [{"role": "user", "content": 7}, A]}),
        r"message 1 \(user\): content is of type int",
    ),
    "content parts": (_line({"messages": [{"role": "user", "content": [{"text": "q"}]}, A]}), "content is of type list"),
    "content false": (_line({"messages": [{"role": "user", "content": False}, A]}), "content is of type bool"),
    "content empty": (
        _line({"messages": [U, {"role": "assistant", "content": ""}]}),
        r"message 2 \(assistant\): content is blank",
    ),
    "content blank": (_line({"messages": [{"role": "user", "content": " \n"}, A]}), "content is blank"),
    "half a surrogate pair": (b'{"messages": [{"role": "user", "content": "a\\ud83d"}]}', "surrogate pair at character 1"),
    "no assistant": (_line({"messages": [U]}), "no assistant message"),
    "system alone": (_line({"messages": [S]}), "no assistant message"),
    "ends with user": (_line({"messages": [U, A, U]}), "ends with a message of the user"),
    "two users": (_line({"messages": [U, U, A]}), "message 2 is of the user, expected of the assistant"),
    "two assistants": (_line({"messages": [U, A, A]}), "message 3 is of the assistant, expected of the user"),
    "assistant first": (_line({"messages": [A, U, A]}), "message 1 is of the assistant"),
    "assistant after system": (_line({"messages": [S, A]}), "message 2 is of the assistant"),
    "system in the middle": (_line({"messages": [U, S, A]}), "message 2 is of the system"),
    "two systems": (_line({"messages": [S, S, U, A]}), "message 2 is of the system"),
    "id a number": (_line({"id": 7, "messages": [U, A]}), "id is of type int"),
    "id blank": (_line({"id": " ", "messages": [U, A]}), "id is blank"),
    "id too long": (_line({"id": "x" * 257, "messages": [U, A]}), "longer than 256"),
    "id with newline": (_line({"id": "a\nb", "messages": [U, A]}), "not printable"),
    "id true": (_line({"id": True, "messages": [U, A]}), "id is of type bool"),
    "id taken": (_line({"id": "r0", "messages": [U, A]}), r"id 'r0' is taken by rows\.jsonl:1"),
    "answer a number": (_line({"messages": [U, A], "answer": 42}), "answer is of type int"),
    "answer blank": (_line({"messages": [U, A], "answer": ""}), "answer is blank"),
    "answer a list": (_line({"messages": [U, A], "answer": ["42"]}), "answer is of type list"),
}


def _refusal(source: Path, folder: Path) -> str:
    target = folder / "dataset"
    with pytest.raises(DataError) as caught:
        ingested(source, target)
    assert not target.exists()
    return str(caught.value)


def test_matrix_has_sixty_cases() -> None:
    assert len(BAD_LINES) >= 60


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_malformed_row_is_refused_with_place_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    """[A16] Second of three rows: the message starts with its place; nothing is written."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([_line(row(0, "a")), line, _line(row(2, "c"))]) + b"\n")
    with pytest.raises(DataError, match=reason) as caught:
        ingested(path, tmp_path / "dataset")
    first, last = str(caught.value).splitlines()
    assert first.startswith("rows.jsonl:2: ")
    assert last.startswith("1 of 3 rows of ")
    assert not (tmp_path / "dataset").exists()


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "assistant"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["messages", "role", "content", "id", "answer", "x"]), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_any_value_is_a_conversation_or_refused(value: object) -> None:
    """[A16] No JSON value whatever makes another exception."""
    try:
        assert isinstance(LAYOUTS[0].check(value, "f:1"), Conversation)
    except RowRefused as refused:
        assert str(refused)


def test_first_twenty_bad_rows_are_listed_and_all_counted(tmp_path: Path) -> None:
    """[A16] 25 bad of 50: lines 2, 4, ... 40 are listed."""
    rows: list[object] = [{"messages": [U]} if number % 2 else row(number, "a") for number in range(50)]
    *listed, last = _refusal(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path).splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"rows.jsonl:{number}" for number in range(2, 42, 2)]
    assert last.startswith("25 of 50 rows") and "the first 20 are shown" in last


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.write_bytes(b""), "holds no rows"),
        (lambda path: path.mkdir(), "holds no file of rows"),
        (lambda path: (path.mkdir(), (path / "notes.txt").write_text("x")), r"notes\.txt: a \.txt file"),
        (lambda path: (path.mkdir(), (path / "LICENSE").write_text("x")), "LICENSE: a nameless file"),
        (lambda path: (path.mkdir(), (path / "a.jsonl").write_text("")), "holds no rows"),
        (lambda path: (path.mkdir(), (path / "a.parquet").write_text("PAR1 but not quite")), "can't be read as Parquet"),
    ],
    ids=["missing", "empty file", "empty folder", "text file", "no suffix", "folder of an empty file", "not Parquet"],
)
def test_source_that_holds_no_rows_is_refused(tmp_path: Path, make: Callable[[Path], Any], reason: str) -> None:
    """[A17]"""
    source = tmp_path / "rows.jsonl"
    make(source)
    with pytest.raises(DataError, match=reason):
        ingested(source, tmp_path / "dataset")


_TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(lambda text: bool(text.strip()))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=3), min_size=1, max_size=8), st.booleans())
def test_rows_come_through_unchanged(
    tmp_path_factory: pytest.TempPathFactory, chats: list[list[tuple[str, str]]], ids: bool
) -> None:
    """Any text in, the same text out, in order, by JSONL and by Parquet; ids default to the place."""
    folder = tmp_path_factory.mktemp("rows")
    rows: list[dict[str, Any]] = []
    for number, pairs in enumerate(chats):
        messages = [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]
        rows.append(
            {"messages": messages, "answer": pairs[0][1] if number % 2 else None} | ({"id": f"i{number}"} if ids else {})
        )
    write_jsonl(folder / "rows.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        found = ExampleTable.open(ingested(folder / name, folder / f"dataset-{name}"), Conversation)
        assert found.rows(range(len(found))) == [
            Conversation(
                sample_id=value.get("id", f"{name}:{number}"),
                messages=tuple(Message(**message) for message in value["messages"]),
                source=f"{name}:{number}",
                answer=value["answer"],
            )
            for number, value in enumerate(rows, start=1)
        ]


def test_parquet_rows_are_checked_like_lines(tmp_path: Path) -> None:
    """[A16] A null that a schema merge filled in, bytes that are no text, and a column too many."""
    struct = pa.struct([("role", pa.string()), ("content", pa.string())])
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [good, [good[0], {"role": "assistant", "content": None}], None]
    pq.write_table(pa.table({"messages": pa.array(rows, pa.list_(struct))}), tmp_path / "nulls.parquet")
    lines = _refusal(tmp_path / "nulls.parquet", tmp_path).splitlines()
    assert [line.split(": ")[0] for line in lines[:-1]] == ["nulls.parquet:2", "nulls.parquet:3"]
    broken = pa.array([b"ok", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": broken, "messages": pa.array([good, good], pa.list_(struct))}), tmp_path / "bytes.parquet")
    assert _refusal(tmp_path / "bytes.parquet", tmp_path).startswith("bytes.parquet:2: not UTF-8")
    table_ = pa.table({"messages": pa.array([good], pa.list_(struct)), "score": [float("nan")]})
    pq.write_table(table_, tmp_path / "more.parquet")
    assert "more.parquet:1: has columns messages, score, which are those of 'messages' and the unknown score" in _refusal(
        tmp_path / "more.parquet", tmp_path
    )


def test_folder_is_read_in_order_of_names_and_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "b.jsonl", [row(2, "c")])
    write_jsonl(tmp_path / "in" / "a" / "z.jsonl", [row(0, "a") | {"answer": "1"}, row(1, "b")])
    (tmp_path / "in" / ".hidden").write_text("not data")
    seen: list[int] = []
    staged = Staged(tmp_path)
    ingest_dataset(tmp_path / "in", staged, seen.append)
    assert sum(seen) == 3
    counts = staged.counts
    assert (counts["files"], counts["rows_seen"], counts["rows_kept"]) == (2, 3, 3)
    assert (counts["messages"], counts["assistant_messages"], counts["rows_with_answer"]) == (6, 3, 1)
    found = ExampleTable.open(ingested(tmp_path / "in", tmp_path / "dataset"), Conversation)
    assert [(item.sample_id, item.source) for item in found.rows(range(3))] == [
        *[("r0", "a/z.jsonl:1"), ("r1", "a/z.jsonl:2"), ("r2", "b.jsonl:1")]
    ]


def test_same_rows_make_the_same_artifact_wherever_they_lie(tmp_path: Path) -> None:
    """[A10][A11] The digest depends on the rows, not on the folder they were read from; one character changes it."""
    rows = [row(number, f"a{number}") for number in range(3000)]
    first = ingested(write_jsonl(tmp_path / "one" / "rows.jsonl", rows), tmp_path / "d1")
    second = ingested(write_jsonl(tmp_path / "two" / "rows.jsonl", rows), tmp_path / "d2")
    changed = ingested(write_jsonl(tmp_path / "one" / "rows.jsonl", [*rows[:-1], row(2999, "b")]), tmp_path / "d3")
    assert read_manifest(first).digest == read_manifest(second).digest != read_manifest(changed).digest


def test_altered_or_foreign_artifact_is_refused(tmp_path: Path) -> None:
    folder = ingested(write_jsonl(tmp_path / "rows.jsonl", [row(0, "a")]), tmp_path / "dataset")
    shard = folder / "rows-00000.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"x")
    with pytest.raises(ArtifactCorruptError, match="sha256"):
        ExampleTable.open(folder, Conversation)


def test_table_reads_any_row_by_number(tmp_path: Path) -> None:
    """2,500 rows lie in three batches; rows at their edges and out of range."""
    found = table(tmp_path, [row(number, f"a{number}") for number in range(2500)])
    assert len(found) == 2500
    wanted = [2499, 0, 1023, 1024, 2047, 2048, 0]
    assert [item.messages[1].content for item in found.rows(wanted)] == [f"a{number}" for number in wanted]
    for outside in (-1, 2500):
        with pytest.raises(IndexError):
            found[outside]


def test_a_prompt_names_a_verifier_that_there_is(tmp_path: Path) -> None:
    """A misspelt one is found before any answer is generated; without a list of names any is taken."""
    rows = [{"prompt": "q", "verifier": name, "answer": "a"} for name in ("exact", "exakt")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    config = RowsConfig(kind="prompt", verifiers=("exact", "last_number"))
    with (
        pytest.raises(DataError, match=r"rows.jsonl:2: verifier 'exakt' is no reward; expected one of exact, last_number"),
        stage_artifact(tmp_path / "a", "dataset") as staged,
    ):
        ingest_dataset(tmp_path / "rows.jsonl", staged, config=config)
    with stage_artifact(tmp_path / "b", "dataset") as staged:
        ingest_dataset(tmp_path / "rows.jsonl", staged, config=RowsConfig(kind="prompt"))
        assert staged.counts["rows_kept"] == 2

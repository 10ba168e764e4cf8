"""Laws of example sources: the same batches from an ingested data set and straight from its files, a bad row by its place."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.config.data import DataConfig
from lib.core.errors import DataError
from lib.core.examples import (
    Completion,
    Conversation,
    Event,
    EventSequence,
    Example,
    Message,
    PreferencePair,
    Prompt,
    ToolCall,
)
from lib.data import shuffle, sources_jsonl
from lib.data.examples import CheckedExamples, TableExamples, num_characters, open_examples
from lib.data.mixture import OWN_DATA
from lib.data.shuffle import ExampleSource, SourceOrder, read_again
from lib.data.stream import Encoding, PackedStream
from lib.tokens.chat import ChatEncoder
from tests.lib.data.datasets import ingested, row, write_jsonl

CONFIG = DataConfig(num_streams=4, open_packs=3, shuffle_rows=8, long_rows="split")


def _rows(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    source = random.Random(seed)
    return [row(number, "ab 12 " * source.randint(1, 60)) for number in range(num_rows)]


def _jsonl(folder: Path) -> Path:
    write_jsonl(folder / "a.jsonl", _rows(120))
    write_jsonl(folder / "b.jsonl", [{**value, "id": f"b{value['id']}"} for value in _rows(40, 1)])
    return folder


def _parquet(folder: Path) -> Path:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(_rows(120)), folder / "rows.parquet", row_group_size=7)
    return folder


def _compressed(folder: Path) -> Path:
    folder.mkdir()
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(value) + "\n" for value in _rows(90)).encode()))
    return folder


def _stream(source: ExampleSource, encoder: ChatEncoder) -> PackedStream:
    return PackedStream({OWN_DATA: source}, Encoding.of_chat(encoder), CONFIG, sequence_length=256, rows_per_step=4)


@pytest.mark.parametrize("make", [_jsonl, _parquet, _compressed])
def test_an_ingested_data_set_gives_the_batches_of_its_files(
    make: Any, tmp_path: Path, encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits of 4 KiB, blocks that close after 2,000 characters: many of both. Ids, tokens and masks of two epochs are
    equal; a direct stream that is stopped and loaded goes on with the batches of the ingested one."""
    monkeypatch.setattr(sources_jsonl, "SPLIT_BYTES", 4 << 10)
    monkeypatch.setattr(shuffle, "BLOCK_CHARACTERS", 2000)
    folder = make(tmp_path / "files")
    direct = open_examples(folder, Conversation, kind="conversation")
    table = open_examples(ingested(folder, tmp_path / "dataset"), Conversation, kind="conversation")
    assert isinstance(direct, CheckedExamples) and isinstance(table, TableExamples)
    assert direct.num_splits == table.num_splits and (make is _compressed or direct.num_splits > 4)
    streams = [_stream(direct, encoder), _stream(table, encoder)]
    for step in range(90):
        rows = [
            [
                [(d.sample_id, d.token_ids.tolist(), d.loss_mask.tolist()) for d in row.documents]
                for row in stream.next_step().rows
            ]
            for stream in streams
        ]
        assert rows[0] == rows[1]
        if step % 13 == 0:
            state = json.loads(json.dumps(streams[0].state()))
            streams[0] = _stream(direct, encoder)
            streams[0].load_state(state)
    assert min(state["mixer"]["cursors"][0][0] for state in streams[0].state()["streams"].values()) >= 2


def test_rows_are_read_again_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_jsonl, "SPLIT_BYTES", 4 << 10)
    source = open_examples(_jsonl(tmp_path / "files"), Conversation, kind="conversation")
    for num_streams in (1, 4, 64):
        order = SourceOrder(source, "data", seed=0, num_streams=num_streams)
        everything = {(split, row.row): row.example for split in range(source.num_splits) for row in source.read(split)}
        places = random.Random(0).sample(sorted(everything), 30)
        assert read_again(order, places) == {place: everything[place] for place in places}


@pytest.mark.parametrize(("bad", "reason"), [('{"messages": []}', "messages"), ("{", "not one JSON object"), ("", "blank")])
def test_a_bad_row_is_an_error_with_its_place(tmp_path: Path, encoder: ChatEncoder, bad: str, reason: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", _rows(20))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:10], bad, *lines[10:]]) + "\n")
    stream = _stream(open_examples(path, Conversation, kind="conversation"), encoder)
    with pytest.raises(DataError, match=rf"rows\.jsonl:11: .*{reason}.*; correct or remove the row"):
        for _ in range(10):
            stream.next_step()


def test_characters_are_those_of_all_text() -> None:
    """By hand: contents, thinking, arguments, tools, payloads, items and actions; roles, names and ids don't count."""
    user, answer = Message("user", "four"), Message("assistant", "no", thinking="abc", tool_calls=(ToolCall("f", "{}"),))
    cases: list[tuple[Example, int]] = [
        (Conversation("i", (user, answer), "s", tools=("{12}",)), 4 + 2 + 3 + 2 + 4),
        (Completion("i", "one", "three", "s"), 8),
        (PreferencePair("i", (user,), (answer,), (Message("assistant", "yes"),), "s"), 4 + 7 + 3),
        (Prompt("i", (user,), "s", "exact", "42"), 6),
        (EventSequence("i", "m", (Event("item", "play", 0), Event("x", "y", 1)), "s"), 10),
    ]
    assert [num_characters(example) for example, _ in cases] == [expected for _, expected in cases]

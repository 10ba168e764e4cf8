"""Data sets that say where their rows are: the rows of a copy, named by their content, and never other rows unnoticed."""

import os
from pathlib import Path

import pytest

from lib.config.quality import CleanConfig
from lib.config.rows import RowsConfig
from lib.core.artifact import read_manifest, stage_artifact
from lib.core.errors import ConfigError, DataError
from lib.core.examples import Completion, Conversation
from lib.data import shards
from lib.data.examples import kind_held, open_examples
from lib.data.merging import merge_parts
from lib.data.quality.datasets import write_report
from lib.data.shards import ingest_shard, plan_shards
from lib.data.sources import open_source
from lib.data.table import ExampleTable
from tests.lib.data.datasets import ingested, row, write_jsonl

IN_PLACE = RowsConfig(read="in_place")


def _recorded(source: Path, target: Path, config: RowsConfig = IN_PLACE) -> Path:
    """As the tasks do it: planned, each shard by itself, merged."""
    planned = plan_shards(open_source(source), str(source), config)
    parts = []
    for shard in planned:
        parts.append(target.with_name(f"{target.name}-{shard.number}"))
        with stage_artifact(parts[-1], "dataset") as staged:
            ingest_shard(shard, staged, lambda _: None)
    with stage_artifact(target, "dataset") as staged:
        merge_parts(planned, parts, staged)
    return target


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name in "ab":
        write_jsonl(
            tmp_path / "rows" / f"{name}.jsonl", [{**row(number, name), "id": f"{name}{number}"} for number in range(30)]
        )
    return tmp_path / "rows"


def test_rows_are_those_of_a_copy(source: Path, tmp_path: Path) -> None:
    """In the same splits; the artifact has a list of files alone."""
    folder = _recorded(source, tmp_path / "places")
    found, copy = (
        open_examples(where, Conversation, kind="conversation") for where in (folder, ingested(source, tmp_path / "copy"))
    )
    assert [list(found.read(split)) for split in range(found.num_splits)] == [
        list(copy.read(split)) for split in range(copy.num_splits)
    ]
    assert kind_held(folder) == "conversation"
    assert [entry.path for entry in read_manifest(folder).files] == ["content.json"]


def test_the_digest_is_of_the_content(source: Path, tmp_path: Path) -> None:
    """Touched and moved: the same data set, found where it is now. A byte: another one. The key of what is made tells the
    places apart, so that no old place is handed on."""
    before = _recorded(source, tmp_path / "before")
    (key,) = plan_shards(open_source(source), "rows", IN_PLACE)
    os.utime(source / "a.jsonl", (1, 1))
    moved = source.rename(tmp_path / "elsewhere")
    (new_key,) = plan_shards(open_source(moved), "rows", IN_PLACE)
    assert key.digest != new_key.digest
    after = _recorded(moved, tmp_path / "after")
    assert read_manifest(after).digest == read_manifest(before).digest
    assert len(list(open_examples(after, Conversation, kind="conversation").read(0))) == 30
    (moved / "a.jsonl").write_text((moved / "a.jsonl").read_text().replace("q7", "q8"))
    assert read_manifest(_recorded(moved, tmp_path / "altered")).digest != read_manifest(before).digest


def test_rows_altered_since_are_refused(source: Path, tmp_path: Path) -> None:
    found = open_examples(_recorded(source, tmp_path / "places"), Conversation, kind="conversation")
    write_jsonl(source / "b.jsonl", [row(0, "other")])
    assert len(list(found.read(0))) == 30
    with pytest.raises(DataError, match=r"b\.jsonl: was altered since it was opened"):
        list(found.read(1))


def test_a_bad_row_is_an_error_when_it_is_read(source: Path, tmp_path: Path) -> None:
    lines = (source / "a.jsonl").read_text().splitlines()
    (source / "a.jsonl").write_text("\n".join([*lines[:4], '{"messages": []}', *lines[4:]]) + "\n")
    found = open_examples(_recorded(source, tmp_path / "places"), Conversation, kind="conversation")
    with pytest.raises(DataError, match=r"a\.jsonl:5: .*correct or remove the row"):
        list(found.read(0))


def test_a_prompt_names_a_reward_that_there_is(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "q", "verifier": "none_such", "answer": "1"}])
    config = RowsConfig(kind="prompt", read="in_place", verifiers=("exact",))
    (shard,) = plan_shards(open_source(source), "prompts", config)
    with stage_artifact(tmp_path / "places", "dataset") as staged:
        ingest_shard(shard, staged, lambda _: None)
    held = kind_held(tmp_path / "places")
    assert held == "prompt"
    with pytest.raises(DataError, match="'none_such' is no reward; expected one of exact"):
        list(open_examples(tmp_path / "places", Conversation, kind=held).read(0))


def test_large_sources_are_read_in_place_by_themselves(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where bad rows shall be dropped, which only a copy can do; to ask for both is an error."""
    opened = open_source(source)
    num_bytes = sum(file.size_bytes for file in opened.files)
    for limit, bad_rows, expected in (
        (num_bytes, "refuse", "copy"),
        (num_bytes - 1, "refuse", "in_place"),
        (num_bytes - 1, "drop", "copy"),
    ):
        monkeypatch.setattr(shards, "MOST_COPIED_BYTES", limit)
        (shard,) = plan_shards(opened, "rows", RowsConfig(bad_rows=bad_rows))
        assert shard.rows.read == expected
    with pytest.raises(ConfigError, match=r"read: in_place\) can't be dropped"):
        plan_shards(opened, "rows", RowsConfig(read="in_place", bad_rows="drop"))


def test_what_needs_all_rows_asks_for_a_copy(source: Path, tmp_path: Path) -> None:
    folder = _recorded(source, tmp_path / "places")
    with pytest.raises(DataError, match="read: copy"):
        ExampleTable.open(folder, Conversation)
    with pytest.raises(DataError, match="read: copy"), stage_artifact(tmp_path / "report", "report") as staged:
        write_report(folder, staged, CleanConfig(), progress=lambda _: None)
    with pytest.raises(DataError, match="of kind 'conversation'"):
        open_examples(folder, Completion, kind="completion")

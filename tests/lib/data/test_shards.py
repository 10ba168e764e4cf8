"""Where a source is cut: everything once, in bounds, and the same cuts when files are added."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config.rows import RowsConfig
from lib.core.errors import DataError
from lib.data import shards as shards_module
from lib.data import sources_jsonl
from lib.data.shard import SourceShard
from lib.data.shards import open_shard, plan_shards
from lib.data.sources import open_source

TEXT = RowsConfig(kind="completion")


def _write(folder: Path, sizes: dict[str, int]) -> Path:
    """Files of so many rows."""
    folder.mkdir(exist_ok=True)
    for name, rows in sizes.items():
        text = "".join(json.dumps({"text": f"{name} {row}"}) + "\n" for row in range(rows))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def _plan(folder: Path, shard_bytes: int) -> list[SourceShard]:
    return plan_shards(open_source(folder), str(folder), TEXT, shard_bytes)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=12), shard_bytes=st.sampled_from([1, 300, 1000, 10_000]))
def test_shards_hold_every_split_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    _write(folder, {f"f{number:02d}": size for number, size in enumerate([1, *sizes])})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_jsonl, "SPLIT_BYTES", 200)
        source = open_source(folder)
        shards = _plan(folder, shard_bytes)
        assert [split for shard in shards for split in open_shard(shard).splits] == source.splits
        assert sum(open_shard(shard).num_files for shard in shards) == source.num_files
    for shard in shards:
        if len(shard.files) > 1:
            assert sum(file.size_bytes for file in shard.files) <= shard_bytes
    assert len({shard.digest for shard in shards}) == len(shards)


def test_small_data_is_one_shard_and_much_data_makes_larger_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _write(tmp_path / "rows", {f"f{number:03d}": 20 for number in range(100)})
    (one,) = plan_shards(open_source(folder), "rows", TEXT)
    assert (one.title, len(one.files)) == ("rows", 100)
    assert len(_plan(folder, 300)) == 100
    monkeypatch.setattr(shards_module, "MAX_SHARDS", 8)
    assert 8 <= len(_plan(folder, 300)) <= 4 * 8


def test_files_that_are_added_change_few_shards(tmp_path: Path) -> None:
    """[I9] A file at the end changes the last shard at most; one in the middle those around it."""
    names = {f"f{number:03d}": 10 for number in range(200)}
    folder = _write(tmp_path / "rows", names)
    before = [shard.digest for shard in _plan(folder, 4000)]
    assert len(before) > 20
    _write(folder, {"f200": 10})
    after = {shard.digest for shard in _plan(folder, 4000)}
    assert set(before[:-1]) <= after
    _write(folder, {"f100b": 10})
    assert len(set(before) - {shard.digest for shard in _plan(folder, 4000)}) <= 4


def test_a_shard_is_named_by_content_and_settings_and_not_by_its_place(tmp_path: Path) -> None:
    """[I1] Elsewhere: the same; a byte, another name, setting or range: another one."""
    (one,) = _plan(_write(tmp_path / "one", {"f": 5}), 1 << 20)
    (copy,) = _plan(_write(tmp_path / "copy", {"f": 5}), 1 << 20)
    assert copy.digest == one.digest
    (renamed,) = _plan(_write(tmp_path / "renamed", {"g": 5}), 1 << 20)
    (dropping,) = plan_shards(open_source(tmp_path / "one"), "one", TEXT.model_copy(update={"bad_rows": "drop"}))
    (tmp_path / "copy" / "f.jsonl").write_bytes((tmp_path / "copy" / "f.jsonl").read_bytes().replace(b"f 0", b"f 9"))
    (altered,) = _plan(tmp_path / "copy", 1 << 20)
    parts = [one.model_copy(update=span) for span in ({"first": one.first + 1}, {"stop": one.stop + 1})]
    assert len({shard.digest for shard in (one, renamed, dropping, altered, *parts)}) == 6


def test_a_file_altered_after_planning_is_refused(tmp_path: Path) -> None:
    """A key that was made of other rows must not get these."""
    (shard,) = _plan(_write(tmp_path / "rows", {"f": 5}), 1 << 20)
    _write(tmp_path / "rows", {"f": 6})
    with pytest.raises(DataError, match="was altered"):
        list(open_shard(shard).read(0))


def test_a_new_reward_changes_the_shards_of_prompts_alone(tmp_path: Path) -> None:
    """[I9] The names that a verifier may have are part of what ingesting prompts depends on."""
    _write(tmp_path / "texts", {"f": 5})
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "q", "verifier": "exact", "answer": "a"}) + "\n")
    for source, kind, changes in ((tmp_path / "texts", "completion", 1), (tmp_path / "prompts.jsonl", "prompt", 2)):
        configs = [RowsConfig(kind=kind, verifiers=names) for names in (("exact",), ("exact", "new"))]
        assert len({plan_shards(open_source(source), "rows", config)[0].digest for config in configs}) == changes

"""Laws of the order: every row once an epoch, shuffled within blocks, the same after a restart."""

import json
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.core.errors import DataError
from lib.data import shuffle
from lib.data.shuffle import MIN_SPLITS_PER_GROUP, ShuffledRows, SourceOrder, read_again, streams_per_group
from tests.lib.data.memory import MemorySource, Text, source_of

Visit = tuple[int, int, int]
"""Epoch, split, row."""


def _visits(rows: ShuffledRows, at_once: int = 7) -> Iterator[Visit]:
    while True:
        epoch = rows.epoch
        for split, row, _ in rows.take(at_once):
            yield epoch, split, row


def _epochs(rows: ShuffledRows, num_epochs: int) -> list[list[Visit]]:
    found: list[list[Visit]] = [[] for _ in range(num_epochs)]
    for visit in _visits(rows):
        if visit[0] >= num_epochs:
            break
        found[visit[0]].append(visit)
    return found


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) > 0)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from([1, 2, 4, 6, 8]), st.integers(1, 20))
def test_the_streams_of_an_epoch_visit_each_row_once(sizes: list[int], num_streams: int, shuffle_rows: int) -> None:
    """[F4] In each of three epochs, whatever the splits: few or many, some empty."""
    order = SourceOrder(source_of(sizes), "data", seed=3, num_streams=num_streams)
    seen: list[Counter[tuple[int, int]]] = [Counter() for _ in range(3)]
    for stream in range(num_streams):
        for epoch, visits in enumerate(_epochs(ShuffledRows(order, stream, shuffle_rows), 3)):
            seen[epoch].update((split, row) for _, split, row in visits)
    expected = Counter((split, row) for split, size in enumerate(sizes) for row in range(size))
    assert seen == [expected] * 3


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from([1, 4]), st.integers(1, 20), st.integers(1, 9), st.integers(0, 200))
def test_restart_at_any_row_goes_on_with_the_next(
    sizes: list[int], num_streams: int, shuffle_rows: int, at_once: int, stop: int
) -> None:
    """[F3][F4] Within a block, between blocks, splits and epochs. The state is JSON."""
    order = SourceOrder(source_of(sizes), "data", seed=0, num_streams=num_streams)
    whole, first, second = (ShuffledRows(order, num_streams - 1, shuffle_rows) for _ in range(3))
    visits = _visits(whole, 1)
    expected = [next(visits) for _ in range(stop + 50)]
    found: list[Visit] = []
    while len(found) < stop:
        epoch = first.epoch
        found += [(epoch, split, row) for split, row, _ in first.take(min(at_once, stop - len(found)))]
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    rest = _visits(second, 1)
    assert found + [next(rest) for _ in range(50)] == expected


def test_blocks_keep_rows_together_and_are_each_in_another_order() -> None:
    """One split of 30 rows in blocks of 10: rows 0 to 9 come first, not in their order, and so in each epoch anew."""
    order = SourceOrder(source_of([30]), "data", seed=0, num_streams=1)
    epochs = [[row for _, _, row in visits] for visits in _epochs(ShuffledRows(order, 0, 10), 2)]
    blocks = [epoch[start : start + 10] for epoch in epochs for start in (0, 10, 20)]
    assert [sorted(block) for block in blocks] == [list(range(start, start + 10)) for start in (0, 10, 20)] * 2
    assert len({tuple(row % 10 for row in block) for block in blocks} | {tuple(range(10))}) == 7


def test_a_block_of_one_row_keeps_the_order_of_the_split() -> None:
    order = SourceOrder(source_of([30]), "data", seed=0, num_streams=1)
    assert [row for _, _, row in _epochs(ShuffledRows(order, 0, 1), 1)[0]] == list(range(30))


def test_text_closes_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 5 characters, blocks of up to 100 rows or 20 characters: 4 rows a block. A row beyond the bound is a block."""
    monkeypatch.setattr(shuffle, "BLOCK_CHARACTERS", 20)
    order = SourceOrder(source_of([12]), "data", seed=0, num_streams=1)
    rows = [row for _, _, row in _epochs(ShuffledRows(order, 0, 100), 1)[0]]
    assert [sorted(rows[start : start + 4]) for start in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    long = SourceOrder(MemorySource([[Text("a", 50), Text("b", 50)]]), "data", seed=0, num_streams=1)
    cursor = ShuffledRows(long, 0, 100)
    assert [len(cursor.take(100)) for _ in range(4)] == [1, 1, 1, 1]


def test_seed_name_and_number_of_streams_change_the_order() -> None:
    orders = set()
    for name, seed, num_streams in [("a", 0, 1), ("b", 0, 1), ("a", 1, 1), ("a", 0, 2)]:
        order = SourceOrder(source_of([8] * 20), name, seed=seed, num_streams=num_streams)
        orders.add(tuple(_epochs(ShuffledRows(order, 0, 64), 1)[0]))
    assert len(orders) == 4


def test_a_source_smaller_than_the_streams_feeds_them_all() -> None:
    """[B8] One row, eight streams: in some epoch it is each stream's turn."""
    order = SourceOrder(source_of([1]), "data", seed=0, num_streams=8)
    for stream in range(8):
        visits = _visits(ShuffledRows(order, stream, 4))
        assert [next(visits)[1:] for _ in range(3)] == [(0, 0)] * 3


@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0]])
def test_a_source_without_rows_is_refused(sizes: list[int]) -> None:
    """[A17] Not with an endless search."""
    with pytest.raises(DataError, match=r"source 'data' (holds no rows|has no rows for stream 0 of 4)"):
        next(_visits(ShuffledRows(SourceOrder(source_of(sizes), "data", seed=0, num_streams=4), 0, 4)))


def test_as_few_streams_share_splits_as_fill_the_groups() -> None:
    """Worked out: 64 streams. From 256 splits on none shares; 64 splits need groups of 4; one split is shared by all."""
    assert [streams_per_group(splits, 64) for splits in (1000, 256, 255, 64, 63, 4, 1)] == [1, 1, 2, 4, 8, 64, 64]
    for num_streams in (1, 6, 64):
        for num_splits in range(1, 300):
            share = streams_per_group(num_splits, num_streams)
            assert num_streams % share == 0
            assert share == num_streams or num_splits >= MIN_SPLITS_PER_GROUP * num_streams // share


def test_rows_are_found_again_by_their_places() -> None:
    order = SourceOrder(source_of([20, 30]), "data", seed=0, num_streams=4)
    places = [(0, 3), (1, 29), (0, 19), (1, 0), (0, 4)]
    found = read_again(order, places)
    assert {place: text.sample_id for place, text in found.items()} == {
        (0, 3): "r3", (1, 29): "r49", (0, 19): "r19", (1, 0): "r20", (0, 4): "r4",
    }  # fmt: skip

"""Laws of the packer: nothing lost, split or too long; bounded; exact after a restart; the tightest fit."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.packing import BestFitPacker, OpenPack, Pack, longest_first, plan_packs
from tests.campaigns import check_packs, random_lists

NUM_LISTS = 10_000
NO_DELAY = 1 << 30


def test_no_token_lost_doubled_or_too_many_on_random_lists() -> None:
    """[B5] The packs of a list are a partition of its items, none over the capacity, `num_free` exact, none kept too long.
    `python -m tests.campaigns packing` does so with a million lists."""
    for case in random_lists(NUM_LISTS, seed=0):
        check_packs(case)


@pytest.mark.parametrize("length", [0, -1, 17, 160])
def test_item_that_fits_no_pack_is_refused(length: int) -> None:
    """[B5] Lengths 0, L + 1 and 10 L: never split, never dropped; the items before it are kept."""
    packer: BestFitPacker[str] = BestFitPacker(16, 2, NO_DELAY)
    with pytest.raises(ValueError, match=f"{length} tokens"):
        packer.extend([3, length], ["good", "bad"])
    assert packer.flush() == [Pack(["good"], 13)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=60), st.integers(1, 6), st.integers(1, 30), st.integers(0, 60))
def test_restart_between_any_two_items_changes_nothing(lengths: list[int], open_packs: int, max_delay: int, cut: int) -> None:
    whole: BestFitPacker[int] = BestFitPacker(32, open_packs, max_delay)
    expected = whole.extend(lengths, range(len(lengths))) + whole.flush()
    before: BestFitPacker[int] = BestFitPacker(32, open_packs, max_delay)
    found = before.extend(lengths[:cut], range(len(lengths))[:cut])
    after: BestFitPacker[int] = BestFitPacker(32, open_packs, max_delay)
    packs, num_placed = json.loads(json.dumps([before.open(), before.num_placed]))
    after.load([OpenPack(*pack) for pack in packs], num_placed)
    for ref in range(len(lengths))[cut:]:
        found += after.add(lengths[ref], ref)
    assert found + after.flush() == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=80), st.integers(1, 6), st.integers(1, 40))
def test_packs_are_those_of_a_plain_best_fit(lengths: list[int], open_packs: int, max_delay: int) -> None:
    """The same rooms, item by item, as searching a list of open packs for the tightest fit; never more of them open, and
    none that was opened more than `max_delay` items ago; each turn closes those that the next turn would find too late."""
    packer: BestFitPacker[int] = BestFitPacker(32, open_packs, max_delay)
    turn = max(1, max_delay // 8)
    rooms: list[tuple[int, int]] = []
    for ref, length in enumerate(lengths):
        late = {opened for _, opened in rooms if ref % turn == 0 and ref + turn - 1 - opened > max_delay}
        closed = [room for room, opened in sorted(rooms, key=lambda pack: pack[1]) if opened in late]
        rooms = [(room, opened) for room, opened in rooms if opened not in late]
        assert all(ref - opened <= max_delay for _, opened in rooms)
        fitting = [pack for pack in rooms if pack[0] >= length]
        if fitting:
            rooms.remove(min(fitting))
            left, opened = min(fitting)[0] - length, min(fitting)[1]
        else:
            left, opened = 32 - length, ref
            if left and len(rooms) == open_packs:
                closed.append(min(rooms)[0])
                rooms.remove(min(rooms))
        if left:
            rooms.append((left, opened))
        else:
            closed.append(0)
        assert [pack.num_free for pack in packer.add(length, ref)] == closed
        assert len(rooms) <= open_packs
        assert [(pack.room, pack.age - 1) for pack in packer.open()] == sorted(rooms, key=lambda pack: pack[1])


def test_settings_below_one_are_refused() -> None:
    for values in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            BestFitPacker[int](*values)


@pytest.mark.parametrize("open_packs", [1, 16, 64])
def test_plan_is_a_partition_into_packs_that_fit(open_packs: int) -> None:
    source = np.random.default_rng(1)
    for num_items in (0, 1, 5, 3000):
        lengths = source.integers(1, 257, num_items)
        plan = plan_packs(lengths, 256, open_packs, max_delay=40)
        assert sorted(plan.order.tolist()) == list(range(num_items))
        assert plan.offsets[0] == 0 and plan.offsets[-1] == num_items
        for start, stop in pairwise(plan.offsets.tolist()):
            assert 0 < lengths[plan.order[start:stop]].sum() <= 256


@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0])
def test_lognormal_lengths_fill_998_of_1000_slots(sigma: float) -> None:
    source = np.random.default_rng(0)
    lengths = np.clip(source.lognormal(np.log(600) - sigma**2 / 2, sigma, 100_000), 1, 4096).astype(np.int64)
    plan = plan_packs(lengths, 4096, open_packs=128, max_delay=1024)
    assert lengths.sum() / (4096 * (len(plan.offsets) - 1)) >= 0.998


def test_longest_first_keeps_windows_apart() -> None:
    """Windows of 3 of [1 2 3 | 9 9 8 | 5]: by falling length, equal ones in their order."""
    assert longest_first(np.array([1, 2, 3, 9, 9, 8, 5]), 3).tolist() == [2, 1, 0, 3, 4, 5, 6]
    assert Counter(longest_first(np.array([], dtype=np.int64), 3).tolist()) == Counter()

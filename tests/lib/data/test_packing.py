"""Laws of the packer: nothing lost, split or too long; bounded; exact after a restart; the tightest fit."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.packing import BestFitPacker, Pack, longest_first, plan_packs

NUM_LISTS = 100_000


def _random_lists(num_lists: int, seed: int) -> list[tuple[int, int, list[int]]]:
    """(capacity, open packs, lengths): lists of 0 to 12 items, with 1, capacity and its neighbours common."""
    source = np.random.default_rng(seed)
    capacities, open_packs = source.integers(1, 65, num_lists), source.integers(1, 9, num_lists)
    sizes = source.integers(0, 13, num_lists)
    lengths = 1 + (source.random(sizes.sum()) ** 2 * np.repeat(capacities, sizes)).astype(np.int64)
    special = np.stack([np.ones_like(lengths), np.repeat(capacities, sizes), np.maximum(1, np.repeat(capacities, sizes) - 1)])
    choice = source.integers(0, 12, len(lengths))
    lengths = np.where(choice < 3, special[np.minimum(choice, 2), np.arange(len(lengths))], lengths)
    lists = np.split(np.minimum(lengths, np.repeat(capacities, sizes)), np.cumsum(sizes)[:-1])
    return [(c, o, part.tolist()) for c, o, part in zip(capacities.tolist(), open_packs.tolist(), lists)]


def test_no_token_lost_doubled_or_too_many_on_100_000_lists() -> None:
    """[B5] The packs of a list are a partition of its items, none over the capacity, `num_free` exact."""
    for capacity, open_packs, lengths in _random_lists(NUM_LISTS, seed=0):
        packer: BestFitPacker[int] = BestFitPacker(capacity, open_packs)
        packs = packer.extend(lengths, range(len(lengths))) + packer.flush()
        assert sorted(ref for pack in packs for ref in pack.refs) == list(range(len(lengths)))
        for refs, num_free in packs:
            assert refs and capacity - sum(lengths[ref] for ref in refs) == num_free >= 0


@pytest.mark.parametrize("length", [0, -1, 17, 160])
def test_item_that_fits_no_pack_is_refused(length: int) -> None:
    """[B5] Lengths 0, L + 1 and 10 L: never split, never dropped; the items before it are kept."""
    packer: BestFitPacker[str] = BestFitPacker(16, 2)
    with pytest.raises(ValueError, match=f"{length} tokens"):
        packer.extend([3, length], ["good", "bad"])
    assert packer.flush() == [Pack(["good"], 13)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=60), st.integers(1, 6), st.integers(0, 60))
def test_restart_between_any_two_items_changes_nothing(lengths: list[int], open_packs: int, cut: int) -> None:
    whole: BestFitPacker[int] = BestFitPacker(32, open_packs)
    expected = whole.extend(lengths, range(len(lengths))) + whole.flush()
    before: BestFitPacker[int] = BestFitPacker(32, open_packs)
    found = before.extend(lengths[:cut], range(len(lengths))[:cut])
    after: BestFitPacker[int] = BestFitPacker(32, open_packs)
    after.load_state(json.loads(json.dumps(before.state())))
    for ref in range(len(lengths))[cut:]:
        found += after.add(lengths[ref], ref)
    assert found + after.flush() == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=80), st.integers(1, 6))
def test_packs_are_those_of_a_plain_best_fit(lengths: list[int], open_packs: int) -> None:
    """The same rooms, item by item, as searching a list of open packs for the tightest fit; never more of them open."""
    packer: BestFitPacker[int] = BestFitPacker(32, open_packs)
    rooms: list[int] = []
    for ref, length in enumerate(lengths):
        fitting = [room for room in rooms if room >= length]
        closed = []
        if fitting:
            rooms.remove(min(fitting))
            left = min(fitting) - length
        else:
            left = 32 - length
            if left and len(rooms) == open_packs:
                closed = [min(rooms)]
                rooms.remove(min(rooms))
        if left:
            rooms.append(left)
        else:
            closed.append(0)
        assert [pack.num_free for pack in packer.add(length, ref)] == closed
        assert len(rooms) <= open_packs
        assert sorted(room for room, _ in packer.state()["packs"]) == sorted(rooms)


def test_state_of_another_packer_is_refused() -> None:
    state = BestFitPacker[int](16, 2).state()
    for other in (BestFitPacker[int](17, 2), BestFitPacker[int](16, 3)):
        with pytest.raises(ValueError, match="the state is of a packer"):
            other.load_state(state)


@pytest.mark.parametrize("open_packs", [1, 16, 64])
def test_plan_is_a_partition_into_packs_that_fit(open_packs: int) -> None:
    source = np.random.default_rng(1)
    for num_items in (0, 1, 5, 3000):
        lengths = source.integers(1, 257, num_items)
        plan = plan_packs(lengths, 256, open_packs)
        assert sorted(plan.order.tolist()) == list(range(num_items))
        assert plan.offsets[0] == 0 and plan.offsets[-1] == num_items
        for start, stop in pairwise(plan.offsets.tolist()):
            assert 0 < lengths[plan.order[start:stop]].sum() <= 256


@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0])
def test_lognormal_lengths_fill_998_of_1000_slots(sigma: float) -> None:
    source = np.random.default_rng(0)
    lengths = np.clip(source.lognormal(np.log(600) - sigma**2 / 2, sigma, 100_000), 1, 4096).astype(np.int64)
    plan = plan_packs(lengths, 4096, open_packs=128)
    assert lengths.sum() / (4096 * (len(plan.offsets) - 1)) >= 0.998


def test_longest_first_keeps_windows_apart() -> None:
    """Windows of 3 of [1 2 3 | 9 9 8 | 5]: by falling length, equal ones in their order."""
    assert longest_first(np.array([1, 2, 3, 9, 9, 8, 5]), 3).tolist() == [2, 1, 0, 3, 4, 5, 6]
    assert Counter(longest_first(np.array([], dtype=np.int64), 3).tolist()) == Counter()

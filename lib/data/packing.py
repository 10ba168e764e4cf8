"""Online best-fit packing with a bounded number of open packs.

The open packs are one sorted list of integers, room left << 40 | age, so that the best fit for an item is found by one
bisection and moved by one insertion, both in C. With the few open packs that are needed (16 to 256) this is faster than
a bitset over the rooms, and its cost doesn't grow with the capacity.
"""

import gc
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Generic, NamedTuple, TypeVar

import numpy as np

Ref = TypeVar("Ref")

_AGE_BITS = 40
_AGE_MASK = (1 << _AGE_BITS) - 1


class Pack(NamedTuple, Generic[Ref]):
    """A closed pack."""

    refs: list[Ref]
    """The items, in the order they were added."""
    num_free: int
    """Tokens of the capacity that no item fills."""


class OpenPack(NamedTuple, Generic[Ref]):
    """A pack that may take further items."""

    age: int
    """Number of its first item."""
    room: int
    """Tokens of the capacity that are free."""
    refs: list[Ref]


class Snapshot(NamedTuple, Generic[Ref]):
    """A packer's open packs, not yet put together."""

    keys: tuple[int, ...]
    items: tuple[tuple[int, list[Ref]], ...]
    """Age and items of each pack; more may have been appended since."""
    sizes: tuple[int, ...]
    """Of the lists of items at the time."""

    def packs(self) -> list[OpenPack[Ref]]:
        """The oldest first."""
        room_of = {key & _AGE_MASK: key >> _AGE_BITS for key in self.keys}
        return [OpenPack(age, room_of[age], refs[:size]) for (age, refs), size in zip(self.items, self.sizes)]


class BestFitPacker(Generic[Ref]):
    """Puts each item into the open pack it fills best, of equal ones the oldest; where none has room, opens one.

    A pack closes when it is full, when it is the fullest of `open_packs` and room for a new one is needed, or before
    `max_delay` further items have been placed since its first: every `max_delay` / 8 items those close that would be kept
    longer before the next such turn. So what is held and for how long is bounded, and which packs come out is a function of
    the items and their order alone. No item is ever split.
    """

    def __init__(self, capacity: int, open_packs: int, max_delay: int) -> None:
        if capacity < 1 or open_packs < 1 or max_delay < 1:
            raise ValueError(f"capacity ({capacity}), open_packs ({open_packs}) and max_delay ({max_delay}) must be at least 1")
        self.capacity = capacity
        self.open_packs = open_packs
        self.max_delay = max_delay
        self._turn = max(1, max_delay // 8)
        self._keys: list[int] = []
        """Sorted: room << _AGE_BITS | age of each open pack."""
        self._items: dict[int, list[Ref]] = {}
        """Age -> items of each open pack, the oldest first. The age of a pack is the number of its first item."""
        self.num_placed = 0
        """Items so far."""

    def add(self, length: int, ref: Ref) -> list[Pack[Ref]]:
        """Place one item of `length` tokens; returns the packs (none, or one) that this closed."""
        return self.extend((length,), (ref,))

    def extend(self, lengths: Iterable[int], refs: Iterable[Ref]) -> list[Pack[Ref]]:
        """Place items one after the other; returns the packs that closed, in the order of their closing.

        Raises:
            ValueError: a length is below 1 or above the capacity; the items before it have been placed.
        """
        closed: list[Pack[Ref]] = []
        pairs = zip(lengths, refs)
        while part := list(islice(pairs, self._turn - self.num_placed % self._turn)):
            if self.num_placed % self._turn == 0:
                self._close_late(closed)
            self._place(part, closed)
        return closed

    def flush(self) -> list[Pack[Ref]]:
        """Close all open packs, the fullest first."""
        closed = [Pack(self._items[key & _AGE_MASK], key >> _AGE_BITS) for key in self._keys]
        self._keys.clear()
        self._items.clear()
        return closed

    def open(self) -> list[OpenPack[Ref]]:
        """The open packs, the oldest first: with `num_placed`, everything that decides what comes next."""
        return self.snapshot().packs()

    def snapshot(self) -> "Snapshot[Ref]":
        """The open packs as they are now; taken in a few copies, for a position after every row."""
        # A list of items only ever grows, so its length tells what it was.
        return Snapshot(tuple(self._keys), tuple(self._items.items()), tuple(map(len, self._items.values())))

    def load(self, packs: Sequence[OpenPack[Ref]], num_placed: int) -> None:
        """Go on exactly where a packer of the same settings had these open packs."""
        self.num_placed = num_placed
        self._items = {pack.age: list(pack.refs) for pack in packs}
        self._keys = sorted(pack.room << _AGE_BITS | pack.age for pack in packs)

    def _place(self, part: Sequence[tuple[int, Ref]], closed: list[Pack[Ref]]) -> None:
        keys, items, capacity, first = self._keys, self._items, self.capacity, self.num_placed + 1
        self.num_placed += len(part)
        for number, (length, ref) in enumerate(part, start=first):
            needed = length << _AGE_BITS
            best = bisect_left(keys, needed)
            if best < len(keys) and length > 0:
                key = keys.pop(best) - needed
                if key > _AGE_MASK:
                    items[key & _AGE_MASK].append(ref)
                    insort(keys, key, 0, best)
                else:
                    full = items.pop(key)
                    full.append(ref)
                    closed.append(Pack(full, 0))
                continue
            if not 0 < length <= capacity:
                self.num_placed = number - 1
                raise ValueError(f"an item of {length} tokens doesn't fit a pack of {capacity}: {ref!r}")
            if length == capacity:
                closed.append(Pack([ref], 0))
                continue
            if len(keys) == self.open_packs:
                key = keys.pop(0)
                closed.append(Pack(items.pop(key & _AGE_MASK), key >> _AGE_BITS))
            items[number] = [ref]
            insort(keys, (capacity - length) << _AGE_BITS | number)

    def _close_late(self, closed: list[Pack[Ref]]) -> None:
        """Close the packs that would be kept too long before the next turn, the oldest first."""
        oldest = self.num_placed + self._turn - self.max_delay
        late = sorted((key & _AGE_MASK, key >> _AGE_BITS) for key in self._keys if key & _AGE_MASK < oldest)
        if late:
            self._keys[:] = [key for key in self._keys if key & _AGE_MASK >= oldest]
            closed += [Pack(self._items.pop(age), room) for age, room in late]


@dataclass(frozen=True)
class PackPlan:
    """Packs of a known list of items, as arrays."""

    order: np.ndarray
    """[num_items] int64 item numbers, pack after pack."""
    offsets: np.ndarray
    """[num_packs + 1] int64: pack p holds order[offsets[p]:offsets[p + 1]]."""


def plan_packs(lengths: np.ndarray, capacity: int, open_packs: int, max_delay: int) -> PackPlan:
    """Pack a whole list of items; the garbage collector rests meanwhile, since nothing here makes cycles and its walks over
    the packs take as long as making them.

    Items are taken in windows of `open_packs`, the longest of a window first: short ones are kept for the gaps. Those in
    packs still open at the end are packed once more in the same way.

    Args:
        lengths: [num_items] tokens of each item, 1 to `capacity`.
    """
    with _without_collections():
        packer: BestFitPacker[int] = BestFitPacker(capacity, open_packs, max_delay)
        order = longest_first(lengths, open_packs)
        packs = packer.extend(lengths[order].tolist(), order.tolist())
        left = np.array([ref for pack in packer.flush() for ref in pack.refs], dtype=np.int64)
        left = left[longest_first(lengths[left], max(1, len(left)))]
        packs += packer.extend(lengths[left].tolist(), left.tolist()) + packer.flush()
        packed = np.fromiter(chain.from_iterable(pack.refs for pack in packs), dtype=np.int64, count=len(lengths))
        sizes = np.fromiter((len(pack.refs) for pack in packs), dtype=np.int64, count=len(packs))
    return PackPlan(packed, np.concatenate(([0], np.cumsum(sizes))))


@contextmanager
def _without_collections() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def longest_first(lengths: np.ndarray, window: int) -> np.ndarray:
    """[num_items] int64 item numbers: window after window, within one by falling length and then by number."""
    num_whole = len(lengths) // window * window
    whole, rest = lengths[:num_whole].reshape(-1, window), lengths[num_whole:]
    in_whole = np.argsort(-whole, axis=1, kind="stable") + np.arange(0, num_whole, window)[:, None]
    order: np.ndarray = np.concatenate((in_whole.ravel(), np.argsort(-rest, kind="stable") + num_whole))
    return order

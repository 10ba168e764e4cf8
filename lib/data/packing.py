"""Online best-fit packing with a bounded number of open packs.

The packs that are open are kept in buckets by the room they have left, and an integer has bit r set where bucket r holds
a pack. The best fit for an item of n tokens is then the lowest set bit at or above n: two operations on an integer of
`capacity` bits, whatever the number of packs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

Ref = TypeVar("Ref")


class Pack(NamedTuple, Generic[Ref]):
    """A closed pack."""

    refs: list[Ref]
    """The items, in the order they were added."""
    num_free: int
    """Tokens of the capacity that no item fills."""


class BestFitPacker(Generic[Ref]):
    """Puts each item into the open pack it fills best; where none has room, opens one.

    A pack closes when it is full, or when it is the fullest of `open_packs` and room for a new one is needed. So what is
    held is bounded, and which packs come out is a function of the items and their order alone. No item is ever split.
    """

    def __init__(self, capacity: int, open_packs: int) -> None:
        if capacity < 1 or open_packs < 1:
            raise ValueError(f"capacity ({capacity}) and open_packs ({open_packs}) must be at least 1")
        self.capacity = capacity
        self.open_packs = open_packs
        self._buckets: list[list[list[Ref]]] = [[] for _ in range(capacity + 1)]
        """[capacity + 1] open packs (lists of items) by room left; the last of a bucket is used first."""
        self._occupied = 0
        """Bit r is set where bucket r is not empty."""
        self._num_open = 0

    def add(self, length: int, ref: Ref) -> list[Pack[Ref]]:
        """Place one item of `length` tokens; returns the packs (none, or one) that this closed."""
        return self.extend((length,), (ref,))

    def extend(self, lengths: Iterable[int], refs: Iterable[Ref]) -> list[Pack[Ref]]:
        """Place items one after the other; returns the packs that closed, in the order of their closing.

        Raises:
            ValueError: a length is below 1 or above the capacity; the items before it have been placed.
        """
        buckets, occupied, num_open, capacity = self._buckets, self._occupied, self._num_open, self.capacity
        closed: list[Pack[Ref]] = []
        try:
            for length, ref in zip(lengths, refs):
                if not 0 < length <= capacity:
                    raise ValueError(f"an item of {length} tokens doesn't fit a pack of {capacity}: {ref!r}")
                fitting = occupied >> length
                if fitting:
                    # x & -x is the lowest set bit of x.
                    room = length + (fitting & -fitting).bit_length() - 1
                    bucket = buckets[room]
                    pack = bucket.pop()
                    if not bucket:
                        occupied ^= 1 << room
                    pack.append(ref)
                    room -= length
                    if not room:
                        num_open -= 1
                        closed.append(Pack(pack, 0))
                        continue
                else:
                    pack, room = [ref], capacity - length
                    if not room:
                        closed.append(Pack(pack, 0))
                        continue
                    if num_open == self.open_packs:
                        fullest = (occupied & -occupied).bit_length() - 1
                        bucket = buckets[fullest]
                        closed.append(Pack(bucket.pop(), fullest))
                        if not bucket:
                            occupied ^= 1 << fullest
                    else:
                        num_open += 1
                bucket = buckets[room]
                if not bucket:
                    occupied |= 1 << room
                bucket.append(pack)
        finally:
            self._occupied, self._num_open = occupied, num_open
        return closed

    def flush(self) -> list[Pack[Ref]]:
        """Close all open packs, the fullest first."""
        closed = [Pack(pack, room) for room, bucket in enumerate(self._buckets) for pack in reversed(bucket)]
        for bucket in self._buckets:
            bucket.clear()
        self._occupied = self._num_open = 0
        return closed

    def state(self) -> dict[str, Any]:
        """Everything that decides what comes next; JSON if the refs are."""
        packs = [[room, list(pack)] for room, bucket in enumerate(self._buckets) if bucket for pack in bucket]
        return {"capacity": self.capacity, "open_packs": self.open_packs, "packs": packs}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises:
            ValueError: the state is of a packer of another capacity or number of open packs.
        """
        if (state["capacity"], state["open_packs"]) != (self.capacity, self.open_packs):
            raise ValueError(
                f"the state is of a packer with capacity {state['capacity']} and {state['open_packs']} open packs, "
                f"this one has {self.capacity} and {self.open_packs}"
            )
        self.flush()
        for room, refs in state["packs"]:
            self._buckets[room].append(list(refs))
            self._occupied |= 1 << room
        self._num_open = len(state["packs"])


@dataclass(frozen=True)
class PackPlan:
    """Packs of a known list of items, as arrays."""

    order: np.ndarray
    """[num_items] int64 item numbers, pack after pack."""
    offsets: np.ndarray
    """[num_packs + 1] int64: pack p holds order[offsets[p]:offsets[p + 1]]."""


def plan_packs(lengths: np.ndarray, capacity: int, open_packs: int) -> PackPlan:
    """Pack a whole list of items.

    Items are taken in windows of `open_packs`, the longest of a window first: short ones are kept for the gaps. Those in
    packs still open at the end are packed once more in the same way.

    Args:
        lengths: [num_items] tokens of each item, 1 to `capacity`.
    """
    packer: BestFitPacker[int] = BestFitPacker(capacity, open_packs)
    order = longest_first(lengths, open_packs)
    packs = packer.extend(lengths[order].tolist(), order.tolist())
    left = np.array([ref for pack in packer.flush() for ref in pack.refs], dtype=np.int64)
    left = left[longest_first(lengths[left], max(1, len(left)))]
    packs += packer.extend(lengths[left].tolist(), left.tolist()) + packer.flush()
    packed = np.fromiter(chain.from_iterable(pack.refs for pack in packs), dtype=np.int64, count=len(lengths))
    sizes = np.fromiter((len(pack.refs) for pack in packs), dtype=np.int64, count=len(packs))
    return PackPlan(packed, np.concatenate(([0], np.cumsum(sizes))))


def longest_first(lengths: np.ndarray, window: int) -> np.ndarray:
    """[num_items] int64 item numbers: window after window, within one by falling length and then by number."""
    order: np.ndarray = np.lexsort((-lengths, np.arange(len(lengths)) // window))
    return order

"""Which block of a whole tensor a rank holds, and which of the ranks that hold the same block writes it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from lib.core.manifest import canonical_json
from lib.parallel.reduce import all_reduce_sum
from lib.train.collect import gather_texts


@dataclass(frozen=True)
class Box:
    """A block of a tensor with any number of dimensions; of a scalar, both tuples are empty."""

    offset: tuple[int, ...]
    """Where it begins in the whole."""
    shape: tuple[int, ...]

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(start + size for start, size in zip(self.offset, self.shape))

    @property
    def is_empty(self) -> bool:
        return 0 in self.shape

    def overlap(self, other: "Box") -> "Box | None":
        """What both hold; None if that is nothing."""
        begin = tuple(map(max, self.offset, other.offset))
        shape = tuple(min(ends) - start for start, *ends in zip(begin, self.end, other.end))
        return Box(begin, shape) if all(size > 0 for size in shape) else None

    def minus(self, inner: "Box") -> "list[Box]":
        """Boxes that together hold all of this one but `inner`, which lies in it: at most two a dimension."""
        left: list[Box] = []
        begin, end = list(self.offset), list(self.end)
        for dim, (start, stop) in enumerate(zip(inner.offset, inner.end)):
            for low, high in ((begin[dim], start), (stop, end[dim])):
                if low < high:
                    offset, ends = [*begin[:dim], low, *begin[dim + 1 :]], [*end[:dim], high, *end[dim + 1 :]]
                    left.append(Box(tuple(offset), tuple(e - b for b, e in zip(offset, ends))))
            begin[dim], end[dim] = start, stop
        return left

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """Slices that take this box out of a tensor that holds `outer`."""
        return tuple(slice(b - o, e - o) for b, e, o in zip(self.offset, self.end, outer.offset))


class Replicas:
    """Of the boxes that several ranks hold, such as those of a replicated mesh axis, the lowest rank writes each."""

    def __init__(self) -> None:
        self._held: Mapping[str, Box] | None = None
        self._mine: frozenset[str] = frozenset()

    def to_write(self, held: Mapping[str, Box]) -> frozenset[str]:
        """Names of the boxes that this rank writes: all, where it is alone.

        All ranks must call it; the boxes travel only when any has changed.
        """
        if all_reduce_sum({"changed": float(held != self._held)})["changed"]:
            text = canonical_json({name: [box.offset, box.shape] for name, box in held.items()})
            ranks = [_boxes(json.loads(each)) for each in gather_texts(text)]
            self._mine = boxes_to_write(ranks, dist.get_rank() if len(ranks) > 1 else 0)
            self._held = dict(held)
        return self._mine


def boxes_to_write(held: Sequence[Mapping[str, Box]], rank: int) -> frozenset[str]:
    """Of the boxes [num_ranks] by name, those that `rank` holds and no lower rank does."""
    return frozenset(name for name, box in held[rank].items() if all(lower.get(name) != box for lower in held[:rank]))


def _boxes(plain: Mapping[str, list[list[int]]]) -> dict[str, Box]:
    return {name: Box(tuple(offset), tuple(shape)) for name, (offset, shape) in plain.items()}

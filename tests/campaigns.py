"""Laws tried at a size that the suite has no time for: `python -m tests.campaigns packing [--lists 1000000]`."""

import argparse
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lib.data.packing import BestFitPacker, OpenPack


class PackingCase(NamedTuple):
    """A list of items and the packer it is given to."""

    capacity: int
    open_packs: int
    max_delay: int
    lengths: list[int]


def random_lists(num_lists: int, seed: int) -> Iterator[PackingCase]:
    """Lists of 0 to 12 items, with 1, the capacity and its neighbour common."""
    source = np.random.default_rng(seed)
    capacities, open_packs = source.integers(1, 65, num_lists), source.integers(1, 9, num_lists)
    max_delays, sizes = source.integers(1, 17, num_lists), source.integers(0, 13, num_lists)
    capacity_of = np.repeat(capacities, sizes)
    lengths = 1 + (source.random(sizes.sum()) ** 2 * capacity_of).astype(np.int64)
    special = np.stack([np.ones_like(lengths), capacity_of, np.maximum(1, capacity_of - 1)])
    choice = source.integers(0, 12, len(lengths))
    lengths = np.where(choice < 3, special[np.minimum(choice, 2), np.arange(len(lengths))], lengths)
    lists = np.split(np.minimum(lengths, capacity_of), np.cumsum(sizes)[:-1])
    for capacity, num_open, max_delay, part in zip(capacities.tolist(), open_packs.tolist(), max_delays.tolist(), lists):
        yield PackingCase(capacity, num_open, max_delay, part.tolist())


def check_packs(case: PackingCase) -> None:
    """The packs are a partition of the items, none over the capacity, room exact; bounded in number and in delay."""
    packer: BestFitPacker[int] = BestFitPacker(case.capacity, case.open_packs, case.max_delay)
    packs = []
    for ref, length in enumerate(case.lengths):
        packs += packer.add(length, ref)
        still_open: list[OpenPack[int]] = packer.open()
        assert len(still_open) <= case.open_packs
        assert all(ref - pack.refs[0] <= case.max_delay for pack in still_open)
    packs += packer.flush()
    assert sorted(ref for pack in packs for ref in pack.refs) == list(range(len(case.lengths)))
    for refs, num_free in packs:
        assert refs and case.capacity - sum(case.lengths[ref] for ref in refs) == num_free >= 0
        assert refs[-1] - refs[0] <= case.max_delay


def packing(num_lists: int) -> None:
    start = time.perf_counter()
    at_once = 50_000
    for done in range(0, num_lists, at_once):
        for case in random_lists(min(at_once, num_lists - done), seed=done):
            check_packs(case)
        print(f"{min(done + at_once, num_lists):,} lists, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(f"packing: {num_lists:,} random lists, no token lost, doubled or split, no pack over its capacity or kept too long")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns")
    commands = parser.add_subparsers(dest="name", required=True)
    commands.add_parser("packing").add_argument("--lists", type=int, default=1_000_000)
    options = parser.parse_args()
    if options.name == "packing":
        packing(options.lists)


if __name__ == "__main__":
    main()

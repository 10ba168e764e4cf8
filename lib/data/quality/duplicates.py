"""Rows that are there already: exactly, or nearly.

Near duplicates are looked for with MinHash signatures cut into bands (locality-sensitive hashing; Broder 1997, Leskovec et
al., Mining of Massive Datasets, chapter 3), and every suspect is then compared in full. So a row is dropped only if it is as
similar as asked to an earlier row that is kept; of such rows at least RECALL are found, as long as no more than BUCKET_ROWS
different rows share a band. A row costs its content digest, its bands and a byte of each hash (Li and Koenig, b-bit minwise
hashing, 2010), some 310 bytes at a similarity of 0.8, however long it is: an index of Python objects would cost kilobytes.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np

from lib.core.examples import Example
from lib.data.quality.text import content_digest, is_compared, mixed, parts, sequences, words

NUM_HASHES = 128
RECALL = 0.995
"""Of two rows of exactly the asked similarity, the least chance to be found; more alike ones are found more surely."""
BUCKET_ROWS = 4096
"""Rows with a common band that a further one is compared with: the first. So rows of one template don't cost the square of
their number."""
_MARGIN = 0.15
"""Below the asked similarity, where a row's estimate ends its comparison: more than 4 standard deviations of the estimate."""
_HASHED_AT_ONCE = 4096
_SETS_KEPT = 1024
_SEEDS = mixed(np.arange(1, NUM_HASHES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


class Rows(Protocol):
    """Examples that can be read again by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Duplicates:
    """Gathers what is needed of each row, in order, then tells which are there already."""

    def __init__(self, *, similarity: float, sequence_words: int) -> None:
        self._similarity, self._sequence_words = similarity, sequence_words
        self._rows_in_band = rows_in_band(similarity)
        self._digests = bytearray()
        self._bands, self._sketches = bytearray(), bytearray()

    def add(self, example: Example) -> None:
        """Take note of the next row."""
        signed = signature(self._set_of(example))
        self._digests += content_digest(example)
        self._bands += bands(signed, self._rows_in_band).tobytes()
        self._sketches += signed.astype(np.uint8).tobytes()

    def exact(self) -> np.ndarray:
        """[num_rows] bool, True on a row whose content an earlier one has."""
        digests = np.frombuffer(bytes(self._digests), dtype="V16")
        _, first = np.unique(digests, return_index=True)
        found = np.ones(len(digests), np.bool_)
        found[first] = False
        return found

    def near(self, rows: Rows, dropped: np.ndarray) -> np.ndarray:
        """[num_rows] bool, True on a row like an earlier one that is neither among `dropped` nor itself such a row.

        Reads suspects again from `rows`, those that were added.
        """
        found = np.zeros(len(rows), np.bool_)
        buckets = self._shared_bands(dropped)
        kept: dict[int, list[int]] = defaultdict(list)
        set_of: Callable[[int], np.ndarray] = lru_cache(_SETS_KEPT)(lambda index: self._set_of(rows[index]))
        for index in sorted(buckets):
            suspects = self._likely(index, sorted({other for bucket in buckets[index] for other in kept[bucket]}))
            own = set_of(index) if suspects else None
            if own is not None and len(own) and any(jaccard(own, set_of(other)) >= self._similarity for other in suspects):
                found[index] = True
                continue
            for bucket in buckets[index]:
                if len(kept[bucket]) < BUCKET_ROWS:
                    kept[bucket].append(index)
        return found

    def _likely(self, index: int, earlier: list[int]) -> list[int]:
        """Those of the earlier rows that may be similar enough by their sketches, the most alike first."""
        if not earlier:
            return earlier
        sketches = np.frombuffer(self._sketches, np.uint8).reshape(-1, NUM_HASHES)
        estimates = np.mean(sketches[earlier] == sketches[index], axis=1)
        order = np.argsort(-estimates, kind="stable")
        return [earlier[at] for at in order.tolist() if estimates[at] >= self._similarity - _MARGIN]

    def _shared_bands(self, dropped: np.ndarray) -> dict[int, list[int]]:
        """Row -> numbers of its bands that another row has too; rows without one are left out."""
        shared: dict[int, list[int]] = defaultdict(list)
        alive = np.flatnonzero(~dropped)
        if not len(alive):
            return shared
        table = np.frombuffer(self._bands, np.uint64).reshape(len(dropped), -1)
        num_buckets = 0
        for band in range(table.shape[1]):
            _, bucket_of, sizes = np.unique(table[alive, band], return_inverse=True, return_counts=True)
            for row in np.flatnonzero(sizes[bucket_of] > 1).tolist():
                shared[int(alive[row])].append(num_buckets + int(bucket_of[row]))
            num_buckets += len(sizes)
        return shared

    def _set_of(self, example: Example) -> np.ndarray:
        found = [word for part in parts(example) if is_compared(part) for word in words(part[1])]
        return sequences(found, self._sequence_words)


def signature(numbers: np.ndarray) -> np.ndarray:
    """[NUM_HASHES] uint64: the least of each hash function over a set of numbers; all ones for an empty set."""
    least = np.full(NUM_HASHES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(numbers), _HASHED_AT_ONCE):
        part = numbers[start : start + _HASHED_AT_ONCE]
        np.minimum(least, mixed(part[None, :] ^ _SEEDS[:, None]).min(axis=1), out=least)
    return least


def bands(signed: np.ndarray, rows: int) -> np.ndarray:
    """[NUM_HASHES // rows] uint64: one number for each run of `rows` values of a signature."""
    table = signed[: len(signed) // rows * rows].reshape(-1, rows)
    total = np.zeros(len(table), np.uint64)
    for column in range(rows):
        total = mixed(total * np.uint64(3) + table[:, column])
    return total


def rows_in_band(similarity: float) -> int:
    """The most values in a band with which rows of a similarity share a band with a chance of RECALL."""
    return max(rows for rows in range(1, 33) if rows == 1 or find_chance(similarity, rows) >= RECALL)


def find_chance(similarity: float, rows: int) -> float:
    """Chance that two sets share a band: 1 - (1 - s^r)^b."""
    return 1.0 - (1.0 - similarity**rows) ** (NUM_HASHES // rows)


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Numbers in both sets over those in either; both sorted and unique."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / max(1, len(left) + len(right) - shared)

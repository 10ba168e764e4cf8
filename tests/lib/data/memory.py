"""Sources in memory and an encoding of plain numbers, for laws of order and packing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from lib.data.document import Document
from lib.data.shuffle import SourceRow
from lib.data.stream import Encoding


@dataclass(frozen=True)
class Text:
    """A row of so many tokens."""

    sample_id: str
    num_tokens: int
    source: str = "memory:1"


@dataclass(frozen=True)
class MemorySource:
    """Rows of some splits."""

    splits: Sequence[Sequence[Text]]
    digest: str = "memory"

    @property
    def num_splits(self) -> int:
        return len(self.splits)

    def read(self, split: int, start: int = 0, step: int = 1) -> Iterator[SourceRow]:
        rows = self.splits[split]
        for number in range(start, len(rows), step):
            yield SourceRow(number, rows[number].num_tokens, rows[number])


def source_of(sizes: Sequence[int], lengths: Sequence[int] = (5,), prefix: str = "r") -> MemorySource:
    """Splits of so many rows, numbered on: r0, r1, ...; row n has lengths[n % len(lengths)] tokens."""
    starts = accumulate(sizes, initial=0)
    return MemorySource(
        [
            [Text(f"{prefix}{number}", lengths[number % len(lengths)]) for number in range(start, start + size)]
            for start, size in zip(starts, sizes)
        ]
    )


def encode(texts: Sequence[Text]) -> list[Document]:
    """Token t of a row is t; all but the first are trained."""
    return [
        Document(text.sample_id, np.arange(text.num_tokens, dtype=np.int32), np.arange(text.num_tokens) > 0) for text in texts
    ]


PLAIN = Encoding(encode, {"tokenizer": "numbers"})

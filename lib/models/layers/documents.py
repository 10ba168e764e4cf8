"""Where the documents of a batch lie: the only thing that attention may look at to decide who sees whom."""

from dataclasses import dataclass, field
from typing import Any

import torch

PADDING = -1
"""Document id of padding."""


@dataclass(frozen=True)
class Span:
    """One document: positions `start` to `end` (exclusive) of row `row`."""

    row: int
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class DocumentLayout:
    """Built once for a batch and read by every layer."""

    document_ids_BT: torch.Tensor
    """[B, T] integers; one id a document within its row, PADDING on padding."""
    spans: tuple[Span, ...]
    """All documents, by row and position."""
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What a kernel made of this layout (a mask, a list of lengths), kept so that it is made once and not in every layer."""

    @staticmethod
    def from_document_ids(document_ids_BT: torch.Tensor) -> "DocumentLayout":
        """Find the documents.

        Raises:
            ValueError: a document id appears in two separate places of a row.
        """
        spans = [span for row, ids in enumerate(document_ids_BT.tolist()) for span in _row_spans(row, ids)]
        return DocumentLayout(document_ids_BT, tuple(spans))

    def flat_ranges(self) -> list[tuple[int, int]]:
        """(start, end) of each document in the flattened [B * T] tokens."""
        num_columns = self.document_ids_BT.shape[1]
        return [(span.row * num_columns + span.start, span.row * num_columns + span.end) for span in self.spans]


def _row_spans(row: int, ids: list[int]) -> list[Span]:
    spans: list[Span] = []
    seen: set[int] = set()
    start = 0
    for position in range(1, len(ids) + 1):
        if position < len(ids) and ids[position] == ids[start]:
            continue
        if ids[start] != PADDING:
            if ids[start] in seen:
                raise ValueError(
                    f"row {row}: document id {ids[start]} appears again at position {start}, after another document"
                )
            seen.add(ids[start])
            spans.append(Span(row, start, position))
        start = position
    return spans

"""The layout says exactly which positions belong to which document."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.models.layers.documents import PADDING, DocumentLayout

ROW = st.lists(st.integers(1, 9), max_size=6)


@given(st.lists(ROW, min_size=1, max_size=4), st.integers(0, 5))
def test_spans_cover_every_token_once(rows: list[list[int]], extra: int) -> None:
    """[B3] Lengths written as ids come back as spans, whatever the padding."""
    num_columns = max(sum(lengths) for lengths in rows) + extra
    ids = torch.full((len(rows), num_columns), PADDING)
    for row, lengths in enumerate(rows):
        ids[row, : sum(lengths)] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    layout = DocumentLayout.from_document_ids(ids)
    assert [[span.length for span in layout.spans if span.row == row] for row in range(len(rows))] == rows
    for span, (start, end) in zip(layout.spans, layout.flat_ranges()):
        assert (ids.flatten()[start:end] == ids[span.row, span.start]).all()


def test_a_document_in_two_places_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1: document id 0 appears again at position 3"):
        DocumentLayout.from_document_ids(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]))


def test_documents_of_two_rows_with_one_id_are_two_documents() -> None:
    layout = DocumentLayout.from_document_ids(torch.tensor([[0, 0], [0, 0]]))
    assert [(span.row, span.start, span.end) for span in layout.spans] == [(0, 0, 2), (1, 0, 2)]

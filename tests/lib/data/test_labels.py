"""Labels lie where their head puts its outputs: at the number of their document, or at their own token."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from lib.config.heads import HeadsConfig
from lib.core.errors import DataError
from lib.data.batch import collate
from lib.data.document import Document, PackedRow
from lib.data.labels import collate_labels
from lib.losses.outputs import HeadTargets
from lib.models.layers.documents import DocumentLayout

NAN = float("nan")
SIZE = 9
HEADS = HeadsConfig.parse(
    {
        "heads": [
            {"name": "text", "kind": "lm"},
            {"name": "reward", "kind": "scalar"},
            {"name": "topic", "kind": "classification", "labels": ["a", "b", "c"]},
            {"name": "worth", "kind": "scalar", "per": "token"},
            {"name": "tag", "kind": "classification", "labels": ["x", "y"], "per": "token"},
        ]
    },
    where="test",
)


def document(length: int, *, trained: int, **labels: Any) -> Document:
    """The last `trained` tokens are trained."""
    mask = np.arange(length) >= length - trained
    return Document(f"of {length}", np.arange(length, dtype=np.int32), mask, labels=json.dumps(labels) if labels else None)


ROWS = [
    PackedRow((document(3, trained=1, reward=0.5, topic="c", worth=2.0), document(4, trained=2, tag=[None, "y", "x", None]))),
    PackedRow((document(5, trained=2, topic="a", worth=[1.0, None, 3.0, None, 5.0]),)),
]


def test_every_label_is_at_its_document_or_token() -> None:
    """Two rows of 9 slots: documents of 3 and 4 tokens and two of padding; one of 5 and four of padding. A single value of a
    head by token counts for the trained tokens; what isn't told is NaN, and so is padding."""
    found = {name: value.tolist() for name, value in collate_labels(ROWS, SIZE, HEADS).items()}
    expected = {
        "reward": [0.5, NAN, NAN],
        "topic": [2.0, NAN, 0.0],
        "worth": [[NAN, NAN, 2.0, *[NAN] * 6], [1.0, NAN, 3.0, NAN, 5.0, *[NAN] * 4]],
        "tag": [[*[NAN] * 4, 1.0, 0.0, *[NAN] * 3], [NAN] * 9],
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_documents_are_numbered_as_their_hidden_states_are() -> None:
    """The order of the layout, which the heads by document follow: row by row, and within a row by position."""
    layout = DocumentLayout.from_document_ids(collate(ROWS, SIZE, 0).document_ids)
    assert [span.length for span in layout.spans] == [len(piece.token_ids) for row in ROWS for piece in row.documents]


def test_what_is_not_told_counts_for_nothing() -> None:
    """[C4] Factors are 1 where something is told and 0 elsewhere; labels are whole numbers."""
    topic = HeadTargets.told(collate_labels(ROWS, SIZE, HEADS)["topic"], HEADS.heads[2])
    assert topic.values.tolist() == [2, -100, 0] and topic.factors.tolist() == [1.0, 0.0, 1.0] and topic.weight_sum == 2.0
    worth = HeadTargets.told(collate_labels(ROWS, SIZE, HEADS)["worth"], HEADS.heads[3])
    assert worth.weight_sum == 4.0 and torch.equal(worth.factors > 0, ~worth.values.isnan())


def test_a_list_of_another_length_names_its_row() -> None:
    row = PackedRow((document(4, trained=1, worth=[1.0, 2.0]),))
    with pytest.raises(DataError, match=r"row 'of 4' labels: worth has 2 values.*make 4 tokens"):
        collate_labels([row], SIZE, HEADS)

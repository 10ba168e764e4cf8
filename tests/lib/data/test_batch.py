"""Laws of a packed batch: what each position predicts, where it stands, and which document it is of."""

import numpy as np
import pytest

from lib.core.errors import DataError
from lib.core.examples import Encoded
from lib.data.batch import IGNORE_INDEX, Document, PackedRow, collate

PAD = 2


def _document(name: str, token_ids: list[int], mask: list[int]) -> Document:
    return Document(name, np.array(token_ids, np.int32), np.array(mask, np.bool_))


def test_batch_worked_out_by_hand() -> None:
    """[A2][B2][B3] Documents a = 5 6 7 2 (trained 7 2), b = 8 9 (trained 8 9) in a row of 8; 2 is pad and end of turn.

    a predicts 7 at its second and 2 at its third position; its last predicts nothing, though the next slot holds a
    trained 8. b predicts 9 at its first. 8 is b's first token and so no target. Padding is position 0, document -1."""
    row = PackedRow((_document("a", [5, 6, 7, 2], [0, 0, 1, 1]), _document("b", [8, 9], [1, 1])))
    batch = collate([row], 8, PAD)
    i = IGNORE_INDEX
    assert batch.token_ids.tolist() == [[5, 6, 7, 2, 8, 9, PAD, PAD]]
    assert batch.labels.tolist() == [[i, 7, 2, i, 9, i, i, i]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, 1, 1, -1, -1]]
    assert batch.num_targets == 3
    assert batch.sample_ids == (("a", "b"),)
    assert [str(t.dtype) for t in (batch.token_ids, batch.labels, batch.positions, batch.document_ids)] == [
        *["torch.int64"] * 3,
        "torch.int32",
    ]


def test_packed_targets_are_those_of_each_document_alone() -> None:
    """[B2][B3] 1,000 random rows: cutting a packed row at its document ids gives each document's own batch back."""
    source = np.random.default_rng(0)
    for _ in range(1000):
        documents = []
        for number in range(source.integers(1, 6)):
            length = int(source.integers(2, 12))
            mask = source.random(length) < 0.5
            mask[-1] = True
            documents.append(Document(f"d{number}", source.integers(0, 5, length).astype(np.int32), mask))
        packed = collate([PackedRow(tuple(documents))], 64, PAD)
        assert packed.num_targets == int((packed.labels != IGNORE_INDEX).sum())
        total = 0
        for number, document in enumerate(documents):
            length = len(document.token_ids)
            here = packed.document_ids[0] == number
            alone = collate([PackedRow((document,))], length, PAD)
            for name in ("token_ids", "labels", "positions"):
                assert getattr(packed, name)[0, here].tolist() == getattr(alone, name)[0].tolist()
            assert alone.positions.tolist() == [list(range(length))]
            total += alone.num_targets
        assert packed.num_targets == total


def test_end_of_turn_is_a_target_in_every_row_though_it_is_the_padding_id() -> None:
    """[A2] 1,000 rows of a document that ends in the padding id: it is predicted in all of them."""
    rows = [PackedRow((_document(str(n), [5, 6, PAD], [0, 1, 1]),)) for n in range(1000)]
    batch = collate(rows, 8, PAD)
    assert batch.labels[:, 1].tolist() == [PAD] * 1000
    assert batch.num_targets == 2000


def test_document_with_nothing_to_predict_is_refused() -> None:
    """[A1] Neither an empty mask nor one on the first token alone is passed on."""
    for mask in ([0, 0], [1, 0]):
        with pytest.raises(DataError, match="row 'a' has no token to predict"):
            collate([PackedRow((_document("a", [5, 6], mask),))], 8, PAD)


def test_row_longer_than_the_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens"):
        collate([PackedRow((_document("a", [1] * 9, [1] * 9),))], 8, PAD)


def test_weights_stand_beside_the_labels_they_weigh() -> None:
    """Document a = 5 6 7 2 with weights 0 0 .5 2, b = 8 9 without any: its target counts 1. The weight of a target stands
    where it is predicted, one position before it; elsewhere 0. The sum is .5 + 2 + 1; the count stays 3."""
    weights = np.array([0.0, 0.0, 0.5, 2.0], np.float32)
    a = Document("a", np.array([5, 6, 7, 2], np.int32), weights > 0, weights)
    batch = collate([PackedRow((a, _document("b", [8, 9], [1, 1])))], 8, PAD)
    assert batch.weights is not None
    assert batch.weights.tolist() == [[0.0, 0.5, 2.0, 0.0, 1.0, 0.0, 0.0, 0.0]]
    assert (batch.weights > 0).tolist() == (batch.labels != IGNORE_INDEX).tolist()
    assert (batch.num_targets, batch.weight_sum, str(batch.weights.dtype)) == (3, 3.5, "torch.float32")


def test_batch_without_weights_has_none() -> None:
    batch = collate([PackedRow((_document("b", [8, 9], [1, 1]),))], 8, PAD)
    assert (batch.weights, batch.weight_sum) == (None, 1.0)
    assert Document.of(Encoded("a", [1, 2], [False, True], [0.0, 0.25])).weights.tolist() == [0.0, 0.25]  # type: ignore[union-attr]

"""Packed rows to tensors. Legend: B rows, T tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from lib.core.errors import DataError
from lib.core.examples import IGNORE_INDEX as IGNORE_INDEX
from lib.data.document import Document as Document
from lib.data.document import PackedRow as PackedRow

PADDING = -1
"""Document id of slots that hold no document."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Rows of packed documents, as CPU tensors."""

    token_ids: torch.Tensor
    """[B, T] int64; the padding id where there is no document."""
    labels: torch.Tensor
    """[B, T] int64: the token that position t must predict, token_ids[t + 1] where that is of the same document and trained;
    IGNORE_INDEX elsewhere. The first token of a document is never a target."""
    positions: torch.Tensor
    """[B, T] int64: 0, 1, ... within each document; 0 on padding."""
    document_ids: torch.Tensor
    """[B, T] int32: 0, 1, ... per row in order; -1 on padding."""
    num_targets: int
    """Labels that are not IGNORE_INDEX."""
    sample_ids: tuple[tuple[str, ...], ...]
    """Ids of each row's documents, in order."""
    weights: torch.Tensor | None
    """[B, T] float32 factor on the loss of each label; 0 where there is none. None: 1 for all."""
    weight_sum: float
    """Sum of the labels' factors, which divides a loss that uses them; num_targets where weights is None."""


def collate(rows: Sequence[PackedRow], sequence_length: int, pad_id: int) -> PackedBatch:
    """Lay rows out as a batch of [len(rows), sequence_length].

    Raises:
        ValueError: a row holds more tokens than the sequence.
        DataError: a document has nothing to predict.
    """
    pieces, numbers = _pieces(rows, sequence_length, pad_id)
    shape, size = (len(rows), sequence_length), len(rows) * sequence_length
    lengths = np.array([piece.num_tokens for piece in pieces])
    starts = lengths.cumsum() - lengths
    # One slot more, so that labels are those arrays from the second slot on.
    token_ids = _joined([piece.token_ids for piece in pieces], np.int32, size + 1).astype(np.int64)
    document_ids = np.repeat(np.array(numbers, np.int32), lengths)
    positions = np.repeat(starts, lengths)
    np.subtract(_numbers(size), positions, out=positions)
    for start, length, number in zip(starts.tolist(), lengths.tolist(), numbers):
        if number == PADDING:
            positions[start : start + length] = 0
    trained = _joined([piece.loss_mask for piece in pieces], np.bool_, size + 1)
    trained[starts] = False  # nothing predicts the first token of a document, so no label crosses a border
    labels = np.where(trained[1:], token_ids[1:], IGNORE_INDEX)
    weights = _shifted_weights(pieces, trained)
    num_targets = sum([piece.num_targets for piece in pieces])
    return PackedBatch(
        token_ids=torch.from_numpy(token_ids[:-1].reshape(shape)),
        labels=torch.from_numpy(labels.reshape(shape)),
        positions=torch.from_numpy(positions.reshape(shape)),
        document_ids=torch.from_numpy(document_ids.reshape(shape)),
        num_targets=num_targets,
        sample_ids=tuple(row.sample_ids for row in rows),
        weights=None if weights is None else torch.from_numpy(weights.reshape(shape)),
        weight_sum=float(num_targets) if weights is None else float(weights.sum(dtype=np.float64)),
    )


def _pieces(rows: Sequence[PackedRow], sequence_length: int, pad_id: int) -> tuple[list[Document], list[int]]:
    """What fills the slots in order: documents, and the padding of a row as one more; and the number of each in its row."""
    padding, untrained = _padding(sequence_length, pad_id)
    pieces: list[Document] = []
    numbers: list[int] = []
    for row in rows:
        documents, num_tokens = row.documents, row.num_tokens
        num_free = sequence_length - num_tokens
        if num_free < 0:
            raise ValueError(f"a packed row holds {num_tokens} tokens, the sequence {sequence_length}")
        for document in documents:
            if not document.num_targets:
                raise DataError(f"row {document.sample_id!r} has no token to predict; give it an answer")
        pieces += documents
        numbers += range(len(documents))
        if num_free:
            pieces.append(Document("", padding[:num_free], untrained[:num_free], num_targets=0))
            numbers.append(PADDING)
    return pieces, numbers


def _joined(parts: Sequence[Any], kind: type[np.generic], size: int) -> np.ndarray:
    """Short arrays in a row, and one zero more; as bytes, which takes a fraction of np.concatenate's time."""
    joined: np.ndarray = np.frombuffer(bytearray().join([*parts, bytes(np.dtype(kind).itemsize)]), kind)
    assert len(joined) == size, f"the arrays are not {kind.__name__}"
    return joined


@lru_cache(maxsize=4)
def _padding(sequence_length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and loss mask of a row of nothing."""
    return np.full(sequence_length, pad_id, np.int32), np.zeros(sequence_length, np.bool_)


@lru_cache(maxsize=4)
def _numbers(size: int) -> np.ndarray:
    """0, 1, 2, ..."""
    return np.arange(size)


def _shifted_weights(pieces: Sequence[Document], trained: np.ndarray) -> np.ndarray | None:
    """[slots] float32 factor on the label of each slot, 1 in documents without any, 0 where there is no label.

    Args: trained: [slots + 1]
    """
    if all(piece.weights is None for piece in pieces):
        return None
    parts = [np.ones(piece.num_tokens, np.float32) if piece.weights is None else piece.weights for piece in pieces]
    return np.where(trained[1:], np.concatenate([*parts, np.zeros(1, np.float32)])[1:], np.float32(0.0))

"""Packed rows to tensors. Legend: B rows, T tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lib.core.errors import DataError
from lib.core.examples import IGNORE_INDEX as IGNORE_INDEX
from lib.data.document import Document as Document
from lib.data.document import PackedRow as PackedRow


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
    shape = (len(rows), sequence_length)
    token_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
    positions, document_ids = np.zeros(shape, np.int64), np.full(shape, -1, np.int32)
    is_weighted = any(document.weights is not None for row in rows for document in row.documents)
    weights = np.zeros(shape, np.float32) if is_weighted else None
    num_targets = 0
    for index, row in enumerate(rows):
        if row.num_tokens > sequence_length:
            raise ValueError(f"a packed row holds {row.num_tokens} tokens, the sequence {sequence_length}")
        start = 0
        for number, document in enumerate(row.documents):
            if not document.num_targets:
                raise DataError(f"row {document.sample_id!r} has no token to predict; give it an answer")
            stop = start + len(document.token_ids)
            trained = document.loss_mask[1:]
            token_ids[index, start:stop] = document.token_ids
            np.copyto(labels[index, start : stop - 1], document.token_ids[1:], where=trained)
            positions[index, start:stop] = np.arange(stop - start)
            document_ids[index, start:stop] = number
            if weights is not None:
                factors = 1.0 if document.weights is None else document.weights[1:]
                np.copyto(weights[index, start : stop - 1], factors, where=trained)
            num_targets += document.num_targets
            start = stop
    return PackedBatch(
        token_ids=torch.from_numpy(token_ids),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        document_ids=torch.from_numpy(document_ids),
        num_targets=num_targets,
        sample_ids=tuple(row.sample_ids for row in rows),
        weights=None if weights is None else torch.from_numpy(weights),
        weight_sum=float(num_targets) if weights is None else float(weights.sum(dtype=np.float64)),
    )

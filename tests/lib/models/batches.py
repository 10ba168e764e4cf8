"""Small packed batches for model tests."""

from collections.abc import Mapping

import torch

from lib.core.examples import IGNORE_INDEX
from lib.data.batch import PackedBatch
from lib.losses.outputs import HeadTargets
from lib.models.decoder import Decoder
from lib.models.layers.documents import PADDING, DocumentLayout
from lib.train.step import MicroBatch


def packed(
    rows: list[list[int]], num_columns: int, vocab_size: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, DocumentLayout]:
    """(token ids, positions, layout) of documents of the given lengths, with padding at the end of each row."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(vocab_size, (len(rows), num_columns), generator=generator)
    positions = torch.zeros(len(rows), num_columns, dtype=torch.int64)
    document_ids = torch.full((len(rows), num_columns), PADDING)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths):
            positions[row, start : start + length] = torch.arange(length)
            document_ids[row, start : start + length] = number
            start += length
    return token_ids, positions, DocumentLayout.from_document_ids(document_ids)


def logits(decoder: Decoder, token_ids: torch.Tensor, positions: torch.Tensor, layout: DocumentLayout) -> torch.Tensor:
    """[B, T, V] float32."""
    return decoder.logits(decoder(token_ids, positions, layout)).float()


def heads_micro_batch(
    token_ids: torch.Tensor, positions: torch.Tensor, layout: DocumentLayout, targets: Mapping[str, HeadTargets]
) -> MicroBatch:
    """What a step takes, of rows whose tokens aren't targets themselves."""
    ids, labels = layout.document_ids_BT, torch.full_like(token_ids, IGNORE_INDEX)
    batch = PackedBatch(token_ids, labels, positions, ids, num_targets=0, sample_ids=(), weights=None, weight_sum=0.0)
    return MicroBatch(batch, layout, targets)

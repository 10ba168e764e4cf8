"""Held-out loss: negative log-likelihood of the trained tokens, packed as in training, summed row by row."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from lib.core.examples import Encoded
from lib.data.batch import IGNORE_INDEX, Document, PackedBatch, PackedRow, collate
from lib.losses.cross_entropy import token_logprobs
from lib.models.decoder import Decoder
from lib.models.hf_fallback import FallbackModel
from lib.models.layers.documents import DocumentLayout

CHUNK_TOKENS = 1024
"""Targets projected to the vocabulary at a time."""


@torch.no_grad()
def row_losses(
    decoder: Decoder | FallbackModel,
    rows: Sequence[Encoded],
    *,
    tokens_per_pack: int,
    pad_id: int,
    on_rows: Callable[[int], None] | None = None,
) -> list[tuple[float, int]]:
    """(sum of negative log-likelihoods, number of targets) of each row, in order.

    The sum of a row is taken in float64 over its own tokens, so how rows share packs shows in the last float32 digits of
    single log-probabilities and nowhere else.

    Args:
        tokens_per_pack: rows are packed in order up to this; a longer row has a pack of its own.
        on_rows: called with the number of rows done since the last call.
    """
    found: list[tuple[float, int]] = []
    for pack in packs(map(Document.of, rows), tokens_per_pack):
        batch = collate([pack], pack.num_tokens, pad_id)
        logprobs_N = _logprobs(decoder, batch).double().cpu()
        document_of_N = batch.document_ids[batch.labels != IGNORE_INDEX]
        for number in range(len(pack.documents)):
            own = logprobs_N[document_of_N == number]
            found.append((-float(own.sum()), own.numel()))
        if on_rows is not None:
            on_rows(len(pack.documents))
    return found


def _logprobs(decoder: Decoder | FallbackModel, batch: PackedBatch) -> torch.Tensor:
    """[N] of the labels, in order."""
    device = next(decoder.parameters()).device
    layout = DocumentLayout.from_document_ids(batch.document_ids.to(device))
    labels_BT = batch.labels.to(device)
    found: torch.Tensor = decoder(batch.token_ids.to(device), batch.positions.to(device), layout)
    if isinstance(decoder, FallbackModel):
        kept_BT = labels_BT != IGNORE_INDEX
        return found[kept_BT].float().log_softmax(-1).gather(-1, labels_BT[kept_BT][:, None])[:, 0]
    return token_logprobs(
        found,
        decoder.head_weight,
        labels_BT,
        CHUNK_TOKENS,
        vocab_size=decoder.spec.vocab_size,
        softcap=decoder.spec.logit_softcap,
        adapter=decoder.head_adapter(found),
    )


def packs(documents: Iterable[Document], tokens_per_pack: int) -> Iterator[PackedRow]:
    """Documents in their order, in packs up to a size; a longer one has a pack of its own."""
    open_documents: list[Document] = []
    num_tokens = 0
    for document in documents:
        if open_documents and num_tokens + len(document.token_ids) > tokens_per_pack:
            yield PackedRow(tuple(open_documents))
            open_documents, num_tokens = [], 0
        open_documents.append(document)
        num_tokens += len(document.token_ids)
    if open_documents:
        yield PackedRow(tuple(open_documents))

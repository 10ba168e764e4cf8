"""Held-out loss: negative log-likelihood of the trained tokens, packed as in training, summed row by row."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

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
        found += _pack_losses(decoder, pack, pad_id)
        if on_rows is not None:
            on_rows(len(pack.documents))
    return found


def _pack_losses(decoder: Decoder | FallbackModel, pack: PackedRow, pad_id: int) -> list[tuple[float, int]]:
    """Of each document. One that gives a NaN spoils its neighbours, since even nothing times a NaN is one: each by itself."""
    batch = collate([pack], pack.num_tokens, pad_id)
    logprobs_N = _logprobs(decoder, batch).double().cpu()
    if len(pack.documents) > 1 and not bool(logprobs_N.isfinite().all()):
        return [_pack_losses(decoder, PackedRow((document,)), pad_id)[0] for document in pack.documents]
    document_of_N = batch.document_ids[batch.labels != IGNORE_INDEX]
    own = [logprobs_N[document_of_N == number] for number in range(len(pack.documents))]
    return [(-float(logprobs.sum()), logprobs.numel()) for logprobs in own]


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


@dataclass(frozen=True)
class PooledLoss:
    """The loss of all rows together."""

    loss: float | None
    """Mean negative log-likelihood of a trained token; None where there is none to take it over."""
    num_rows: int
    num_targets: int
    num_not_finite: int
    """Rows that aren't in the three above: the model gives a NaN or an infinity for them."""


def pooled(losses: Iterable[tuple[float, int]]) -> PooledLoss:
    """One mean over the targets of all rows, from (sum, number of targets) of each."""
    found = list(losses)
    finite = [(loss, count) for loss, count in found if math.isfinite(loss)]
    num_targets = sum(count for _, count in finite)
    loss = math.fsum(loss for loss, _ in finite) / num_targets if num_targets else None
    return PooledLoss(loss, len(finite), num_targets, len(found) - len(finite))


def not_finite_warnings(before: int, after: int) -> list[str]:
    """Of rows that are in no held-out loss."""
    return [
        f"{count} held-out row(s) have a loss that isn't finite {when} training; the held-out loss is that of the others"
        for when, count in (("before", before), ("after", after))
        if count
    ]


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

"""Causal attention within documents on CPU: one call of the fused kernel for each document, nothing between them.

Letters: B rows, T tokens, N query heads, K key-value heads, H head channels, L tokens of a document.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from lib.models.layers.documents import DocumentLayout


def document_attention_cpu(
    q_BTNH: torch.Tensor, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, layout: DocumentLayout
) -> torch.Tensor:
    """[B, T, N, H] attention output in the dtype of `q`; zero on padding.

    Softmax and products are float32: on CPU that is faster than bfloat16 for documents of usual length, and exact
    to the kernel.
    """
    if "segments" not in layout.derived:
        layout.derived["segments"] = _segments(layout)
    lengths, is_document = layout.derived["segments"]
    q, k, v = (torch.split(x.flatten(0, 1).float(), lengths) for x in (q_BTNH, k_BTKH, v_BTKH))
    outputs = [
        _causal(q_LNH, k_LKH, v_LKH) if real else torch.zeros_like(q_LNH)
        for q_LNH, k_LKH, v_LKH, real in zip(q, k, v, is_document)
    ]
    return torch.cat(outputs).view(q_BTNH.shape).to(q_BTNH.dtype)


def _causal(q_LNH: torch.Tensor, k_LKH: torch.Tensor, v_LKH: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_LNH, k_LKH, v_LKH))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def _segments(layout: DocumentLayout) -> tuple[list[int], list[bool]]:
    """Lengths that cover the flattened tokens in order, and whether each is a document (else padding)."""
    lengths: list[int] = []
    is_document: list[bool] = []
    cursor = 0
    for start, end in [*layout.flat_ranges(), (layout.document_ids_BT.numel(), layout.document_ids_BT.numel())]:
        for length, real in ((start - cursor, False), (end - start, True)):
            if length:
                lengths.append(length)
                is_document.append(real)
        cursor = end
    return lengths, is_document

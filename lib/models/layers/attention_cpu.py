"""Causal attention within documents on CPU: each document by itself, nothing between them.

A window is met by taking blocks of queries with the keys that they can see. A sink becomes one more key: queries get a
channel that holds the sink's score, which only that key reads. So the fused kernel does all of it, but for soft caps,
whose scores are made in full, block by block.

Letters: B rows, T tokens, N query heads, K key-value heads, H head channels, L tokens of a document, Q queries of a block.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from lib.models.layers.documents import DocumentLayout
from lib.models.layers.scores import Scores

MIN_BLOCK = 16
"""Queries of a block at least, where a window is narrower: smaller calls cost more than they save."""


def document_attention_cpu(
    q_BTNH: torch.Tensor, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, layout: DocumentLayout, scores: Scores
) -> torch.Tensor:
    """[B, T, N, H] attention output in the dtype of `q`; zero on padding.

    Softmax and products are float32: on CPU that is faster than bfloat16 for documents of usual length, and exact
    to the kernel.
    """
    if "segments" not in layout.derived:
        layout.derived["segments"] = _segments(layout)
    lengths, is_document = layout.derived["segments"]
    if not any(is_document):
        # Nothing but padding still gives every weight a gradient, of zeros: other ranks wait for it.
        inputs = (q_BTNH, k_BTKH, v_BTKH, *(() if scores.sinks_N is None else (scores.sinks_N,)))
        return torch.zeros_like(q_BTNH) + 0.0 * torch.stack([x.sum() for x in inputs]).sum()
    q, k, v = (torch.split(x.flatten(0, 1).float(), lengths) for x in (q_BTNH, k_BTKH, v_BTKH))
    outputs = [
        _one_document(q_LNH, k_LKH, v_LKH, scores) if real else torch.zeros_like(q_LNH)
        for q_LNH, k_LKH, v_LKH, real in zip(q, k, v, is_document)
    ]
    return torch.cat(outputs).view(q_BTNH.shape).to(q_BTNH.dtype)


def _one_document(q_LNH: torch.Tensor, k_LKH: torch.Tensor, v_LKH: torch.Tensor, scores: Scores) -> torch.Tensor:
    q_NLH, k_KLH, v_KLH = (x.transpose(0, 1) for x in (q_LNH, k_LKH, v_LKH))
    length = q_LNH.shape[0]
    window = scores.window if scores.window is not None and scores.window < length else None
    if window is None and scores.softcap is None and scores.sinks_N is None:
        return _fused(q_NLH, k_KLH, v_KLH, None, scores.scale).transpose(0, 1)
    block = max(window, MIN_BLOCK) if window is not None else length
    outputs = []
    for start in range(0, length, block):
        stop, first = min(start + block, length), max(0, start - window + 1) if window is not None else 0
        queries, keys = torch.arange(start, stop)[:, None], torch.arange(first, stop)
        sees_QL = keys <= queries if window is None else (keys <= queries) & (keys > queries - window)
        part = (q_NLH[:, start:stop], k_KLH[:, first:stop], v_KLH[:, first:stop])
        outputs.append(_in_full(*part, sees_QL, scores) if scores.softcap else _with_sink(*part, sees_QL, scores))
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor | None, scale: float) -> torch.Tensor:
    output = scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=sees, is_causal=sees is None, scale=scale, enable_gqa=True
    )
    return output[0]


def _with_sink(
    q_NQH: torch.Tensor, k_KLH: torch.Tensor, v_KLH: torch.Tensor, sees_QL: torch.Tensor, scores: Scores
) -> torch.Tensor:
    if scores.sinks_N is None:
        return _fused(q_NQH, k_KLH, v_KLH, sees_QL, scores.scale)
    pad = torch.nn.functional.pad
    sink_N11 = scores.sinks_N.float()[:, None, None]
    q = torch.cat((q_NQH, sink_N11.expand(-1, q_NQH.shape[1], 1)), dim=-1)
    k = pad(k_KLH, (0, 1, 0, 1))  # one more channel and one more key, of zeros but where they meet
    k = k + pad(k.new_full((1, 1), 1.0 / scores.scale), (k.shape[2] - 1, 0, k.shape[1] - 1, 0))
    output = _fused(q, k, pad(v_KLH, (0, 1, 0, 1)), pad(sees_QL, (0, 1), value=True), scores.scale)
    return output[..., :-1]


def _in_full(
    q_NQH: torch.Tensor, k_KLH: torch.Tensor, v_KLH: torch.Tensor, sees_QL: torch.Tensor, scores: Scores
) -> torch.Tensor:
    assert scores.softcap is not None
    groups = q_NQH.shape[0] // k_KLH.shape[0]
    k_NLH, v_NLH = k_KLH.repeat_interleave(groups, 0), v_KLH.repeat_interleave(groups, 0)
    scores_NQL = scores.softcap * torch.tanh(q_NQH @ k_NLH.mT * scores.scale / scores.softcap)
    scores_NQL = scores_NQL.masked_fill(~sees_QL, float("-inf"))
    if scores.sinks_N is None:
        return scores_NQL.softmax(-1) @ v_NLH
    sinks_NQ1 = scores.sinks_N.float()[:, None, None].expand(-1, q_NQH.shape[1], 1)
    return torch.cat((scores_NQL, sinks_NQ1), -1).softmax(-1)[..., :-1] @ v_NLH


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

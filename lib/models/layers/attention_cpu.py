"""Causal attention within documents on CPU: matrix products of a block of queries with the keys that it may see.

A document is cut into blocks, short neighbours share one: so little is computed that is masked, and no product is too
small to be fast. A block's probabilities are kept for the backward pass or, where they are many, made again: memory grows
with the tokens, not with their square. A sink is one more score of each query, of a key that holds nothing. Long
documents without window, cap and sinks go to PyTorch's fused kernel, which is faster on them.

Letters: B rows, T tokens (of all rows), N query heads, K key-value heads, G query heads of each, H head
channels, Q queries of a block, R those of all G heads under each other, L keys that it sees, E those and the sink.
"""

from itertools import repeat
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from lib.models.layers.blocks import Block, Piece, cut
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.scores import Scores

BLOCK_QUERIES = 64
"""Queries of a block. With more, more is computed that is masked; with fewer, products get slow."""
KEPT_KEYS = 512
"""A block that sees more keys makes its probabilities again in the backward pass: one product of seven, for memory."""
FUSED_TOKENS = 1536
"""Longer documents go to the fused kernel where it can do them."""


def document_attention_cpu(
    q_BTNH: torch.Tensor, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, layout: DocumentLayout, scores: Scores
) -> torch.Tensor:
    """[B, T, N, H] attention output in the dtype of `q`; zero on padding.

    Softmax and products are float32 (float64 for float64 inputs): on CPU that is faster than bfloat16 for documents of usual
    length, and exact.
    """
    fused_tokens = FUSED_TOKENS if scores.softcap is None and scores.sinks_N is None else None
    key = f"pieces {scores.window} {fused_tokens} {BLOCK_QUERIES}"
    if key not in layout.derived:
        layout.derived[key] = cut(layout, scores.window, block_queries=BLOCK_QUERIES, fused_tokens=fused_tokens)
    pieces: list[Piece] = layout.derived[key]
    q_TNH, k_TKH, v_TKH = (x.flatten(0, 1) for x in (q_BTNH, k_BTKH, v_BTKH))
    if len(pieces) == 1:
        return _attend(q_TNH, k_TKH, v_TKH, scores, pieces[0]).view(q_BTNH.shape)
    q, k, v = (torch.split(x, [piece.num_tokens for piece in pieces]) for x in (q_TNH, k_TKH, v_TKH))
    return torch.cat([_attend(*part) for part in zip(q, k, v, repeat(scores), pieces)]).view(q_BTNH.shape)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, piece: Piece) -> torch.Tensor:
    """[T, N, H]; of the tokens of a piece."""
    if piece.fused:
        q_1NTH, k_1KTH, v_1KTH = (_wide(x).transpose(0, 1)[None] for x in (q, k, v))
        fused_1NTH = scaled_dot_product_attention(q_1NTH, k_1KTH, v_1KTH, is_causal=True, scale=scores.scale, enable_gqa=True)
        return fused_1NTH[0].transpose(0, 1).to(q.dtype)
    output: torch.Tensor = _BlockedAttention.apply(q, k, v, scores.sinks_N, scores, piece)  # type: ignore[no-untyped-call]
    return output


class _BlockedAttention(torch.autograd.Function):
    """q [T, N, H], k and v [T, K, H], sinks [N] -> [T, N, H] in the dtype of q."""

    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        sinks_N: torch.Tensor | None,
        scores: Scores,
        piece: Piece,
    ) -> torch.Tensor:
        output_TNH, kept = torch.empty_like(q_TNH), []
        k_KTH, v_KTH = (_wide(x).transpose(0, 1) for x in (k_TKH, v_TKH))
        q_KGTH, output_KGTH = (_by_key_head(x, len(k_KTH)) for x in (q_TNH, output_TNH))
        for block in piece.blocks:
            q_KRH = _wide(q_KGTH.narrow(2, block.start, block.num_queries)).flatten(1, 2)
            k_KLH, v_KLH = (x.narrow(1, block.first, block.num_keys) for x in (k_KTH, v_KTH))
            weights_KRE, _ = _weights(q_KRH, k_KLH, scores, block)
            remake = block.num_keys > KEPT_KEYS or scores.softcap is not None
            kept.append(None if remake else weights_KRE)
            output_KRH = torch.bmm(weights_KRE.narrow(-1, 0, block.num_keys), v_KLH)
            output_KGQH = output_KGTH.narrow(2, block.start, block.num_queries)
            output_KGQH.copy_(output_KRH.view(output_KGQH.shape))
        for padding in piece.padding:
            output_TNH[padding] = 0.0
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, *kept)
        ctx.options = scores, piece
        return output_TNH

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_TNH, k_TKH, v_TKH, *kept = ctx.saved_tensors
        scores, piece = ctx.options
        grad_q_TNH, grads_TKH = torch.empty_like(q_TNH), [_wide(x[:0]).new_empty(x.shape) for x in (k_TKH, v_TKH)]
        nothing = grads_TKH[0].new_empty(())
        k_KTH, v_KTH, grad_k_KTH, grad_v_KTH = (_wide(x).transpose(0, 1) for x in (k_TKH, v_TKH, *grads_TKH))
        q_KGTH, up_KGTH, grad_q_KGTH = (_by_key_head(x, len(k_KTH)) for x in (q_TNH, upstream[0], grad_q_TNH))
        grad_sinks_N = None if scores.sinks_N is None else torch.zeros_like(_wide(scores.sinks_N))
        written = piece.num_tokens  # the first key whose gradients hold something
        for block, kept_KRE in zip(reversed(piece.blocks), reversed(kept)):
            q_KRH, up_KRH = (_wide(x.narrow(2, block.start, block.num_queries)).flatten(1, 2) for x in (q_KGTH, up_KGTH))
            k_KLH, v_KLH = (x.narrow(1, block.first, block.num_keys) for x in (k_KTH, v_KTH))
            made = (kept_KRE, None) if kept_KRE is not None else _weights(q_KRH, k_KLH, scores, block)
            weights_KRE, slope_KRL = made
            _add(grad_v_KTH, block, written, torch.bmm(weights_KRE.narrow(-1, 0, block.num_keys).mT, up_KRH))
            grad_KRE = torch.bmm(up_KRH, v_KLH.mT)
            # A sink has no value: its weight does nothing but take from those of the keys.
            grad_KRE = grad_KRE if grad_sinks_N is None else pad(grad_KRE, (0, 1))
            grad_KRE = torch._softmax_backward_data(grad_KRE, weights_KRE, -1, weights_KRE.dtype)
            if grad_sinks_N is not None:
                grad_sinks_N += grad_KRE[..., -1].reshape(len(grad_sinks_N), -1).sum(-1)
            grad_KRL = grad_KRE.narrow(-1, 0, block.num_keys)
            grad_KRL = grad_KRL if slope_KRL is None else grad_KRL * slope_KRL
            _add(grad_k_KTH, block, written, torch.baddbmm(nothing, grad_KRL.mT, q_KRH, beta=0.0, alpha=scores.scale))
            grad_KGQH = grad_q_KGTH.narrow(2, block.start, block.num_queries)
            grad_KGQH.copy_(torch.baddbmm(nothing, grad_KRL, k_KLH, beta=0.0, alpha=scores.scale).view(grad_KGQH.shape))
            written = min(written, block.first)
        for padding in piece.padding:
            for grad in (grad_q_TNH, *grads_TKH):
                grad[padding] = 0.0
        return grad_q_TNH, *(grad.to(k_TKH.dtype) for grad in grads_TKH), grad_sinks_N, None, None


def _add(sum_KTH: torch.Tensor, block: Block, written: int, addend_KLH: torch.Tensor) -> None:
    """To the sum over queries at the block's keys, which holds something from key `written` on."""
    num_new = min(max(written - block.first, 0), block.num_keys)
    if num_new:
        sum_KTH.narrow(1, block.first, num_new).copy_(addend_KLH.narrow(1, 0, num_new))
    if num_new < block.num_keys:
        num_old = block.num_keys - num_new
        sum_KTH.narrow(1, block.first + num_new, num_old).add_(addend_KLH.narrow(1, num_new, num_old))


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In the dtype that is computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_key_head(x_TNH: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[K, G, T, H], a view: the G query heads of a key-value head are neighbours."""
    num_tokens, num_heads, head_dim = x_TNH.shape
    return x_TNH.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(1, 2, 0, 3)


def _weights(
    q_KRH: torch.Tensor, k_KLH: torch.Tensor, scores: Scores, block: Block
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Share of each key in each query's sum, [K, R, E]; and, with a soft cap, the cap's slope at each score [K, R, L]."""
    nothing, slope_KRL = q_KRH.new_empty(()), None
    scale = scores.scale if scores.softcap is None else scores.scale / scores.softcap
    scores_KRL = torch.baddbmm(nothing, q_KRH, k_KLH.mT, beta=0.0, alpha=scale)
    if scores.softcap is not None:
        slope_KRL = 1.0 - scores_KRL.tanh_().square()
        scores_KRL.mul_(scores.softcap)
    scores_KGQL = scores_KRL.view(len(k_KLH), -1, block.num_queries, block.num_keys)
    for keys, hidden in block.hidden:
        scores_KGQL[..., keys].add_(hidden)
    if scores.sinks_N is None:
        return scores_KRL.softmax(-1), slope_KRL
    sinks_KG11 = scores.sinks_N.to(scores_KGQL.dtype).view(*scores_KGQL.shape[:2], 1, 1)
    scores_KGQE = torch.cat((scores_KGQL, sinks_KG11.expand(-1, -1, block.num_queries, 1)), -1)
    return scores_KGQE.flatten(1, 2).softmax(-1), slope_KRL

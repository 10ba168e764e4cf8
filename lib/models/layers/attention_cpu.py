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
from torch.nn.functional import scaled_dot_product_attention

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
        k_KTH, v_KTH = (_wide(x).transpose(0, 1) for x in (k_TKH, v_TKH))
        output_TNH, kept = k_KTH.new_empty(q_TNH.shape), list[torch.Tensor | None]()
        queries, outputs = piece.split(_by_key_head(_wide(q_TNH), len(k_KTH))), _split_groups(output_TNH, len(k_KTH), piece)
        for block, q_KGQH, output in zip(piece.blocks, queries, outputs):
            weights_KRE, _ = _weights(q_KGQH.flatten(1, 2), k_KTH.narrow(1, block.first, block.num_keys), scores, block)
            if any(ctx.needs_input_grad):
                kept.append(None if block.num_keys > KEPT_KEYS or scores.softcap is not None else weights_KRE)
            _multiply_groups(output, weights_KRE, v_KTH.narrow(1, block.first, block.num_keys))
        for padding in piece.padding:
            output_TNH[padding] = 0.0
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, *kept)
        ctx.options = scores, piece
        return output_TNH.to(q_TNH.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_TNH, k_TKH, v_TKH, *kept = ctx.saved_tensors
        scores, piece = ctx.options
        k_KTH, v_KTH = (_wide(x).transpose(0, 1) for x in (k_TKH, v_TKH))
        grads = [k_KTH.new_empty(x.shape) for x in (q_TNH, k_TKH, v_TKH)]
        grad_k_KTH, grad_v_KTH = (x.transpose(0, 1) for x in grads[1:])
        grad_sinks_N = None if scores.sinks_N is None else torch.zeros_like(_wide(scores.sinks_N))
        queries, ups = (piece.split(_by_key_head(_wide(x), len(k_KTH))) for x in (q_TNH, upstream[0]))
        parts = zip(piece.blocks, kept, queries, ups, _split_groups(grads[0], len(k_KTH), piece))
        written = piece.num_tokens  # the first key whose gradients hold something
        for block, kept_KRE, q_KGQH, up_KGQH, grad_q in reversed(list(parts)):
            q_KRH, up_KRH = q_KGQH.flatten(1, 2), up_KGQH.flatten(1, 2)
            k_KLH, v_KLH = (x.narrow(1, block.first, block.num_keys) for x in (k_KTH, v_KTH))
            weights_KRE, slope_KRL = (kept_KRE, None) if kept_KRE is not None else _weights(q_KRH, k_KLH, scores, block)
            _multiply_to_keys(grad_v_KTH, block, written, weights_KRE, up_KRH)
            grad_KRE = _score_gradients(weights_KRE, up_KRH, v_KLH)
            if grad_sinks_N is not None:
                grad_sinks_N += grad_KRE[..., -1].reshape(len(grad_sinks_N), -1).sum(-1)
            if slope_KRL is not None:
                grad_KRE.narrow(-1, 0, block.num_keys).mul_(slope_KRL)
            _multiply_to_keys(grad_k_KTH, block, written, grad_KRE, q_KRH, scale=scores.scale)
            _multiply_groups(grad_q, grad_KRE, k_KLH, scale=scores.scale)
            written = min(written, block.first)
        for padding in piece.padding:
            for grad in grads:
                grad[padding] = 0.0
        dtypes = (q_TNH.dtype, k_TKH.dtype, v_TKH.dtype)
        return *(grad.to(dtype) for grad, dtype in zip(grads, dtypes)), grad_sinks_N, None, None


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In the dtype that is computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_key_head(x_TNH: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[K, G, T, H], a view: the G query heads of a key-value head are neighbours."""
    num_tokens, num_heads, head_dim = x_TNH.shape
    return x_TNH.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(1, 2, 0, 3)


def _split_groups(x_TNH: torch.Tensor, num_kv_heads: int, piece: Piece) -> list[tuple[torch.Tensor, ...]]:
    """Of each block G views [K, Q, H], one for each query head of a key-value head."""
    return list(zip(*(piece.split(x_KTH) for x_KTH in _by_key_head(x_TNH, num_kv_heads).unbind(1))))


def _weights(
    q_KRH: torch.Tensor, k_KLH: torch.Tensor, scores: Scores, block: Block
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Share of each key in each query's sum, [K, R, E]; and, with a soft cap, the cap's slope at each score [K, R, L]."""
    num_kv_heads, num_keys, slope_KRL = len(k_KLH), block.num_keys, None
    scale = scores.scale if scores.softcap is None else scores.scale / scores.softcap
    weights_KRE = _scores(q_KRH, k_KLH, sink=scores.sinks_N is not None, scale=scale)
    if scores.softcap is not None:
        scores_KRL = weights_KRE.narrow(-1, 0, num_keys)
        slope_KRL = 1.0 - scores_KRL.tanh_().square()
        scores_KRL.mul_(scores.softcap)
    weights_KGQE = weights_KRE.view(num_kv_heads, -1, block.num_queries, weights_KRE.shape[-1])
    for keys, hidden in block.hidden:
        weights_KGQE.narrow(-1, keys.start, keys.stop - keys.start).add_(hidden)
    if scores.sinks_N is not None:
        weights_KGQE[..., num_keys] = scores.sinks_N.to(weights_KGQE.dtype).view(num_kv_heads, -1, 1)
    return torch.softmax(weights_KRE, -1, out=weights_KRE), slope_KRL


def _score_gradients(weights_KRE: torch.Tensor, up_KRH: torch.Tensor, v_KLH: torch.Tensor) -> torch.Tensor:
    """[K, R, E]; a sink has no value: its weight does nothing but take from those of the keys."""
    sink = weights_KRE.shape[-1] > v_KLH.shape[1]
    grad_KRE = _scores(up_KRH, v_KLH, sink=sink)
    if sink:
        grad_KRE[..., -1] = 0.0
    return torch._softmax_backward_data(grad_KRE, weights_KRE, -1, grad_KRE.dtype, grad_input=grad_KRE)


def _scores(rows_KRH: torch.Tensor, keys_KLH: torch.Tensor, *, sink: bool, scale: float = 1.0) -> torch.Tensor:
    """[K, R, E] product of each row with each key; the sink's column is not set."""
    if not sink:
        return _product(rows_KRH, keys_KLH.mT, scale)
    num_keys = keys_KLH.shape[1]
    scores_KRE = rows_KRH.new_empty(*rows_KRH.shape[:2], num_keys + 1)
    _multiply(scores_KRE.narrow(-1, 0, num_keys), rows_KRH, keys_KLH.mT, scale=scale)
    return scores_KRE


def _multiply_to_keys(
    sum_KTH: torch.Tensor, block: Block, written: int, left_KRE: torch.Tensor, right_KRH: torch.Tensor, *, scale: float = 1.0
) -> None:
    """To the sum over queries at the block's keys, which holds something from key `written` on."""
    num_new = min(max(written - block.first, 0), block.num_keys)
    for start, end in ((0, num_new), (num_new, block.num_keys)):
        if start < end:
            part_KLH, left_KRL = sum_KTH.narrow(1, block.first + start, end - start), left_KRE.narrow(-1, start, end - start)
            _multiply(part_KLH, left_KRL.mT, right_KRH, scale=scale, add=start == num_new)


def _multiply_groups(
    outputs: tuple[torch.Tensor, ...], left_KRE: torch.Tensor, right_KLH: torch.Tensor, *, scale: float = 1.0
) -> None:
    """G outputs [K, Q, H] = scale * left @ right, each of its own query head."""
    left_KRL, shape = left_KRE.narrow(-1, 0, right_KLH.shape[1]), (len(right_KLH), len(outputs), len(outputs[0][0]), -1)
    if _one_by_one():
        for output_KQH, left_KQL in zip(outputs, left_KRL.view(shape).unbind(1)):
            output_KQH.baddbmm_(left_KQL, right_KLH, beta=0.0, alpha=scale)
    else:
        for output_KQH, made_KQH in zip(outputs, _product(left_KRL, right_KLH, scale).view(shape).unbind(1)):
            output_KQH.copy_(made_KQH)


def _multiply(output: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, scale: float = 1.0, add: bool = False) -> None:
    """output = scale * left @ right, or added to what it holds; batches of matrices."""
    if _one_by_one():
        output.baddbmm_(left, right, beta=float(add), alpha=scale)
    elif add:
        output.add_(_product(left, right, scale))
    else:
        output.copy_(_product(left, right, scale))


def _one_by_one() -> bool:
    """A batch of products goes matrix by matrix to where the output lies: well for one thread. Several would be woken for
    each matrix; they make all of a batch at once, and copy."""
    return torch.get_num_threads() == 1


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.baddbmm(left.new_empty(()), left, right, beta=0.0, alpha=scale)

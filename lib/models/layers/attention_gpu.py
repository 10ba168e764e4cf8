"""Causal attention within documents on GPU: FlexAttention with a block mask made from the document ids and the window.

Letters: B rows, T tokens, N query heads, K key-value heads, H head channels.
"""

from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from lib.models.layers.documents import PADDING, DocumentLayout
from lib.models.layers.scores import Scores


def document_attention_gpu(
    q_BTNH: torch.Tensor, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, layout: DocumentLayout, scores: Scores
) -> torch.Tensor:
    """[B, T, N, H] attention output in the dtype of `q`; zero on padding."""
    return attend_with(_compiled(), q_BTNH, k_BTKH, v_BTKH, layout, scores)


def attend_with(
    kernel: Any, q_BTNH: torch.Tensor, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, layout: DocumentLayout, scores: Scores
) -> torch.Tensor:
    """`document_attention_gpu` by a given kernel: FlexAttention, compiled or not."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    output_BNTH, aux = kernel(
        q,
        k,
        v,
        score_mod=_softcap(scores.softcap) if scores.softcap else None,
        block_mask=document_block_mask(layout, scores.window, q.device),
        scale=scores.scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=scores.sinks_N is not None),
    )
    if scores.sinks_N is not None:
        # A sink takes exp(sink) of a sum exp(lse) + exp(sink): what is left for the keys is sigmoid(lse - sink).
        share_BNT1 = torch.sigmoid(aux.lse - scores.sinks_N.float()[:, None])[..., None]
        output_BNTH = (output_BNTH * share_BNT1).to(q_BTNH.dtype)
    is_padding_BT11 = (layout.document_ids_BT == PADDING).to(q.device)[:, :, None, None]
    result: torch.Tensor = output_BNTH.transpose(1, 2).masked_fill(is_padding_BT11, 0.0)
    return result


def document_block_mask(layout: DocumentLayout, window: int | None, device: torch.device) -> BlockMask:
    """Causal, within a document and the window; made once for a batch. Padding sees padding, so that no row is empty."""
    key = f"block_mask {window}"
    if key not in layout.derived:
        ids_BT = layout.document_ids_BT.to(device)

        def sees(b: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            causal = (query >= key) & (ids_BT[b, query] == ids_BT[b, key])
            return causal if window is None else causal & (query - key < window)

        num_rows, num_columns = ids_BT.shape
        layout.derived[key] = create_block_mask(sees, num_rows, None, num_columns, num_columns, device=str(device))
    mask: BlockMask = layout.derived[key]
    return mask


@lru_cache(maxsize=8)
def _softcap(cap: float) -> Any:
    """One function for each cap, so that the kernel is compiled once for it."""

    def capped(score: torch.Tensor, _b: Any, _head: Any, _query: Any, _key: Any) -> torch.Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """FlexAttention is fused only when compiled; eager it would make the whole score matrix."""
    return torch.compile(flex_attention)

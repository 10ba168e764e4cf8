"""Causal attention within documents on GPU: FlexAttention with a block mask made from the document ids.

Letters: B rows, T tokens, N query heads, K key-value heads, H head channels.
"""

from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lib.models.layers.documents import PADDING, DocumentLayout


def document_attention_gpu(
    q_BTNH: torch.Tensor, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, layout: DocumentLayout
) -> torch.Tensor:
    """[B, T, N, H] attention output in the dtype of `q`; zero on padding."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    output_BNTH = _compiled()(q, k, v, block_mask=document_block_mask(layout, q.device), enable_gqa=True)
    is_padding_BT11 = (layout.document_ids_BT == PADDING).to(q.device)[:, :, None, None]
    result: torch.Tensor = output_BNTH.transpose(1, 2).masked_fill(is_padding_BT11, 0.0)
    return result


def document_block_mask(layout: DocumentLayout, device: torch.device) -> BlockMask:
    """Causal and within a document; made once for a batch. Padding sees padding, so that no row of scores is empty."""
    if "block_mask" not in layout.derived:
        ids_BT = layout.document_ids_BT.to(device)

        def sees(b: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return (query >= key) & (ids_BT[b, query] == ids_BT[b, key])

        num_rows, num_columns = ids_BT.shape
        layout.derived["block_mask"] = create_block_mask(sees, num_rows, None, num_columns, num_columns, device=str(device))
    mask: BlockMask = layout.derived["block_mask"]
    return mask


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """FlexAttention is fused only when compiled; eager it would make the whole score matrix."""
    return torch.compile(flex_attention)

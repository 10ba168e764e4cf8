"""Every attention kernel has the same meaning: a query sees the keys of its own document up to itself."""

import torch
from torch.nn.attention.flex_attention import flex_attention

from lib.models.layers.attention_cpu import document_attention_cpu
from lib.models.layers.attention_gpu import document_block_mask
from tests.lib.models.batches import packed

ROWS = [[9, 1, 17, 5], [23, 9], [36], []]


def random_heads(num_columns: int, num_heads: tuple[int, ...] = (6, 2, 2)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(ROWS), num_columns, heads, 16, generator=generator) for heads in num_heads]


def test_the_cpu_kernel_is_softmax_under_the_document_mask() -> None:
    """Against a dense float64 computation; query head n reads key head n // 3. Zero on padding, gradients too."""
    _, _, layout = packed(ROWS, 36, 10)
    q, k, v = (x.requires_grad_() for x in random_heads(36))
    found = document_attention_cpu(q, k, v, layout)
    ids = layout.document_ids_BT
    sees = torch.ones(36, 36, dtype=torch.bool).tril() & (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
    keys, values = (x.double().repeat_interleave(3, dim=2) for x in (k, v))
    scores = torch.einsum("bqnh,bknh->bnqk", q.double(), keys) / 4.0
    weights = torch.softmax(scores.masked_fill(~sees[:, None], float("-inf")), -1).nan_to_num(0.0)
    expected = torch.einsum("bnqk,bknh->bqnh", weights, values)
    assert (found - expected).abs().max() <= 1e-6
    assert (found[ids < 0] == 0).all()
    ours = torch.autograd.grad(found.square().sum(), (q, k, v))
    assert all(torch.isfinite(gradient).all() and (gradient[ids < 0] == 0).all() for gradient in ours)


@torch.no_grad()
def test_the_gpu_mask_says_what_the_cpu_kernel_does() -> None:
    """The block mask of FlexAttention, evaluated on CPU without fusing."""
    _, _, layout = packed(ROWS, 36, 10)
    q, k, v = random_heads(36)
    mask = document_block_mask(layout, torch.device("cpu"))
    assert document_block_mask(layout, torch.device("cpu")) is mask
    found = flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, enable_gqa=True)
    assert isinstance(found, torch.Tensor)
    is_document = layout.document_ids_BT >= 0
    assert torch.isfinite(found).all()
    assert (found.transpose(1, 2) - document_attention_cpu(q, k, v, layout))[is_document].abs().max() <= 1e-6

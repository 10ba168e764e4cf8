"""Every attention kernel has the same meaning: a query sees the keys of its own document up to itself, within the window."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from lib.models.layers import attention_cpu
from lib.models.layers.attention_cpu import document_attention_cpu
from lib.models.layers.attention_gpu import attend_with, document_block_mask
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.scores import Scores
from tests.lib.models.batches import packed

ROWS = [[9, 1, 17, 5], [23, 9], [36], []]
T = 36
"""Length of the longest document."""
SINKS = torch.tensor([-1.0, 0.0, 0.5, 3.0, -4.0, 1.0])
KINDS = {
    "plain": Scores(0.25),
    "scale": Scores(0.7),
    "softcap": Scores(0.25, softcap=0.8),
    "sinks": Scores(0.25, sinks_N=SINKS),
    "all": Scores(0.3, window=5, softcap=0.8, sinks_N=SINKS),
    **{f"window {window}": Scores(0.25, window=window) for window in (1, 2, 16, T - 1, T)},
    **{f"window {window} and sinks": Scores(0.25, window=window, sinks_N=SINKS) for window in (1, 2, 16, T - 1, T)},
}
"""[B6] The windows are one, two, some, all but one and all keys of the longest document."""


def random_heads(num_columns: int, num_heads: tuple[int, ...] = (6, 2, 2)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(ROWS), num_columns, heads, 16, generator=generator) for heads in num_heads]


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: DocumentLayout, scores: Scores) -> torch.Tensor:
    """Dense, in float64; query head n reads key head n // 3. A sink is one more score, of a key that holds nothing."""
    ids = layout.document_ids_BT
    query, key = torch.arange(T)[:, None], torch.arange(T)[None, :]
    sees = (key <= query) & (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
    if scores.window is not None:
        sees &= query - key < scores.window
    keys, values = (x.double().repeat_interleave(3, dim=2) for x in (k, v))
    raw = torch.einsum("bqnh,bknh->bnqk", q.double(), keys) * scores.scale
    raw = raw if scores.softcap is None else scores.softcap * torch.tanh(raw / scores.softcap)
    exp = torch.where(sees[:, None], raw.exp(), 0.0)
    total = exp.sum(-1, keepdim=True)
    total = total if scores.sinks_N is None else total + scores.sinks_N.double().exp()[:, None, None]
    return torch.einsum("bnqk,bknh->bqnh", torch.where(total > 0, exp / total, 0.0), values)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads", "new_memory_is_nan")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("block", "kept", "fused"), [(4, 6, 20), (64, 512, 1024)])
def test_the_cpu_kernel_is_the_definition(
    kind: str, block: int, kept: int, fused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients of q, k, v and sinks; zero on padding; nothing of what memory held before. In blocks of few
    queries, with probabilities made again and the longer documents in the fused kernel; and with all documents of a row in a
    block; with one thread and with several."""
    monkeypatch.setattr(attention_cpu, "BLOCK_QUERIES", block)
    monkeypatch.setattr(attention_cpu, "KEPT_KEYS", kept)
    monkeypatch.setattr(attention_cpu, "FUSED_TOKENS", fused)
    _, _, layout = packed(ROWS, T, 10)
    q, k, v = (x.requires_grad_() for x in random_heads(T))
    scores, leaves = KINDS[kind], [q, k, v]
    if scores.sinks_N is not None:
        sinks = scores.sinks_N.clone().requires_grad_()
        scores, leaves = Scores(scores.scale, scores.window, scores.softcap, sinks), [*leaves, sinks]
    found, expected = document_attention_cpu(q, k, v, layout, scores), by_definition(q, k, v, layout, scores)
    assert (found - expected).abs().max() <= 1e-6
    assert (found[layout.document_ids_BT < 0] == 0).all()
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream.double())
    for one, other in zip(ours, theirs):
        assert (one - other).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_gpu_kernel_is_the_definition(kind: str) -> None:
    """FlexAttention with our block mask, cap and sinks, evaluated on CPU without fusing."""
    _, _, layout = packed(ROWS, T, 10)
    q, k, v = random_heads(T)
    found = attend_with(flex_attention, q, k, v, layout, KINDS[kind])
    assert torch.isfinite(found).all() and (found[layout.document_ids_BT < 0] == 0).all()
    assert (found - by_definition(q, k, v, layout, KINDS[kind])).abs().max() <= 1e-6


def test_a_mask_is_made_once_for_a_window() -> None:
    _, _, layout = packed(ROWS, T, 10)
    first, other = (document_block_mask(layout, window, torch.device("cpu")) for window in (3, None))
    assert document_block_mask(layout, 3, torch.device("cpu")) is first and first is not other


@pytest.mark.parametrize("tokens", [300, 600])
def test_memory_grows_with_the_tokens(tokens: int) -> None:
    """[B6] What the backward pass is left with: inputs, and of each query at most KEPT_KEYS probabilities a head, not its
    whole document's."""
    layout = DocumentLayout.from_document_ids(torch.zeros(1, tokens, dtype=torch.int64))
    q, k, v = (torch.randn(1, tokens, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        document_attention_cpu(q, k, v, layout, Scores(0.25))
    assert q.numel() < kept <= q.numel() + k.numel() + v.numel() + tokens * 4 * attention_cpu.KEPT_KEYS


@torch.no_grad()
def test_without_gradients_no_probabilities_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """[B6] When a block's are made, those of at most the block before are there still."""
    made: list[weakref.ref[torch.Tensor]] = []
    weights = attention_cpu._weights

    def watch(*args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert sum(known() is not None for known in made) <= 1
        found = weights(*args)
        made.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(attention_cpu, "_weights", watch)
    layout = DocumentLayout.from_document_ids(torch.zeros(1, 300, dtype=torch.int64))
    q, k, v = (torch.randn(1, 300, heads, 8) for heads in (4, 2, 2))
    document_attention_cpu(q, k, v, layout, Scores(0.25))
    assert len(made) > 3

"""Blocks of queries say what the definition says: a query sees its own document up to itself, within the window."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.models.layers.blocks import Block, cut
from tests.lib.models.batches import packed

ROWS = st.lists(st.lists(st.integers(1, 12), max_size=5).filter(lambda lengths: sum(lengths) <= 24), min_size=1, max_size=3)
WINDOWS = st.none() | st.integers(1, 30)


def seen_by(block: Block) -> torch.Tensor:
    """[Q, L] whether a query of the block sees a key."""
    sees = torch.zeros(block.num_queries, block.num_keys)
    for keys, hidden in block.hidden:
        sees[:, keys] += hidden
    return sees == 0


@given(rows=ROWS, window=WINDOWS, block_queries=st.integers(1, 30), fused_tokens=st.none() | st.integers(1, 12))
def test_each_pair_is_seen_once(
    rows: list[list[int]], window: int | None, block_queries: int, fused_tokens: int | None
) -> None:
    """[B1] Pieces cover all tokens; no block is too large, and none has padding."""
    _, _, layout = packed(rows, 24, 10)
    unique_BT = layout.document_ids_BT + 100 * torch.arange(len(rows))[:, None]
    ids = torch.where(layout.document_ids_BT < 0, -1, unique_BT).flatten()
    query, key = torch.arange(len(ids))[:, None], torch.arange(len(ids))
    expected = (key <= query) & (ids == ids[:, None]) & (ids[:, None] >= 0)
    expected &= query - key < (window or len(ids))
    counts = torch.zeros(len(ids), len(ids), dtype=torch.int64)
    cursor = 0
    for piece in cut(layout, window, block_queries=block_queries, fused_tokens=fused_tokens):
        whole = slice(cursor, cursor + piece.num_tokens)
        if piece.fused:
            assert fused_tokens is not None and fused_tokens < piece.num_tokens <= (window or piece.num_tokens)
            counts[whole, whole] += torch.ones(piece.num_tokens, piece.num_tokens, dtype=torch.int64).tril()
        for block in piece.blocks:
            assert 0 < block.num_queries <= block_queries and 0 <= block.first <= block.start
            counts[cursor + block.start : cursor + block.end, cursor + block.first : cursor + block.end] += seen_by(block)
        runs = [(block.start, block.end) for block in piece.blocks] + [(run.start, run.stop) for run in piece.padding]
        covered = sorted(token for start, end in runs for token in range(start, end))
        assert covered == list(range(0 if piece.fused else piece.num_tokens)), "each token is in one block or padding"
        keys = [(block.first, block.end) for block in piece.blocks]
        assert keys == sorted(keys, key=lambda run: run[1]) == sorted(keys, key=lambda run: run[0])
        cursor += piece.num_tokens
    assert cursor == len(ids)
    assert torch.equal(counts, expected.long())

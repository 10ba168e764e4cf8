"""The FLOP count is the one that torch counts."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lib.models.decoder import Decoder
from lib.models.flops import attended_pairs, flops_per_step
from lib.models.spec import DecoderSpec, MoeSpec, Rope
from tests.lib.models.batches import logits, packed

SHARED: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_positions": 128,
    "rope": Rope(1e4),
    "norm_eps": 1e-5,
    "tied": True,
}
SPECS = {
    "dense": DecoderSpec(**SHARED),
    "windows": DecoderSpec(**SHARED, windows=(3, None, 16)),
    "norms and sinks": DecoderSpec(**SHARED, qk_norm="head", norm_order="both", sinks=True),
    "experts": DecoderSpec(**SHARED, moe=MoeSpec((0, 2), num_experts=6, top_k=2, intermediate_size=20, weights="softmax")),
}
LENGTHS = [10, 6, 16]


def traced_attention(spec: DecoderSpec) -> int:
    """Operations that torch counts when each query is multiplied with exactly the keys that it sees, forward and backward.

    The decoder's own calls can't be counted: torch takes whole squares, whatever the kernel leaves out.
    """
    with FlopCounterMode(display=False) as counter:
        for layer in range(spec.num_layers):
            for length in LENGTHS:
                q, k, v = (torch.randn(spec.num_heads, length, spec.head_dim, requires_grad=True) for _ in range(3))
                window = spec.window(layer) or length
                for query in range(length):
                    seen = slice(max(0, query + 1 - window), query + 1)
                    weights = (q[:, query : query + 1] @ k[:, seen].mT).softmax(-1)
                    torch.autograd.backward((weights @ v[:, seen]).sum())
    return int(counter.get_total_flops())


@pytest.mark.parametrize("kind", SPECS)
def test_the_count_is_the_traced_one(kind: str) -> None:
    """Within 1 %: products of layers, experts and head as the decoder runs them, and attention as above."""
    spec = SPECS[kind]
    decoder = Decoder(spec)
    token_ids, positions, layout = packed([LENGTHS[:2], LENGTHS[2:]], 16, 64)  # no padding
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(logits(decoder, token_ids, positions, layout).sum())
    products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
    traced = sum(counter.get_flop_counts()["Global"].get(product, 0) for product in products) + traced_attention(spec)
    ours = flops_per_step(spec, num_tokens=32, num_attended_pairs=attended_pairs(spec, LENGTHS), num_targets=32)
    assert ours == pytest.approx(traced, rel=0.01)


@given(st.lists(st.integers(1, 40), max_size=5), st.lists(st.sampled_from([None, 1, 2, 7, 40, 100]), min_size=3, max_size=3))
def test_pairs_are_those_of_the_definition(lengths: list[int], windows: list[int | None]) -> None:
    """[B6] A key is seen that is not later than the query, and nearer than the window."""
    spec = DecoderSpec(**SHARED, windows=tuple(windows))
    expected = sum(
        key <= query and (window is None or query - key < window)
        for window in windows
        for length in lengths
        for query in range(length)
        for key in range(length)
    )
    assert attended_pairs(spec, lengths) == expected


def test_attention_costs_two_products_for_each_pair_and_pass() -> None:
    """One document of 8 tokens has 36 pairs in each of 3 layers: x 4 heads of 16 channels x 2 products x 2 x 3 passes."""
    spec = SPECS["dense"]
    found = flops_per_step(spec, num_tokens=0, num_attended_pairs=attended_pairs(spec, [8]), num_targets=0)
    assert found == 3 * 36 * 4 * 16 * 2 * 2 * 3

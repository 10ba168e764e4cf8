"""The FLOP count is the one that torch counts, and counts what is trained only."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.flops import HEADS, kinds, measure
from lib.config.model import LoraConfig
from lib.models.families import FAMILIES
from lib.models.flops import FlopCounter
from lib.models.spec import DecoderSpec, MoeSpec, Rope
from lib.models.verify_configs import random_case

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
    **{family: random_case(family, 0, 1).spec for family in FAMILIES},
}


@pytest.mark.parametrize("name", SPECS)
def test_the_count_is_the_traced_one(name: str) -> None:
    """Within 1 %, with all weights trained and with every kind of LoRA."""
    for kind, lora in kinds(SPECS[name]).items():
        count = measure(SPECS[name], lora)
        assert count.off <= 0.01, f"{kind}: counted {count.counted}, traced {count.traced}"


@pytest.mark.parametrize("head", HEADS)
def test_the_count_with_heads_is_the_traced_one(head: str) -> None:
    """Within 1 %: in place of the language model's head and beside it, by document and by token, on frozen layers too."""
    for spec in (SPECS["dense"], SPECS["experts"]):
        for lora in (None, LoraConfig(rank=4)):
            count = measure(spec, lora, HEADS[head])
            assert count.off <= 0.01, f"{lora}: counted {count.counted}, traced {count.traced}"


@given(st.lists(st.integers(1, 40), max_size=5), st.lists(st.sampled_from([None, 1, 2, 7, 40, 100]), min_size=3, max_size=3))
def test_pairs_are_those_of_the_definition(lengths: list[int], windows: list[int | None]) -> None:
    """[B6] A key is seen that is not later than the query, and nearer than the window; six products when all is trained."""
    spec = DecoderSpec(**SHARED, windows=tuple(windows))
    expected = sum(
        key <= query and (window is None or query - key < window)
        for window in windows
        for length in lengths
        for query in range(length)
        for key in range(length)
    )
    assert FlopCounter(spec).attention_products(lengths) == 6 * expected


def test_attention_costs_two_products_for_each_pair_and_pass() -> None:
    """One document of 8 tokens has 36 pairs in each of 3 layers: x 4 heads of 16 channels x 2 products x 2 x 3 passes."""
    counter = FlopCounter(SPECS["dense"])
    found = counter.step(num_tokens=0, num_attention_products=counter.attention_products([8]), num_targets=0)
    assert found == 3 * 36 * 4 * 16 * 2 * 2 * 3


def test_a_frozen_matrix_costs_two_thirds() -> None:
    """Of 3 layers with adapters of rank 1 on the last matrix of an MLP: the first layer has a forward pass up to there and no
    backward; its MLP's down gives no gradient to its input. Worked out for one token and no attention."""
    hidden, inner, query, kv = 32, 48, 64, 32
    attention = hidden * (2 * query + 2 * kv)
    first = attention + 2 * hidden * inner + inner * hidden * 1 + (inner * 2 + hidden * 3)
    later = 2 * (attention + 3 * hidden * inner) + (inner * 3 + hidden * 3)
    head = 64 * hidden * 2
    counter = FlopCounter(SPECS["dense"], LoraConfig(rank=1, targets=("down",)))
    assert counter.step(num_tokens=1, num_attention_products=0, num_targets=1) == 2 * (first + 2 * later + head)


def test_a_head_costs_three_products_for_each_of_its_outputs() -> None:
    """Five labels of one document on 32 channels: forward, gradient of the input, gradient of the weight. No vocabulary."""
    counter = FlopCounter(SPECS["dense"], heads=HEADS["classification head"])
    found = counter.step(num_tokens=0, num_attention_products=0, num_targets=7, num_documents=1)
    assert found == 2 * 5 * 32 * 3

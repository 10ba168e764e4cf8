"""Laws of the memory model: pieces add up to the whole, more of anything needs no less, activations are what autograd keeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config.model import LoraConfig, ModelConfig
from lib.models.decoder import DecoderLayer
from lib.models.families import FAMILIES
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.rotary import rotary_tables
from lib.models.spec import DecoderSpec, MoeSpec, Rope
from lib.models.verify_configs import random_case
from lib.parallel.memory_model import ROOT, BatchShape, activation_bytes, decoder_units, estimate_memory, part_of_layers

DENSE = DecoderSpec(
    family="llama", vocab_size=128, hidden_size=96, intermediate_size=160, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=24, max_positions=4096, rope=Rope(1e4), norm_eps=1e-5, tied=False,
)  # fmt: skip
EXPERTS = replace(DENSE, moe=MoeSpec((0, 1, 2), num_experts=8, top_k=2, intermediate_size=48, weights="softmax"))
BATCH = BatchShape(rows=2, sequence_length=256)
FULL = ModelConfig()


def total(spec: DecoderSpec = DENSE, config: ModelConfig = FULL, batch: BatchShape = BATCH, **sizes: int) -> float:
    return estimate_memory(spec, config, {"shard": 1, **sizes}, batch, on_gpu=True).total


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_is_in_one_unit(family: str) -> None:
    """Layers and root together are the decoder; padded rows are held, too."""
    for index in range(3):
        spec = random_case(family, 0, index).spec
        units = decoder_units(spec, None)
        padding = (spec.num_rows - spec.vocab_size) * spec.hidden_size * (1 if spec.tied else 2)
        assert sum(unit.trained for unit in units.values()) == spec.num_parameters + padding
        assert units.keys() == {ROOT, *range(spec.num_layers)}


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_shards_add_up_to_the_whole(shard: int, replicate: int, tensor: int) -> None:
    """Weights, moments and gradients of all ranks: a copy for each replica; cutting layers adds the vectors of other ranks."""
    sizes = {"replicate": replicate, "shard": shard, "tensor": tensor}
    whole = estimate_memory(DENSE, FULL, {"shard": 1}, BATCH, on_gpu=True)
    piece = estimate_memory(DENSE, FULL, sizes, BATCH, on_gpu=True)
    for name in ("parameters", "optimizer"):
        assert replicate * shard * tensor * getattr(piece, name) == pytest.approx(
            replicate * getattr(whole, name), rel=0.02 if tensor > 1 else 1e-9
        )


@pytest.mark.parametrize(("shard", "expert"), [(1, 1), (4, 1), (2, 4), (1, 8)])
def test_experts_are_kept_once(shard: int, expert: int) -> None:
    """Ranks of the expert axis keep different experts, and different pieces of all else: together, one copy."""
    sizes = {"replicate": 1, "shard": shard, "expert": expert}
    whole = estimate_memory(EXPERTS, FULL, {"shard": 1}, BATCH, on_gpu=True)
    piece = estimate_memory(EXPERTS, FULL, sizes, BATCH, on_gpu=True)
    assert shard * expert * piece.parameters == pytest.approx(whole.parameters)
    assert shard * expert * piece.optimizer == pytest.approx(whole.optimizer)


def test_ranks_of_a_layer_share_what_is_inside_it() -> None:
    """Half of each matrix, and of the numbers within attention and MLP; what goes in and comes out is whole on both."""
    alone, halved = (decoder_units(DENSE, None, tensor)[0].total for tensor in (1, 2))
    matrices = 96 * (2 * 4 + 2 * 2) * 24 + 3 * 96 * 160
    assert alone - halved == matrices / 2
    kept = [activation_bytes(part_of_layers(DENSE, tensor), 4, 8192, on_gpu=True)[0] for tensor in (1, 2)]
    inside = 4 * (3 * 4 + 2 * 2) * 24 + 4 * 4 + 4 * 4 * 160
    assert kept[0] - kept[1] == inside / 2


def test_experts_are_dealt_out() -> None:
    alone, dealt = (decoder_units(EXPERTS, None, 1, expert)[0].total for expert in (1, 4))
    experts = 8 * 3 * 96 * 48
    assert alone - dealt == experts * 3 / 4


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5))
def test_more_needs_no_less(seed: int) -> None:
    """Rows, tokens, layers, width, vocabulary, chunk, float32 raise it; shards, cuts, recomputing and adapters lower it."""
    rows = 1 + seed
    here = BatchShape(rows=rows, sequence_length=128)
    base = total(batch=here)
    more = [
        total(batch=replace(here, rows=rows + 1)),
        total(batch=replace(here, sequence_length=256)),
        total(batch=replace(here, micro_batches=2)),
        total(batch=replace(here, micro_batches=2, reduced="each_micro_batch")),
        total(replace(DENSE, num_layers=4), batch=here),
        total(replace(DENSE, intermediate_size=320), batch=here),
        total(replace(DENSE, vocab_size=1280), batch=here),
        total(config=ModelConfig(compute_dtype="float32"), batch=here),
        total(EXPERTS, batch=here),
    ]
    less = [
        total(batch=here, tensor=2),
        total(config=ModelConfig(activation_checkpointing="layer"), batch=here),
        total(config=ModelConfig(activation_checkpointing="selective"), batch=here),
        total(config=ModelConfig(lora=LoraConfig(rank=2)), batch=here),
        total(config=ModelConfig(loss_chunk_tokens=16), batch=here),
    ]
    assert min(more) >= base >= max(less)
    sharded = [total(batch=here, shard=shard) for shard in (2, 4, 8, 64)]
    assert sharded == sorted(sharded, reverse=True)


@pytest.mark.parametrize(("replicate", "shard", "expert"), [(1, 4, 1), (2, 4, 1), (1, 2, 4), (1, 1, 1)])
def test_gradients_are_whole_until_they_are_summed_up(replicate: int, shard: int, expert: int) -> None:
    """Of 4 bytes a number that a rank computes with: all of them while micro-batches are added up and summed up in the last
    one, its pieces if in each, nothing if there is one micro-batch. Of a step so long that activations are the most."""
    sizes = {"replicate": replicate, "shard": shard, "expert": expert}
    units = decoder_units(EXPERTS, None, 1, expert).values()
    whole, pieces = (4 * sum(numbers) for numbers in zip(*((unit.trained, unit.pieces(sizes)[0]) for unit in units)))
    long = BatchShape(rows=1, sequence_length=1 << 16)
    found = [
        estimate_memory(EXPERTS, FULL, sizes, replace(long, micro_batches=number, reduced=reduced), on_gpu=True).gradients
        for number, reduced in ((1, "each_step"), (1, "each_micro_batch"), (2, "each_step"), (3, "each_micro_batch"))
    ]
    assert found == pytest.approx([0.0, 0.0, whole, pieces])
    assert whole == pytest.approx(pieces) if shard == expert == 1 else whole > 2 * pieces


def kept_by_autograd(spec: DecoderSpec, dtype: torch.dtype, num_tokens: int) -> float:
    """Bytes for each token that a layer's forward pass leaves behind: storages saved for backward, each once."""
    layer = DecoderLayer(spec, 0).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    positions = torch.arange(num_tokens)[None]
    layout = DocumentLayout.from_document_ids(torch.zeros_like(positions))
    tables = rotary_tables(spec.rope, spec.head_dim, positions)
    others = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *tables)}
    storages: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in others:
            storages[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    x = torch.randn(1, num_tokens, spec.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x, tables, layout)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) / num_tokens


CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms of heads": {"qk_norm": "head"},
    "norms after": {"qk_norm": "all", "norm_order": "post"},
    "norms with an offset": {"norm_order": "both", "norm_offset": 1.0},
    "experts": {"moe": EXPERTS.moe},
    "windows and sinks": {"windows": (100, None, None), "sinks": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("num_tokens", [200, 900])
def test_activations_are_what_autograd_keeps(num_tokens: int, change: dict[str, Any], dtype: torch.dtype) -> None:
    """Within 6 % on CPU, for dense layers and experts, all norms, in both dtypes, a document in blocks and in one call."""
    spec = replace(DENSE, **change)
    expected = kept_by_autograd(spec, dtype, num_tokens)
    found = activation_bytes(spec, torch.finfo(dtype).bits // 8, num_tokens, on_gpu=False)[0]
    assert found == pytest.approx(expected, rel=0.06)

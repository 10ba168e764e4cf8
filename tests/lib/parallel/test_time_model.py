"""Laws of the time model: its products are the counted ones, transfers vanish alone, more of anything takes no less time."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config.model import ModelConfig
from lib.models.flops import FlopCounter
from lib.parallel.devices import DEVICES, Device, known_device
from lib.parallel.memory_model import BatchShape
from lib.parallel.time_model import LINK_SHARE, Machines, StepEstimate, estimate_step, transfer_seconds
from tests.lib.parallel.test_memory_model import DENSE, EXPERTS

H100 = Machines(DEVICES["H100"], per_node=8)
BATCH = BatchShape(rows=1, sequence_length=256)


def step(batch: BatchShape = BATCH, config: ModelConfig | None = None, **sizes: int) -> StepEstimate:
    all_sizes = {"replicate": 1, "shard": 1, "expert": 1, "context": 1, "tensor": 1, **sizes}
    return estimate_step(DENSE, config or ModelConfig(), all_sizes, batch, machines=H100, efficiency=0.5)


def test_one_rank_computes_the_counted_products_and_transfers_nothing() -> None:
    counter, found = FlopCounter(DENSE), step()
    flops = counter.step(num_tokens=256, num_attention_products=counter.attention_products([256]), num_targets=256)
    assert found.flops == flops and found.exposed_seconds == 0.0
    assert found.seconds == pytest.approx(flops / (989e12 * 0.5))
    assert found.mfu(1, DEVICES["H100"]) == pytest.approx(0.5)


def test_a_gather_takes_its_bytes_over_the_slowest_link() -> None:
    """16 ranks on 2 nodes: 15/16 of the weights come in over 8 network adapters of 50 GB/s, which is less than the links' 450.
    Two ranks that stand on two nodes have one adapter each."""
    machines = Machines(replace(DEVICES["H100"], latency_seconds=0.0), per_node=8)
    whole = DENSE.num_parameters
    layers = whole - 2 * 128 * 96 - 96
    moved = 2 * (2 * layers + (whole - layers)) + 4 * whole
    sharded = transfer_seconds(DENSE, ModelConfig(), {"shard": 16}, BATCH, machines)
    assert sharded.shards == pytest.approx(moved * 15 / 16 / (8 * 50e9 * LINK_SHARE))
    copies = transfer_seconds(DENSE, ModelConfig(), {"replicate": 2, "shard": 8}, BATCH, machines)
    on_node = moved * 7 / 8 / (450e9 * LINK_SHARE)
    assert copies.shards == pytest.approx(on_node + 2 * (4 * whole / 8) / 2 / (50e9 * LINK_SHARE))


def test_gradients_travel_once_a_step_or_in_each_micro_batch() -> None:
    """Three micro-batches: weights are gathered for each. Shards are summed up once, or three times; copies once."""
    machines = Machines(replace(DEVICES["H100"], latency_seconds=0.0), per_node=8)
    sizes, batch = {"replicate": 2, "shard": 8}, replace(BATCH, micro_batches=3)
    once = transfer_seconds(DENSE, ModelConfig(), sizes, batch, machines).shards
    each = transfer_seconds(DENSE, ModelConfig(), sizes, replace(batch, reduced="each_micro_batch"), machines).shards
    assert each - once == pytest.approx(2 * 4 * DENSE.num_parameters * 7 / 8 / (450e9 * LINK_SHARE))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 8, 16, 64]), st.sampled_from([1, 2, 4]), st.integers(1, 4))
def test_more_takes_no_less(shard: int, tensor: int, rows: int) -> None:
    """Rows, recomputing, accumulation raise the seconds; a faster link or device lowers them; MFU stays below efficiency."""
    sizes = {"shard": shard, "tensor": tensor}
    batch = BatchShape(rows=rows, sequence_length=256)
    base = step(batch, **sizes)
    assert step(replace(batch, rows=rows + 1), **sizes).seconds >= base.seconds
    twice = replace(batch, micro_batches=2)
    assert step(replace(twice, reduced="each_micro_batch"), **sizes).seconds >= step(twice, **sizes).seconds > base.seconds
    assert step(batch, ModelConfig(activation_checkpointing="layer"), **sizes).seconds >= base.seconds
    assert base.mfu(shard * tensor, DEVICES["H100"]) <= 0.5 + 1e-9
    fast = Machines(replace(DEVICES["H100"], network_bytes=500e9, link_bytes=4500e9, latency_seconds=0.0), per_node=8)
    all_sizes = {"replicate": 1, "shard": shard, "expert": 1, "context": 1, "tensor": tensor}
    assert estimate_step(DENSE, ModelConfig(), all_sizes, batch, machines=fast, efficiency=0.5).seconds <= base.seconds


def test_weak_scaling_keeps_the_work_of_a_rank() -> None:
    """Twice the ranks, twice the tokens and products, the same products of each rank."""
    one, eight = step(shard=1), step(shard=8)
    assert (eight.flops, eight.tokens) == (8 * one.flops, 8 * one.tokens)
    assert eight.compute_seconds == pytest.approx(one.compute_seconds)
    assert eight.seconds >= one.seconds


def test_experts_exchange_tokens_only_across_ranks() -> None:
    def experts(expert: int) -> float:
        sizes = {"replicate": 1, "shard": 4 // expert, "expert": expert, "context": 1, "tensor": 1}
        return transfer_seconds(EXPERTS, ModelConfig(), sizes, BATCH, H100).experts

    assert experts(1) == 0.0 < experts(2) < experts(4)


def test_a_device_is_known_by_its_own_name() -> None:
    found = {name: known_device(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA H200", "Radeon")}
    assert [device and device.name for device in found.values()] == ["H100", "GH200", "H200", None]
    assert isinstance(found["NVIDIA H200"], Device) and found["NVIDIA H200"].memory_bytes > 140 * 2**30

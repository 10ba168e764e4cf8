"""Laws of the forecast of a job: its counts are those of the configuration, cutting the job differently loses nothing."""

from typing import Any

import pytest

from lib.config.recipes import SftJob
from lib.models.flops import FlopCounter
from lib.models.shapes import CONFIGS, spec_of_shape
from lib.parallel.devices import DEVICES, GIB
from lib.train.forecast import HEADROOM, Forecast, forecast

H100 = DEVICES["H100"]
PUBLISHED = {"smollm2-135m": 0.1345, "llama-3.1-8b": 8.03, "qwen3-0.6b": 0.596, "qwen3-8b": 8.19, "qwen3-30b-a3b": 30.53}
"""Billions of parameters, as their model cards have them."""


def planned(name: str = "qwen3-0.6b", nodes: int = 1, gpus: int = 8, **sections: dict[str, Any]) -> Forecast:
    train = {"rows_per_step": 64} | sections.pop("train", {})
    size = {"learning_rate": 1e-5, "steps": 10, "sequence_length": 1024, "nodes": nodes, "gpus_per_node": gpus}
    config = {"optim": {"warmup_steps": 1}, "train": train, **sections}
    job = SftJob.parse({**size, "config": config}, where="test")
    return forecast(job, spec_of_shape(name), H100, room_bytes=H100.memory_bytes, efficiency=0.5)


@pytest.mark.parametrize("name", CONFIGS)
def test_published_shapes_have_their_published_size(name: str) -> None:
    assert spec_of_shape(name).num_parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=2e-3)


def test_a_job_is_its_steps() -> None:
    """10 steps of 64 rows of 1,024 tokens, 8 micro-batches on each of 8 ranks; products as the counter has them."""
    found = planned()
    assert found.tokens == 10 * 64 * 1024 == 10 * found.step.tokens
    assert (found.batch.rows, found.batch.micro_batches, found.mesh["shard"]) == (1, 8, 8)
    counter = FlopCounter(spec_of_shape("qwen3-0.6b"))
    products = counter.attention_products([1024] * 64)
    assert found.step.flops == counter.step(num_tokens=1 << 16, num_attention_products=products, num_targets=1 << 16)
    values = found.to_json()
    assert values["flops"] == 10 * found.step.flops and values["seconds"] == 10 * found.step.seconds


def test_the_cut_changes_neither_tokens_nor_products() -> None:
    """1, 8 and 64 GPUs, and copies of the shards: the same step, in less time, with less or as much memory for each."""
    found = [planned(gpus=1), planned(), planned(nodes=8), planned(nodes=8, parallel={"replicate": 8})]
    assert len({(one.tokens, one.step.flops) for one in found}) == 1
    alone, node, cluster, copies = found
    assert alone.step.seconds > node.step.seconds > cluster.step.seconds
    assert alone.memory.optimizer == 8 * node.memory.optimizer == 64 * cluster.memory.optimizer
    assert copies.memory.optimizer == node.memory.optimizer
    assert [one.saved_bytes for one in (alone, node)] == pytest.approx(
        [12 * alone.parameters, 12 * alone.parameters / 8], rel=1e-3
    )


def test_a_job_fits_where_its_memory_does() -> None:
    """96 GB of weights and moments: not on one GPU of 80 GiB, on eight. Adapters fit on one."""
    short = {"train": {"rows_per_step": 8}}
    assert not planned("llama-3.1-8b", gpus=1, **short).fits
    assert planned("llama-3.1-8b", gpus=8, model={"activation_checkpointing": "layer"}, **short).fits
    adapted = planned("llama-3.1-8b", gpus=1, model={"activation_checkpointing": "layer", "lora": {"rank": 8}}, **short)
    assert adapted.fits and adapted.trained_parameters < adapted.parameters / 100
    assert adapted.needed_bytes < HEADROOM * 80 * GIB

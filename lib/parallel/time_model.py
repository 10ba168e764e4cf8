"""How long a training step takes, from shapes and a device's data sheet: products by their number, transfers by their bytes.

A step is its products at a share of the device's peak (`efficiency`, the one number that is not computed but measured), and
the transfers that don't hide behind them. A collective of n ranks moves (n - 1) / n of its bytes through each of them, twice
for a sum that all get, at the rate of the slowest link on the way; and costs a latency for each doubling of n.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lib.config.model import ModelConfig
from lib.models.flops import FlopCounter
from lib.models.spec import DecoderSpec
from lib.parallel.devices import Device
from lib.parallel.memory_model import ROOT, BatchShape, decoder_units

LINK_SHARE = 0.8
"""Of a link's data sheet that large collectives reach."""
REDUCED_BYTES = 4


@dataclass(frozen=True)
class Machines:
    """How many of which device, and how they are joined."""

    device: Device
    per_node: int
    """Ranks on a node."""


@dataclass(frozen=True)
class Transfers:
    """Seconds of a step's collectives, each kind alone."""

    shards: float
    """Gathering weights, summing gradients."""
    tensor: float
    """Sums within each layer: nothing can be computed meanwhile."""
    experts: float
    """Tokens to their experts and back, likewise."""


@dataclass(frozen=True)
class StepEstimate:
    """Of one optimizer step."""

    flops: int
    """Over all ranks."""
    compute_seconds: float
    transfers: Transfers
    exposed_seconds: float
    """Of the transfers: those that nothing hides."""
    tokens: int
    """Over all ranks."""

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def mfu(self, num_ranks: int, device: Device) -> float:
        return self.flops / self.seconds / (num_ranks * device.flops)


def estimate_step(
    spec: DecoderSpec,
    config: ModelConfig,
    sizes: Mapping[str, int],
    batch: BatchShape,
    *,
    machines: Machines,
    efficiency: float,
) -> StepEstimate:
    """The step of all ranks together; see the module's text.

    Args:
        sizes: axis -> ranks, the outermost first, as `ParallelConfig.sizes` gives them.
        efficiency: share of the device's peak that products reach while nothing is transferred.
    """
    num_ranks = math.prod(sizes.values())
    same_rows = sizes.get("tensor", 1) * sizes.get("context", 1)
    counter, data_ranks = FlopCounter(spec, config.lora), num_ranks // same_rows
    tokens = batch.tokens * batch.micro_batches * data_ranks
    length = min(batch.document_tokens or batch.sequence_length, batch.sequence_length)
    flops = counter.step(
        num_tokens=tokens,
        num_attention_products=counter.attention_products([length]) * (tokens // length),
        num_targets=round(tokens * batch.target_share),
    )
    # Recomputing a layer is a forward pass more, a third of its work with all weights trained; the count leaves it out.
    # Recomputing all but its products with weights is next to nothing.
    worked = flops * (4 / 3 if config.activation_checkpointing == "layer" else 1.0)
    compute = worked / (num_ranks * machines.device.flops * efficiency)
    transfers = transfer_seconds(spec, config, sizes, batch, machines)
    # Before the first layer is gathered, and after the last one's gradient is there, nothing is left to compute meanwhile.
    hidden = min(compute, transfers.shards * spec.num_layers / (spec.num_layers + 1)) if machines.device.overlaps else 0.0
    exposed = transfers.shards - hidden + transfers.tensor + transfers.experts
    return StepEstimate(flops, compute, transfers, exposed, tokens)


def transfer_seconds(
    spec: DecoderSpec, config: ModelConfig, sizes: Mapping[str, int], batch: BatchShape, machines: Machines
) -> Transfers:
    """Of a step, if nothing else were done."""
    compute = 2 if config.compute_dtype == "bfloat16" else 4
    units = decoder_units(spec, config.lora, sizes.get("tensor", 1), sizes.get("expert", 1))
    # Ranks of the expert axis hold different experts, and are as good as more shards of everything else.
    spread = {**sizes, "shard": sizes["shard"] * sizes.get("expert", 1), "expert": 1}
    shards = 0.0
    for number, unit in units.items():
        sums = batch.micro_batches if batch.reduced == "each_micro_batch" else 1  # those of copies are one anyway
        gathers = batch.micro_batches * (2 if machines.device.is_gpu and number != ROOT else 1)
        for axes, gathered, summed in (
            (spread, unit.total - unit.experts, unit.trained - unit.trained_experts),
            (sizes, unit.experts, unit.trained_experts),
        ):
            shards += gathers * _seconds(compute * gathered, axes, "shard", machines)
            shards += sums * _seconds(REDUCED_BYTES * summed, axes, "shard", machines)
            shards += 2 * _seconds(REDUCED_BYTES * summed / axes["shard"], axes, "replicate", machines)
    hidden = compute * batch.tokens * spec.hidden_size
    passes = batch.micro_batches * (2 if config.activation_checkpointing == "none" else 3)
    in_layers = 2 * 2 * passes * spec.num_layers * _seconds(hidden, sizes, "tensor", machines)
    to_experts = 0.0
    if spec.moe is not None:
        to_experts = 2 * passes * len(spec.moe.layers) * _seconds(hidden * spec.moe.top_k, sizes, "expert", machines)
    return Transfers(shards, in_layers, to_experts)


def _seconds(num_bytes: float, sizes: Mapping[str, int], axis: str, machines: Machines) -> float:
    """A gather, a scattered sum or an exchange of so many bytes in all among the ranks of an axis.

    On a node the links of the devices carry it. Across nodes, the ranks of a node share what comes in: each fetches its part
    through its own share of the network, and they pass it on among themselves; but what experts exchange is each rank's own.
    """
    n, device = sizes.get(axis, 1), machines.device
    if n == 1 or not num_bytes:
        return 0.0
    names = list(sizes)
    reach = math.prod(sizes[name] for name in names[names.index(axis) + 1 :])  # ranks from one of the axis to the next
    on_node = max(1, min(n, machines.per_node // reach))
    fetched_by = 1 if axis == "expert" else on_node
    rate = device.link_bytes if on_node == n else min(device.link_bytes, fetched_by * device.network_bytes)
    return num_bytes * (n - 1) / n / (rate * LINK_SHARE) + device.latency_seconds * math.ceil(math.log2(n))

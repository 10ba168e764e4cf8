"""How much memory a rank needs for a training step, from shapes alone: nothing is allocated, no weight is read.

Parameters are counted one by one from a decoder on the meta device; activations from what autograd keeps in each layer
(tests/lib/parallel/test_memory_model.py holds that to what it does keep). What it can't know is left out: the interpreter and
the libraries; and the holes of a heap, for which there is HEAP_FACTOR. `python -m benchmarks estimate` measures all of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch

from lib.config.model import LoraConfig, ModelConfig
from lib.config.train import ReduceGradients
from lib.models.decoder import Decoder
from lib.models.layers.attention_cpu import BLOCK_QUERIES, FUSED_TOKENS, KEPT_KEYS
from lib.models.lora import put_adapters
from lib.models.spec import DecoderSpec
from lib.parallel.plan import Part, part_of
from lib.parallel.shared_memory import SLOT_BYTES

MASTER_BYTES = MOMENT_BYTES = 4
HEAP_FACTOR = 1.4
"""What a CPU rank's heap takes for each byte that lives in it: freed blocks stay with the process, because giving them back
and getting them again costs time (lib/train/environment.py), and new ones don't fit into all of them. Measured: 1.1 to 1.5."""
ROOT = -1
"""What belongs to no layer: embedding, final norm and head."""


@dataclass(frozen=True)
class BatchShape:
    """What a rank computes in a step."""

    rows: int
    """Of a micro-batch."""
    sequence_length: int
    micro_batches: int = 1
    """That a rank adds up before it updates."""
    reduced: ReduceGradients = "each_step"
    """When their gradients are summed over the ranks."""
    target_share: float = 1.0
    """Of the tokens that are projected to the vocabulary."""
    document_tokens: int | None = None
    """Length of a document; None: a row is one document."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.sequence_length


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank at the moment of the step when it holds the most."""

    parameters: float
    """Its pieces of all weights: float32 where they are trained."""
    optimizer: float
    """Two moments of each number that is trained."""
    gradients: float
    """Float32: its pieces, or whole where several micro-batches are added up before they are summed over the ranks."""
    gathered: float
    """Whole weights in the compute dtype."""
    activations: float
    logits: float
    """A chunk of them, the gradient of the head's weight, and that of the hidden states."""
    working: float
    """Gradients within a layer, or of what is being reduced."""
    buffers: float
    """Of collectives."""

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Unit:
    """Numbers of a layer, or of the root, that a rank computes with: whole but for tensor and expert cuts."""

    trained: float
    frozen: float
    trained_experts: float = 0.0
    """Of those that are trained: in experts, which are gathered over the shards alone; all else over the expert axis, too."""
    frozen_experts: float = 0.0

    @property
    def total(self) -> float:
        return self.trained + self.frozen

    @property
    def experts(self) -> float:
        return self.trained_experts + self.frozen_experts

    def pieces(self, sizes: Mapping[str, int]) -> tuple[float, float]:
        """(trained, frozen) numbers that a rank keeps."""
        shards, spread = sizes["shard"], sizes["shard"] * sizes.get("expert", 1)
        trained = (self.trained - self.trained_experts) / spread + self.trained_experts / shards
        return trained, (self.frozen - self.frozen_experts) / spread + self.frozen_experts / shards


def estimate_memory(
    spec: DecoderSpec,
    config: ModelConfig,
    sizes: Mapping[str, int],
    batch: BatchShape,
    *,
    on_gpu: bool,
    frozen_bytes: int = 2,
) -> MemoryEstimate:
    """What a rank needs.

    Args:
        sizes: axis -> ranks, as `ParallelConfig.sizes` gives them.
        frozen_bytes: of a frozen number, which stays as it is stored.
    """
    tensor = sizes.get("tensor", 1)
    units, part = decoder_units(spec, config.lora, tensor, sizes.get("expert", 1)), part_of_layers(spec, tensor)
    compute = 2 if config.compute_dtype == "bfloat16" else 4
    ranks = sizes["shard"] * sizes.get("expert", 1)
    kept_trained, kept_frozen = (sum(kept) for kept in zip(*(unit.pieces(sizes) for unit in units.values())))
    layers = [unit for number, unit in units.items() if number != ROOT]
    largest = max(layers, key=lambda unit: unit.total)
    held = {
        "parameters": MASTER_BYTES * kept_trained + frozen_bytes * kept_frozen,
        "optimizer": 2 * MOMENT_BYTES * kept_trained,
    }
    buffers = _buffers(largest, units[ROOT], ranks, compute, on_gpu=on_gpu)
    head = _head_bytes(spec, config, batch, compute, tensor, on_gpu=on_gpu)
    length = min(batch.document_tokens or batch.sequence_length, batch.sequence_length)
    kept = activation_bytes(part, compute, length, on_gpu=on_gpu)
    activations = batch.tokens * _kept_at_once(part, kept, compute, config)
    at_loss = MemoryEstimate(
        **held,
        gradients=sum(_left_by_others(unit, sizes, batch) for unit in units.values()),
        gathered=compute * (units[ROOT].total + (2 * largest.total if on_gpu else sum(unit.total for unit in layers))),
        activations=activations,
        logits=head,
        working=batch.tokens * _backward_bytes(part, compute) + (compute + MASTER_BYTES) * largest.trained,
        buffers=buffers,
    )
    # The root's gradients are reduced last, when all others lie there as pieces and the activations are gone.
    doubled = spec.num_rows * spec.hidden_size / tensor if spec.tied and spec.lm_head and config.lora is None else 0.0
    at_end = MemoryEstimate(
        **held,
        gradients=MASTER_BYTES * kept_trained + _left_by_others(units[ROOT], sizes, batch),
        gathered=compute * units[ROOT].total,
        activations=0.0,
        logits=0.0,
        working=compute * (units[ROOT].trained + doubled) + MASTER_BYTES * units[ROOT].trained,
        buffers=buffers,
    )
    return max(at_loss, at_end, key=lambda estimate: estimate.total)


def _left_by_others(unit: Unit, sizes: Mapping[str, int], batch: BatchShape) -> float:
    """Bytes of the gradients of earlier micro-batches."""
    if batch.micro_batches == 1:
        return 0.0
    return MASTER_BYTES * (unit.trained if batch.reduced == "each_step" else unit.pieces(sizes)[0])


@lru_cache(maxsize=64)
def decoder_units(spec: DecoderSpec, lora: LoraConfig | None, tensor: int = 1, expert: int = 1) -> dict[int, Unit]:
    """Number of a layer, or ROOT -> its numbers on a rank, cut as lib/parallel/plan.py says."""
    with torch.device("meta"):
        decoder = Decoder(spec)
    if lora is not None:
        put_adapters(decoder, lora)
    sums: dict[int, dict[tuple[bool, bool], float]] = {}
    for name, parameter in decoder.named_parameters():
        number = int(name.split(".")[1]) if name.startswith("layers.") else ROOT
        in_expert = ".experts." in name
        cut = tensor if part_of(name, spec) in (Part.OUTPUTS, Part.INPUTS, Part.NUMBERS) else 1
        of_unit = sums.setdefault(number, {(trained, inside): 0.0 for trained in (True, False) for inside in (True, False)})
        of_unit[parameter.requires_grad, in_expert] += parameter.numel() / (cut * (expert if in_expert else 1))
    return {
        number: Unit(
            trained=of_unit[True, True] + of_unit[True, False],
            frozen=of_unit[False, True] + of_unit[False, False],
            trained_experts=of_unit[True, True],
            frozen_experts=of_unit[False, True],
        )
        for number, of_unit in sums.items()
    }


def part_of_layers(spec: DecoderSpec, tensor: int) -> DecoderSpec:
    """What a rank of the tensor axis computes of each layer: some heads and features; what goes in and comes out is whole."""
    sizes = {name: getattr(spec, name) // tensor for name in ("num_heads", "num_kv_heads", "intermediate_size")}
    moe = spec.moe and replace(spec.moe, intermediate_size=spec.moe.intermediate_size // tensor)
    return replace(spec, **sizes, moe=moe)


def activation_bytes(spec: DecoderSpec, compute: int, length: int, *, on_gpu: bool) -> list[float]:
    """[layers] bytes for each token that autograd keeps from a layer's forward pass for its backward pass.

    Args:
        length: tokens of a document: on CPU probabilities are kept, too.
    """
    outside = _attention_bytes(spec, compute, on_gpu)
    return [
        outside
        + (_kernel_bytes(spec, compute) if on_gpu else _cpu_kernel_bytes(spec, spec.window(layer), compute, length))
        + _mlp_bytes(spec, layer, compute, on_gpu)
        for layer in range(spec.num_layers)
    ]


def _norm_bytes(spec: DecoderSpec, size: int, compute: int, on_gpu: bool) -> float:
    """The fused kernel keeps its input; on CPU and with an offset the input and its normalised value are kept, in float32."""
    return size * compute if on_gpu and not spec.norm_offset else 8 * size


def _attention_bytes(spec: DecoderSpec, compute: int, on_gpu: bool) -> float:
    """But for what the kernel keeps."""
    query, kv, width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.hidden_size
    norms = 2 if spec.norm_order == "both" else 1
    kept = norms * _norm_bytes(spec, width, compute, on_gpu) + width * compute  # what q, k and v have as their input
    if spec.qk_norm != "none":
        kept += _norm_bytes(spec, query + kv, compute, on_gpu)
    return kept + query * compute  # what o has as its input


def _kernel_bytes(spec: DecoderSpec, size: int) -> float:
    """A fused kernel keeps q, k, v, its output and the logarithm of each query's sum."""
    return (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim * size + 4 * spec.num_heads


def _cpu_kernel_bytes(spec: DecoderSpec, window: int | None, compute: int, length: int) -> float:
    """Documents in blocks: q, k, v, and the probabilities of the blocks that don't see many keys."""
    whole = window is None or window >= length
    if whole and length > FUSED_TOKENS and spec.attention_softcap is None and not spec.sinks:
        # In float32 its output itself is what o has as its input.
        return _kernel_bytes(spec, 4) - (4 * spec.num_heads * spec.head_dim if compute == 4 else 0)
    kept = 0
    for start in range(0, length, BLOCK_QUERIES):
        end = min(start + BLOCK_QUERIES, length)
        num_keys = end if window is None else min(end, end - start + window - 1)
        if num_keys <= KEPT_KEYS and spec.attention_softcap is None:
            kept += (end - start) * (num_keys + spec.sinks)
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    return heads * compute + 4 * spec.num_heads * kept / length


def _mlp_bytes(spec: DecoderSpec, layer: int, compute: int, on_gpu: bool) -> float:
    width = spec.hidden_size
    kept = (2 if spec.norm_order == "both" else 1) * _norm_bytes(spec, width, compute, on_gpu) + width * compute
    gated = 4 if spec.gate.kind != "clamped" else 7
    if spec.moe is None or not spec.has_experts(layer):
        return kept + gated * spec.intermediate_size * compute
    # For each expert of a token: its input, the gated MLP, its output; and of the router, logits and probabilities.
    of_pair = (2 * width + gated * spec.moe.intermediate_size) * compute + 40
    return kept + width * compute + spec.moe.top_k * of_pair + 8 * spec.moe.num_experts


def _kept_at_once(spec: DecoderSpec, kept: list[float], compute: int, config: ModelConfig) -> float:
    if config.activation_checkpointing == "none":
        return sum(kept)
    inputs, selective = len(kept) * spec.hidden_size, config.activation_checkpointing == "selective"
    products = sum(_products(spec, layer) for layer in range(len(kept))) if selective else 0
    return min(compute * (inputs + products) + max(kept), sum(kept))


def _products(spec: DecoderSpec, layer: int) -> int:
    """Numbers for each token that a layer's products with weights make."""
    attention = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim + spec.hidden_size
    if spec.moe is None or not spec.has_experts(layer):
        return attention + 2 * spec.intermediate_size + spec.hidden_size
    pair = 2 * spec.moe.intermediate_size + spec.hidden_size
    return attention + spec.moe.num_experts + spec.moe.top_k * pair


def _backward_bytes(spec: DecoderSpec, compute: int) -> float:
    """For each token: the gradients that exist together in the widest place of a layer."""
    dense = 3 * spec.intermediate_size
    experts = spec.moe.top_k * (2 * spec.hidden_size + 3 * spec.moe.intermediate_size) if spec.moe else 0
    all_dense = spec.moe is None or len(spec.moe.layers) < spec.num_layers
    return compute * max(dense if all_dense else 0, experts)


def _head_bytes(spec: DecoderSpec, config: ModelConfig, batch: BatchShape, compute: int, tensor: int, *, on_gpu: bool) -> float:
    if not spec.lm_head:
        return 0.0
    targets = batch.tokens * batch.target_share
    chunk, rows = min(config.loss_chunk_tokens, targets), spec.num_rows / tensor
    statistics = 8 if on_gpu else 0  # on CPU they are made for a few tokens at a time
    is_trained = config.lora is None or {"embed", "head"} & set(config.lora.train_fully)
    gradient = rows * spec.hidden_size * 4 if is_trained else 0.0
    return chunk * rows * (compute + statistics) + gradient + 2 * targets * spec.hidden_size * compute


def _buffers(largest: Unit, root: Unit, shards: int, compute: int, *, on_gpu: bool) -> float:
    """A unit as it is gathered, before it is taken apart; on CPU the memory that the ranks of a host share, too."""
    if shards == 1:
        return 0.0
    most = max(largest.total, root.total)
    shared = 0.0 if on_gpu else 2 * shards * min(float(SLOT_BYTES), MASTER_BYTES * most)
    return compute * most + shared

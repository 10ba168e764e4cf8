"""What the ranks of the sharding tests do. Kept apart from the tests, so that a rank starts without pytest and transformers."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lib.config.heads import HeadsConfig
from lib.config.model import LoraConfig, ModelConfig
from lib.config.parallel import ClusterShape, ParallelConfig
from lib.core.errors import WorkerDiedError
from lib.core.examples import IGNORE_INDEX
from lib.losses.outputs import HeadTargets
from lib.models.decoder import Decoder
from lib.models.flops import FlopCounter
from lib.models.heads import HeadedDecoder
from lib.models.hf_io import read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.lora import is_factor, put_adapters
from lib.parallel import shared_memory
from lib.parallel.apply import shard_model
from lib.parallel.load import decoder_of, full_heads, full_tensors, load_heads, load_sharded
from lib.parallel.mesh import DataPlace, build_mesh
from lib.parallel.reduce import all_reduce_sum, barrier, clip_grad_norm
from lib.parallel.shared_memory import HostMemory, SharedAllGather, SharedReduceScatter
from lib.parallel.tensor import vocabulary_part
from lib.train.heads import HeadsLossModule, HeadsObjective
from lib.train.step import accumulate_gradients, count_step
from tests.lib.models.batches import heads_micro_batch, packed

ROWS = [[9, 17, 4], [23, 9], [30, 1], [8, 8, 8, 8]]
NUM_COLUMNS = 36
FP32: dict[str, Any] = {"compute_dtype": "float32"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp32": (FP32, {}),
    "fp32 untied, biases": (FP32, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "fp32 recomputed": (FP32 | {"activation_checkpointing": "layer"}, {}),
    "fp32 compiled": (FP32 | {"activation_checkpointing": "layer", "compile": "layer"}, {"family": "gemma3_text"}),
    "fp32 odd sizes": (FP32, {"hidden_size": 60, "intermediate_size": 91, "head_dim": 10}),
    "bf16": ({"compute_dtype": "bfloat16"}, {}),
    "fp32 experts": (FP32, {"family": "qwen3_moe", "num_experts": 5}),
    "fp32 fused experts": (FP32 | {"activation_checkpointing": "layer"}, {"family": "gpt_oss", "num_local_experts": 4}),
    "fp32 adapters": (FP32 | {"lora": LoraConfig(rank=3, targets=("q", "v", "down", "embed"))}, {}),
    "fp32 adapters of experts": (
        FP32
        | {"activation_checkpointing": "layer"}
        | {"lora": LoraConfig(rank=5, targets=("k", "experts", "head"), train_fully=("norms", "router"))},
        {"family": "gpt_oss", "num_local_experts": 4, "tie_word_embeddings": False},
    ),
    "bf16 adapters": ({"compute_dtype": "bfloat16", "lora": LoraConfig(rank=3)}, {}),
    "fp32 gemma": (FP32, {"family": "gemma3_text", "final_logit_softcapping": None}),
}
"""Case -> (fields of ModelConfig, fields of the tiny model, of a family other than llama where it names one)."""


HEADS = HeadsConfig.parse(
    {
        "heads": [
            {"name": "text", "kind": "lm"},
            {"name": "reward", "kind": "scalar", "weight": 3.0},
            {"name": "topic", "kind": "classification", "labels": ["a", "b", "c"]},
        ]
    },
    where="HEADS",
)


class LossModule(nn.Module):
    """A root around the decoder that uses the head, as training does: the summed loss of guessing each token plus one."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, layout: DocumentLayout) -> torch.Tensor:
        logits = self.decoder.logits(self.decoder(token_ids, positions, layout)).float()
        targets = (token_ids[..., None] + 1) % logits.shape[-1]
        return -torch.log_softmax(logits, -1).gather(-1, targets)[..., 0][layout.document_ids_BT >= 0].sum()


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def share(num_ranks: int, rank: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, DocumentLayout]:
    """Rows rank, rank + num_ranks, ... of the global batch."""
    token_ids, positions, layout = packed(ROWS, NUM_COLUMNS, vocab_size)
    rows = slice(rank, None, num_ranks)
    return token_ids[rows], positions[rows], DocumentLayout.from_document_ids(layout.document_ids_BT[rows])


def everything(folders: dict[str, Path]) -> dict[str, Any]:
    """Every case in one set of processes, since starting them costs more than what they compute."""
    results: dict[str, Any] = {case: train(folders[case], options) for case, (options, _) in CASES.items()}
    results["heads"] = train_heads(folders["fp32"])
    if dist.get_world_size() == 2:
        results["heads, cut layers"] = train_heads(folders["fp32"], tensor=2)
        results["replicas"] = train(folders["fp32"], FP32, num_replicas=2)
        results["leaks"] = leaks(folders["bf16"])
        results["collectives"] = collectives()
        results["unshared"] = fall_back_to_sockets()
        with unreachable():
            results["sockets"] = train(folders["fp32"], FP32)
        results["barrier"] = miss_a_barrier()  # last: rank 1 leaves
    return results


def train(folder: Path, options: dict[str, Any], num_replicas: int = 1) -> dict[str, Any]:
    """What a rank sees: after loading, after one backward, after clipping, and two optimizer steps later."""
    module, bytes_read = _sharded(folder, options, num_replicas)
    decoder = decoder_of(module)
    batch = share(dist.get_world_size(), dist.get_rank(), decoder.spec.vocab_size)
    result: dict[str, Any] = {"bytes_read": bytes_read}
    result["loaded"] = {name: digest(_whole(tensor)) for name, tensor in decoder.named_parameters()}
    with torch.no_grad():
        module(*batch)  # an evaluation before the export must not change it
    result["exported"] = {name: digest(tensor) for name, tensor in full_tensors(module)}
    loss = module(*batch)
    loss.backward()
    gradients = {name: tensor.grad for name, tensor in decoder.named_parameters() if tensor.grad is not None}
    result["gradients"] = {name: _whole(gradient).tolist() for name, gradient in gradients.items()}
    result["dtypes"] = sorted({str(tensor.dtype) for tensor in [*decoder.parameters(), *gradients.values()]})
    result["norm"] = clip_grad_norm(module.parameters(), 0.5)
    result["clipped"] = clip_grad_norm(module.parameters(), 1e9)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        module(*batch).backward()
    result["trained"] = {name: tensor.tolist() for name, tensor in full_tensors(module)}
    return result | all_reduce_sum({"loss": float(loss.detach()), "tokens": 2**40 + dist.get_rank()})


def train_heads(folder: Path, **sizes: int) -> dict[str, Any]:
    """Loss, gradients and first weights of three heads; a document's targets follow from its first token, on any rank."""
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=dist.get_world_size(), threads_per_rank=1)
    parallel = ParallelConfig(**sizes)
    mesh, place = build_mesh(shape, parallel), DataPlace.of(dist.get_rank(), dist.get_world_size(), parallel)
    with torch.device("meta"):
        module = HeadsLossModule(HeadedDecoder(read_spec(folder)[1], HEADS), 16)
    shard_model(module, mesh, ModelConfig(**FP32))
    module.vocabulary = vocabulary_part(mesh, module.headed.decoder.spec.vocab_size)
    load_sharded(module, folder)
    load_heads(module, folder, seed=0)
    token_ids, positions, layout = share(place.num_ranks, place.rank, module.headed.decoder.spec.vocab_size)
    firsts = torch.tensor([int(token_ids[span.row, span.start]) for span in layout.spans])
    targets = {
        "text": HeadTargets(torch.where(layout.document_ids_BT >= 0, token_ids, IGNORE_INDEX), torch.ones(token_ids.shape)),
        "reward": HeadTargets(firsts / 100, (firsts % 2).float()),
        "topic": HeadTargets(firsts % 3, torch.ones(len(firsts))),
    }
    micro, objective = [heads_micro_batch(token_ids, positions, layout, targets)], HeadsObjective(HEADS)
    flops = FlopCounter(module.headed.decoder.spec)
    counts = count_step(micro, objective, flops, part_written=False, counted=place.is_first)
    sums = accumulate_gradients(module, micro, objective, divisors=counts.divisors, device=torch.device("cpu"))
    gradients = {name: tensor.grad for name, tensor in module.named_parameters() if tensor.grad is not None}
    result: dict[str, Any] = {"gradients": {name: _whole(gradient).tolist() for name, gradient in gradients.items()}}
    result["loaded"] = {name: weight.tolist() for name, weight in full_heads(module).items()}
    return result | all_reduce_sum({"loss": objective.loss(sums, counts.divisors) * place.is_first})


def leaks(folder: Path) -> int:
    """Hidden numbers of kept documents that changed when one document of rank 0 and all of rank 1 were replaced."""
    module, _ = _sharded(folder, {"compute_dtype": "bfloat16"})
    vocab_size = module.decoder.spec.vocab_size
    token_ids, positions, layout = share(2, dist.get_rank(), vocab_size)
    span = layout.spans[1]
    replaced = torch.full_like(token_ids, dist.get_rank() == 1, dtype=torch.bool)
    replaced[span.row, span.start : span.end] = True
    kept = (layout.document_ids_BT >= 0) & (~replaced if dist.get_rank() == 0 else replaced)
    hidden: list[torch.Tensor] = []
    module.decoder.norm.register_forward_hook(lambda _m, _a, output: hidden.append(output.detach().clone()))
    for changed in (torch.zeros_like(replaced), replaced):
        module(torch.where(changed, (token_ids + 1) % vocab_size, token_ids), positions, layout)
    return int((hidden[0][kept] != hidden[1][kept]).sum())


def collectives() -> list[str]:
    """Cases in which shared memory gives other bits than gloo; slots are made so small that most need many pieces."""
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    wrong = []
    usual, shared_memory.SLOT_BYTES = shared_memory.SLOT_BYTES, 128
    memory = HostMemory.open(group)
    assert memory is not None, "two processes of one host can share memory"
    generator = torch.Generator().manual_seed(rank)
    for size in (1, 15, 16, 17, 64, 1000):
        for dtype in (torch.float32, torch.bfloat16, torch.uint8):
            shard = (torch.randn(size, generator=generator) * 9).abs().to(dtype)
            ours, theirs = torch.empty(2 * size, dtype=dtype), torch.empty(2 * size, dtype=dtype)
            SharedAllGather(memory)(ours, shard, group)
            dist.all_gather_single(theirs, shard)
            wrong += [] if torch.equal(ours, theirs) else [f"gather {size} {dtype}"]
        values = torch.randn(2 * size, generator=generator)
        summed, expected = torch.empty(size), torch.empty(size)
        SharedReduceScatter(memory)(summed, values, group, dist.ReduceOp.SUM)
        dist.reduce_scatter_single(expected, values)
        wrong += [] if torch.equal(summed, expected) else [f"sum {size}"]
    shared_memory.SLOT_BYTES = usual
    return wrong


def fall_back_to_sockets() -> bool:
    """One rank's memory can't be mapped: all ranks must notice."""
    group = dist.group.WORLD
    assert group is not None
    if dist.get_rank() == 0:
        return HostMemory.open(group) is None
    with unreachable():
        return HostMemory.open(group) is None


@contextmanager
def unreachable() -> Iterator[None]:
    """This process gives out an address that is not its own, as a rank of another host or container would."""
    with mock.patch("os.getpid", return_value=2**22 + 1):  # no process has a number above 2^22
        yield


def miss_a_barrier() -> str:
    """Rank 1 goes away after the first barrier; what rank 0 is told by the second."""
    barrier(30.0)
    if dist.get_rank() == 0:
        try:
            barrier(1.0)
        except WorkerDiedError as error:
            return str(error)
    return "left"


def _sharded(folder: Path, options: dict[str, Any], num_replicas: int = 1) -> tuple[LossModule, int]:
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=dist.get_world_size(), threads_per_rank=1)
    config = ModelConfig(**options)
    with torch.device("meta"):
        module = LossModule(Decoder(read_spec(folder)[1]))
        if config.lora:
            put_adapters(module.decoder, config.lora)
    shard_model(module, build_mesh(shape, ParallelConfig(replicate=num_replicas)), config)
    bytes_read = load_sharded(module, folder)
    shift_adapters(module.decoder)
    return module, bytes_read


@torch.no_grad()
def shift_adapters(decoder: Decoder) -> None:
    """So that none is zero, in the same way on any number of ranks."""
    for name, parameter in decoder.named_parameters():
        if is_factor(name):
            parameter.add_(0.05)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

"""What the ranks of the tests of tensor parallelism do; see lib/parallel/tensor.py."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from lib.config.model import LoraConfig, ModelConfig
from lib.config.optim import OptimConfig
from lib.config.parallel import ClusterShape, ParallelConfig
from lib.core.examples import IGNORE_INDEX
from lib.models.decoder import Decoder
from lib.models.hf_io import read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.lora import is_factor, put_adapters
from lib.parallel.apply import shard_model
from lib.parallel.load import full_tensors, load_sharded, whole
from lib.parallel.mesh import DataPlace, build_mesh
from lib.parallel.reduce import all_reduce_sum, clip_grad_norm
from lib.parallel.tensor import vocabulary_part
from lib.train.optim import build_optimizer, set_learning_rate
from lib.train.step import LossModule
from tests.lib.models.batches import packed

ROWS = [[9, 17, 4], [23, 9], [30, 1], [8, 8, 8, 8]]
NUM_COLUMNS = 36
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
SOME_TARGETS = LoraConfig(rank=3, alpha=1.0, targets=("q", "v", "o", "gate", "down", "embed"))
EVERY_TARGET = LoraConfig(rank=3, alpha=1.0, targets=("q", "k", "v", "o", "experts", "embed"), train_fully=("norms", "router"))
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {"family": "llama", "attention_bias": True, "mlp_bias": True, **WIDE}),
    "llama recomputed, a head of its own": (
        {"activation_checkpointing": "layer"},
        {"family": "llama", "tie_word_embeddings": False},
    ),
    "gpt_oss": ({}, {"family": "gpt_oss", "num_local_experts": 4, "tie_word_embeddings": False, **WIDE}),
    "qwen3_moe": ({}, {"family": "qwen3_moe", "num_experts": 5, "norm_topk_prob": True}),
    "gemma3": ({}, {"family": "gemma3_text", "num_hidden_layers": 2}),
    "olmo2": ({}, {"family": "olmo2"}),
    "adapters": (
        {"lora": SOME_TARGETS},
        {"family": "llama"},
    ),
    "adapters of experts": ({"lora": EVERY_TARGET}, {"family": "gpt_oss", "num_local_experts": 4}),
}
"""Case -> (fields of ModelConfig, fields of the tiny model)."""


def compute(folders: dict[str, str], meshes: list[dict[str, int]], out: str) -> dict[str, Any]:
    """Mesh and case -> what a rank finds; rank 0 writes gradients and weights, whole, to `out`."""
    found = {}
    for parallel in meshes:
        for case, folder in folders.items():
            name = f"{case} {parallel}"
            facts, tensors = step(Path(folder), CASES[case][0], ParallelConfig(**parallel))
            found[name] = facts
            if dist.get_rank() == 0:
                save_file(tensors, Path(out) / f"{name}.safetensors")
    return found


def step(folder: Path, options: dict[str, Any], parallel: ParallelConfig) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Loss, gradients, norm, export and the loss after an update, of rows that are dealt to the ranks that have their own."""
    place = DataPlace.of(dist.get_rank(), dist.get_world_size(), parallel)
    module, bytes_read = sharded(folder, ModelConfig(compute_dtype="float32", loss_chunk_tokens=16, **options), parallel)
    tensors = {f"export/{name}": tensor.contiguous().clone() for name, tensor in full_tensors(module)}
    batch = share(place, module.decoder.spec.vocab_size)
    loss, correct = module(*batch)
    loss.backward()
    gradients = {name: tensor.grad for name, tensor in module.decoder.named_parameters() if tensor.grad is not None}
    tensors |= {name: whole(gradient).clone() for name, gradient in gradients.items()}
    facts = {"norm": clip_grad_norm(module.parameters(), 0.5), "clipped": clip_grad_norm(module.parameters(), 1e9)}
    # So large an epsilon that the update is nearly the gradient: a sign would turn rounding into a step.
    optimizer = build_optimizer(module, OptimConfig(epsilon=1.0))
    set_learning_rate(optimizer, 1.0)
    optimizer.step()
    again, _ = module(*batch)
    sums = {"loss": float(loss.detach()), "again": float(again.detach()), "correct": int(correct)}
    facts |= all_reduce_sum({name: value * place.is_first for name, value in sums.items()})
    return {**facts, "bytes_read": bytes_read, "weights": digest(module)}, tensors


def digest(module: LossModule) -> str:
    """Of all weights as this rank has them: put together from the ranks that hold pieces of the same copy."""
    found = hashlib.sha256()
    for parameter in module.parameters():
        found.update(whole(parameter).contiguous().numpy().tobytes())
    return found.hexdigest()


def sharded(folder: Path, config: ModelConfig, parallel: ParallelConfig) -> tuple[LossModule, int]:
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=dist.get_world_size(), threads_per_rank=1)
    mesh = build_mesh(shape, parallel)
    with torch.device("meta"):
        module = LossModule(Decoder(read_spec(folder)[1]), config.loss_chunk_tokens)
        if config.lora:
            put_adapters(module.decoder, config.lora)
    shard_model(module, mesh, config)
    module.vocabulary = vocabulary_part(mesh, module.decoder.spec.vocab_size)
    bytes_read = load_sharded(module, folder)
    with torch.no_grad():
        for name, parameter in module.decoder.named_parameters():
            if is_factor(name):
                parameter.add_(0.05)  # so that none is zero
    return module, bytes_read


def share(place: DataPlace, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, DocumentLayout, torch.Tensor]:
    """Rows place.rank, place.rank + place.num_ranks, ... of the global batch; every third token is not trained."""
    token_ids, positions, layout = packed(ROWS, NUM_COLUMNS, vocab_size)
    trained = (layout.document_ids_BT >= 0) & (torch.arange(NUM_COLUMNS) % 3 != 0)
    labels = torch.where(trained, (token_ids * 7 + 1) % vocab_size, IGNORE_INDEX)
    rows = slice(place.rank, None, place.num_ranks)
    own = DocumentLayout.from_document_ids(layout.document_ids_BT[rows])
    return token_ids[rows], positions[rows], labels[rows], own, 1.0 + (token_ids[rows] % 3)

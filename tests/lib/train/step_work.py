"""What the ranks of test_step.py do: gradients of several micro-batches, summed over the ranks in the last one or in each."""

import gc
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lib.config.model import LoraConfig, ModelConfig
from lib.config.parallel import ClusterShape, ParallelConfig
from lib.config.train import ReduceGradients
from lib.models.decoder import Decoder
from lib.models.flops import FlopCounter
from lib.models.lora import put_adapters
from lib.models.spec import DecoderSpec
from lib.parallel.apply import shard_model
from lib.parallel.load import whole
from lib.parallel.memory_model import BatchShape, estimate_memory
from lib.parallel.mesh import DataPlace, build_mesh
from lib.parallel.tensor import vocabulary_part
from lib.train.step import LossModule, MicroBatch, NextToken, Training, accumulate_gradients, count_step, train_step
from tests.numerics.invariance import SPECS
from tests.numerics.rows import micro_batches, packed_rows

CPU = torch.device("cpu")
CHOICES: tuple[ReduceGradients, ...] = ("each_step", "each_micro_batch")
NUM_TARGETS, NUM_STEPS = 1000.0, 5
MESHES: dict[int, list[tuple[str, dict[str, int]]]] = {
    1: [("tied", {})],
    2: [("tied", {"tensor": 2}), ("experts", {"expert": 2}), ("tied with adapters", {})],
    4: [("untied", {}), ("tied", {"replicate": 2})],
}
"""Number of ranks -> models of `SPECS`, and how they are cut."""
ADAPTERS = LoraConfig(rank=4, targets=("q", "down", "embed"), train_fully=("norms",))


@dataclass(frozen=True)
class Model:
    """What is trained."""

    spec: DecoderSpec
    lora: LoraConfig | None

    @staticmethod
    def named(name: str) -> "Model":
        spec, _, more = name.partition(" with ")
        return Model(SPECS[spec], ADAPTERS if more else None)


class Watched(NextToken):
    """Notes how many bytes all tensors of this process take when the second micro-batch of the second step begins: by then
    everything else that a step makes is there already."""

    def __init__(self, num_micro_batches: int) -> None:
        self._left, self.live_bytes = num_micro_batches + 1, 0

    def sums(self, module: nn.Module, micro: MicroBatch, device: torch.device) -> dict[str, torch.Tensor]:
        if self._left == 0:
            self.live_bytes = live_bytes()
        self._left -= 1
        return super().sums(module, micro, device)


def live_bytes() -> int:
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and type(item) is not DTensor]
    tensors += [item.grad for item in tensors if item.is_leaf and item.grad is not None]  # no object until it is asked for
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def everything() -> dict[str, Any]:
    """Of each model and mesh, see `compare` and `train`."""
    meshes = MESHES[dist.get_world_size()]
    found = {}
    for name, mesh in meshes:
        model = Model.named(name)
        found[f"{name} {mesh}"] = compare(model, mesh) | {"apart": train(model, mesh)}
    return found


def compare(model: Model, mesh: Mapping[str, int]) -> dict[str, Any]:
    """This rank's digests of gradients: of both choices, each twice, and of the micro-batches one by one, added up in their
    order; and the bytes that the choices differ by when the second micro-batch begins, as they are and as predicted."""
    parallel, num_ranks = ParallelConfig(**mesh), dist.get_world_size()
    place = DataPlace.of(dist.get_rank(), num_ranks, parallel)
    micro = micro_batches(packed_rows()[place.rank :: place.num_ranks][:3], 1)
    module = build_module(model, parallel)
    found: dict[str, Any] = {}
    held = {}
    for choice in CHOICES:
        watched = Watched(len(micro))
        found[choice] = [_digest(_gradients(module, micro, choice, watched)) for _ in range(2)]
        held[choice] = watched.live_bytes
    added: dict[str, torch.Tensor] = {}
    for one in micro:
        for name, gradient in _gradients(module, [one], "each_step").items():
            added[name] = added[name] + gradient if name in added else gradient
    found["one by one"] = _digest(added)
    found["freed"] = held["each_step"] - held["each_micro_batch"]
    sizes = parallel.sizes(num_ranks)
    found["num_pieces"] = sizes["shard"] * sizes["expert"]
    found["predicted"] = _kept(model, parallel, "each_step") - _kept(model, parallel, "each_micro_batch")
    return found


def train(model: Model, mesh: Mapping[str, int]) -> float:
    """Greatest difference that five clipped updates in float64, gradients summed up in each micro-batch, leave between the
    weights of the ranks together and those of a plain module that each rank trains on all rows by itself."""
    place = DataPlace.of(dist.get_rank(), dist.get_world_size(), ParallelConfig(**mesh))
    ours, plain = build_module(model, ParallelConfig(**mesh), torch.float64), build_module(model, None, torch.float64)
    for module, rows, counted in (
        (ours, packed_rows()[place.rank :: place.num_ranks], place.is_first),
        (plain, packed_rows(), dist.get_rank() == 0),
    ):
        micro, optimizer = micro_batches(rows, 1), torch.optim.AdamW(_trained(module).values())
        training = Training(module, optimizer, NextToken(), FlopCounter(model.spec, model.lora), "each_micro_batch")
        for step in range(1, NUM_STEPS + 1):
            counts = count_step(micro, NextToken(), training.flops, part_written=False, counted=counted)
            train_step(training, micro, counts, step=step, learning_rate=1e-2, max_grad_norm=0.5, device=CPU)
    pairs = zip(ours.named_parameters(), plain.named_parameters(), strict=True)
    assert model.spec.tied == ("decoder.head.weight" not in dict(ours.named_parameters()))
    return max(float((whole(found) - expected.detach()).abs().max()) for (_, found), (_, expected) in pairs)


def _kept(model: Model, parallel: ParallelConfig, choice: ReduceGradients) -> float:
    """Bytes of gradients when the last micro-batch begins, by the memory model; in a step that is long for its weights."""
    batch = BatchShape(rows=1, sequence_length=1 << 16, micro_batches=2, reduced=choice)
    sizes = parallel.sizes(dist.get_world_size())
    return estimate_memory(model.spec, ModelConfig(lora=model.lora), sizes, batch, on_gpu=True).gradients


def build_module(model: Model, parallel: ParallelConfig | None, dtype: torch.dtype = torch.float32) -> LossModule:
    """The same weights every time; on no mesh a plain module."""
    module = LossModule(Decoder(model.spec), chunk_tokens=16)
    if model.lora:
        put_adapters(module.decoder, model.lora)
    module.to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / math.sqrt(parameter.shape[-1])
        parameter.data = drawn.to(dtype)
    if parallel is not None:
        shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=dist.get_world_size(), threads_per_rank=1)
        mesh, name = build_mesh(shape, parallel), str(dtype).removeprefix("torch.")
        shard_model(module, mesh, ModelConfig().model_copy(update={"compute_dtype": name}))
        module.vocabulary = vocabulary_part(mesh, model.spec.vocab_size)
    return module


def _trained(module: LossModule) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _gradients(
    module: LossModule, micro: Sequence[MicroBatch], choice: ReduceGradients, objective: NextToken | None = None
) -> dict[str, torch.Tensor]:
    """This rank's pieces."""
    module.zero_grad(set_to_none=True)
    accumulate_gradients(module, micro, objective or NextToken(), divisors={"loss": NUM_TARGETS}, device=CPU, reduced=choice)
    found = {}
    for name, parameter in _trained(module).items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.to_local().clone()
    return found


def _digest(gradients: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for gradient in gradients.values():
        digest.update(gradient.contiguous().numpy().tobytes())
    return digest.hexdigest()

"""Training steps of a random model on ranks of their own: how long they take and how much memory. Not a benchmark itself."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from lib.cluster.group import Deadlines, GroupFactory, Worker, dispatch
from lib.cluster.local import LocalGroup
from lib.config.model import ModelConfig
from lib.config.optim import OptimConfig
from lib.config.parallel import ClusterShape
from lib.core.errors import UserError
from lib.data.batch import collate
from lib.data.document import Document, PackedRow
from lib.models.decoder import Decoder
from lib.models.flops import FlopCounter
from lib.models.lora import put_adapters
from lib.models.spec import DecoderSpec, Rope
from lib.parallel.apply import shard_model
from lib.parallel.clock import CLOCK
from lib.parallel.devices import Device, cpu_device, known_device
from lib.parallel.memory_model import BatchShape
from lib.parallel.mesh import build_mesh
from lib.train.environment import cpu_environment
from lib.train.meters import peak_flops
from lib.train.optim import build_optimizer
from lib.train.step import LossModule, MicroBatch, NextToken, Training, count_step, train_step
from lib.train.times import StepTimes, peak_memory

DEADLINE_SECONDS = 1800.0
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16), "MALLOC_TOP_PAD_": "0"}
WARM_UP = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16}
"""A model that is trained first, so that what libraries load on their first step isn't taken for the real one's memory."""


@dataclass(frozen=True)
class Trial:
    """A model, how it is cut, and what it is fed."""

    size: Mapping[str, int]
    """Fields of a DecoderSpec of the llama family."""
    batch: BatchShape
    config: ModelConfig
    shape: ClusterShape

    @property
    def spec(self) -> DecoderSpec:
        return spec_of(self.size)


def spec_of(size: Mapping[str, int]) -> DecoderSpec:
    numbers: dict[str, Any] = {"num_kv_heads": size["num_heads"], "max_positions": 1 << 17, "tied": True, **size}
    return DecoderSpec(family="llama", rope=Rope(1e4), norm_eps=1e-5, **numbers)


class TrialWorker(Worker):
    """One rank."""

    @dispatch(merge="all")
    def steps(self, values: dict[str, Any], num_steps: int) -> dict[str, Any]:
        """Of each step {"seconds", "work_seconds", "parts"}; of this rank {"held_bytes": before the model, "peak_bytes",
        "peak_flops"}. Work is the processor's time on CPU, where others may want it too, and the wall's on a GPU."""
        device = torch.device(self.info.device)
        config, shape = ModelConfig.parse(values["config"], where="trial"), ClusterShape(**values["shape"])
        flops_rate = _peak(device, getattr(torch, config.compute_dtype))
        _train(spec_of(WARM_UP), config, shape, BatchShape(1, 16), num_steps=2, device=device)
        held = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
        times, work = _train(
            spec_of(values["size"]), config, shape, BatchShape(**values["batch"]), num_steps=num_steps, device=device
        )
        return {
            "seconds": [step.ranks[self.info.rank].seconds for step in times],
            "work_seconds": work,
            "parts": [step.row()["parts"] for step in times],
            "held_bytes": held,
            "peak_bytes": peak_memory(device),
            "peak_flops": flops_rate,
        }


def run_trial(
    trial: Trial, *, num_steps: int, group_factory: GroupFactory = LocalGroup, return_memory: bool = False
) -> list[dict[str, Any]]:
    """[ranks] what each rank measured, in processes of their own.

    return_memory: freed memory goes back to the system, so that a process holds what lives and no more; slower.
    """
    values = {
        "size": dict(trial.size),
        "batch": vars(trial.batch),
        "config": trial.config.model_dump(mode="json"),
        "shape": trial.shape.model_dump(mode="json"),
    }
    env = cpu_environment(trial.shape.threads_per_rank) | (RETURNING if return_memory else {})
    deadlines = Deadlines(collective_seconds=DEADLINE_SECONDS)
    with group_factory(TrialWorker, trial.shape, env=env, deadlines=deadlines) as group:
        found: list[dict[str, Any]] = group.call("steps", values, num_steps, deadline_seconds=DEADLINE_SECONDS)
        return found


def device_of(measured: Sequence[Mapping[str, Any]]) -> Device:
    """What the ranks of a trial computed with: a GPU as its data sheet has it, or a core as fast as it was measured."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if (known := known_device(name)) is not None:
            return known
        raise UserError(f"{name} is not in lib/parallel/devices.py; add its data sheet")
    peak = sum(rank["peak_flops"] for rank in measured) / len(measured)
    return cpu_device(peak)


def _peak(device: torch.device, dtype: torch.dtype) -> float:
    """As `peak_flops`, but on CPU a second is one of the processor's own."""
    if device.type == "cuda":
        return peak_flops(device, dtype)
    left, right = (torch.ones(1024, 1024, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        began = time.process_time()
        _ = left @ right
        best = min(best, time.process_time() - began)
    return 2.0 * 1024**3 / best


def _train(
    spec: DecoderSpec, config: ModelConfig, shape: ClusterShape, batch: BatchShape, *, num_steps: int, device: torch.device
) -> tuple[list[StepTimes], list[float]]:
    micro_batches = [_micro_batch(batch, spec, seed=number) for number in range(batch.micro_batches)]
    module = _module(spec, config, shape, device)
    optimizer, objective, flops = build_optimizer(module, OptimConfig()), NextToken(), FlopCounter(spec, config.lora)
    training = Training(module, optimizer, objective, flops, batch.reduced)
    settings = {"learning_rate": 1e-4, "max_grad_norm": 1.0, "device": device}
    times, work = [], []
    worked = time.perf_counter if device.type == "cuda" else time.process_time
    CLOCK.start(device)
    for step in range(1, num_steps + 1):
        began = worked()
        counts = count_step(micro_batches, objective, flops, part_written=False)
        train_step(training, micro_batches, counts, step=step, **settings)
        times.append(StepTimes.over_ranks(device))
        work.append(worked() - began)
    return times, work


def _module(spec: DecoderSpec, config: ModelConfig, shape: ClusterShape, device: torch.device) -> LossModule:
    """Sharded from the start, with random weights: no rank ever holds the whole."""
    with torch.device("meta"):
        decoder = Decoder(spec)
        module = LossModule(decoder, config.loss_chunk_tokens)
    if config.lora:
        put_adapters(decoder, config.lora)
    shard_model(module, build_mesh(shape), config)
    module.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
        for buffer in module.buffers():
            buffer.zero_()
    return module


def _micro_batch(batch: BatchShape, spec: DecoderSpec, *, seed: int) -> MicroBatch:
    length = batch.document_tokens or batch.sequence_length
    generator = torch.Generator().manual_seed(seed)

    def document(number: int) -> Document:
        token_ids = torch.randint(spec.vocab_size, (length,), generator=generator, dtype=torch.int32).numpy()
        return Document(str(number), token_ids, token_ids >= 0)

    rows = [PackedRow(tuple(document(n) for n in range(batch.sequence_length // length))) for _ in range(batch.rows)]
    return MicroBatch.of(collate(rows, batch.sequence_length, 0))

"""What the ranks of `python -m benchmarks dist` do. Kept apart, so that a rank starts without transformers and TRL."""

import time
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from lib.cluster.group import Worker, dispatch
from lib.config.model import ModelConfig
from lib.config.optim import OptimConfig
from lib.config.parallel import ClusterShape, ParallelConfig
from lib.data.batch import collate
from lib.data.document import Document, PackedRow
from lib.models.decoder import Decoder
from lib.models.flops import FlopCounter
from lib.models.hf_io import read_spec
from lib.parallel.apply import shard_model
from lib.parallel.load import load_sharded, whole
from lib.parallel.mesh import DataPlace, build_mesh
from lib.parallel.reduce import barrier
from lib.parallel.tensor import vocabulary_part
from lib.train.optim import build_optimizer
from lib.train.step import LossModule, MicroBatch, NextToken, Training, accumulate_gradients, count_step, train_step
from lib.train.times import peak_memory

CPU = torch.device("cpu")
VOCAB_SIZE = 8192
ROW, ROWS_AT_ONCE = 512, 4
CHUNK_TOKENS = 256
DEADLINE_SECONDS = 1800.0


class DistWorker(Worker):
    """One rank of a mesh."""

    @dispatch(merge="all")
    def step(self, folder: str, parallel: dict[str, int], num_tokens: int, out: str) -> dict[str, float]:
        """Take a step; rank 0 writes the whole gradients to `out`."""
        before = psutil.Process().memory_info().rss
        self.load(folder, parallel, num_tokens, False)
        counts = count_step(self.micro, NextToken(), self.training.flops, part_written=False, counted=self.place.is_first)
        module = self.training.module
        sums = accumulate_gradients(module, self.micro, NextToken(), divisors=counts.divisors, device=CPU)
        self.training.optimizer.step()
        found = {"peak_bytes": peak_memory(CPU) - before, "bytes_read": self.bytes_read}
        gradients = {name: whole(tensor.grad) for name, tensor in module.named_parameters() if tensor.grad is not None}
        if self.info.rank == 0:
            save_file({name: gradient.contiguous() for name, gradient in gradients.items()}, out)
        return {**found, "loss": sums["loss"] * self.place.is_first, "num_targets": counts.num_targets}

    @dispatch()
    def load(self, folder: str, parallel: dict[str, int], num_tokens: int, own_rows: bool) -> None:
        """own_rows: `num_tokens` are of each rank (weak scaling), not of all."""
        sizes, config = ParallelConfig(**parallel), ModelConfig(compute_dtype="float32")
        self.place = DataPlace.of(self.info.rank, self.info.num_ranks, sizes)
        mesh = build_mesh(local_shape(self.info.num_ranks), sizes)
        with torch.device("meta"):
            module = LossModule(Decoder(read_spec(Path(folder))[1]), CHUNK_TOKENS)
        shard_model(module, mesh, config)
        module.vocabulary = vocabulary_part(mesh, module.decoder.spec.vocab_size)
        self.bytes_read = load_sharded(module, Path(folder))
        optimizer = build_optimizer(module, OptimConfig())
        self.training = Training(module, optimizer, NextToken(), FlopCounter(module.decoder.spec), "each_step")
        self.micro = share(num_tokens, 1, 0) if own_rows else share(num_tokens, self.place.num_ranks, self.place.rank)

    @dispatch(merge="all")
    def timed_step(self) -> list[float]:
        """[wall, CPU] seconds of a whole step: counts, gradients, clipping and update."""
        barrier(DEADLINE_SECONDS)
        wall, cpu = time.perf_counter(), time.process_time()
        counts = count_step(self.micro, NextToken(), self.training.flops, part_written=False, counted=self.place.is_first)
        train_step(self.training, self.micro, counts, step=1, learning_rate=1e-6, max_grad_norm=1.0, device=CPU)
        return [time.perf_counter() - wall, time.process_time() - cpu]


def share(num_tokens: int, num_ranks: int, rank: int) -> list[MicroBatch]:
    """Every num_ranks-th of the rows that hold `num_tokens` random tokens, two documents to a row, the second half of each
    trained; as many rows on each rank of up to 4."""
    source = np.random.default_rng(0)
    rows = []
    for number in range(-(-num_tokens // ROW // 4) * 4):
        cut = int(source.integers(ROW // 8, ROW // 2))
        ids = source.integers(3, VOCAB_SIZE, ROW).astype(np.int32)
        documents = (ids[:cut], ids[cut:]) if number * ROW < num_tokens else ()
        masks = [np.arange(len(part)) >= len(part) // 2 for part in documents]
        rows.append(PackedRow(tuple(Document(f"{number}", part, mask) for part, mask in zip(documents, masks))))
    own = rows[rank::num_ranks]
    groups = [own[start : start + ROWS_AT_ONCE] for start in range(0, len(own), ROWS_AT_ONCE)]
    return [MicroBatch.of(collate(group, ROW, 0)) for group in groups]


def local_shape(num_ranks: int) -> ClusterShape:
    return ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=num_ranks, threads_per_rank=1)

"""Random ways to cut the same documents into rows, micro-batches, ranks and chunks, and what each does to loss and gradients.

A case is a number: everything about it follows from its seed. The reference is one plain process that takes every document
alone in a row, all rows in one batch, all logits in one chunk.
"""

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lib.config.model import ModelConfig
from lib.config.parallel import ClusterShape, ParallelConfig
from lib.config.train import ReduceGradients
from lib.core.examples import IGNORE_INDEX
from lib.data.batch import Document, PackedBatch, PackedRow, collate
from lib.models.decoder import Decoder
from lib.models.flops import FlopCounter
from lib.models.spec import DecoderSpec, Gate, MoeSpec, Rope
from lib.parallel.apply import shard_model
from lib.parallel.load import whole
from lib.parallel.mesh import DataPlace, build_mesh
from lib.parallel.tensor import vocabulary_part
from lib.train.step import LossModule, MicroBatch, NextToken, Training, accumulate_gradients, count_step, train_step

CPU = torch.device("cpu")
LOSS_LIMIT = 1e-6
"""Of a target, absolute."""
GRADIENT_LIMITS = {"float32": 1e-5, "float64": 1e-10}
"""Relative to the greatest entry of each gradient; and of their common norm."""
_DENSE = DecoderSpec("llama", 97, 32, 48, 2, 4, 2, 8, 2048, Rope(1e4), 1e-5, True)
SPECS = {
    "tied": _DENSE,
    "untied": replace(_DENSE, tied=False, mlp_bias=True, windows=(None, 7), norm_order="both", logit_softcap=30.0),
    "experts": replace(_DENSE, qk_norm="head", moe=MoeSpec((0, 1), 8, 2, 24, "softmax_renormalised")),
    "biased experts": replace(
        _DENSE, sinks=True, gate=Gate("clamped", 1.7, 7.0), moe=MoeSpec((1,), 4, 2, 24, "softmax_of_chosen", True)
    ),
}
MASKED = ("none", "some", "a rank", "all")
"""Whose labels are all ignored: nobody's, those of random documents, of all documents of the last rank, of all."""


@dataclass(frozen=True)
class Case:
    """One way to cut a step."""

    seed: int
    """Of weights, documents and their places."""
    spec: str
    dtype: str
    lengths: tuple[int, ...]
    """Tokens of each document."""
    sequence_length: int
    rows_per_micro_batch: int
    chunk_tokens: int
    share_of_first: float
    """Part of the rows that rank 0 gets; the others get equal parts of the rest."""
    masked: str = "none"
    weighted: bool = False
    recomputed: bool = False
    replicate: int = 1
    """Copies of the sharded model, as far as the ranks allow."""
    expert: int = 1
    """Ranks among which experts are dealt out, as far as the other ranks allow."""
    tensor: int = 1
    """Ranks that compute each layer together, likewise; experts are then cut, not dealt out."""
    reduced: ReduceGradients = "each_step"

    def parallel(self, num_ranks: int) -> ParallelConfig:
        tensor = math.gcd(self.tensor, num_ranks)
        replicate = math.gcd(self.replicate, num_ranks // tensor)
        dealt = SPECS[self.spec].moe is not None and tensor == 1
        return ParallelConfig(
            replicate=replicate, tensor=tensor, expert=math.gcd(self.expert, num_ranks // replicate) if dealt else 1
        )


def random_case(number: int) -> Case:
    """The same case for the same number. Experts come in float64 alone: in float32 a token whose second and third expert
    are as good as level may go to either, and that is a jump and no rounding."""
    source = np.random.default_rng([number, 7])
    sequence_length = int(source.choice([16, 32, 64]))
    dtype = str(source.choice(["float32", "float64"]))
    specs = list(SPECS) if dtype == "float64" else ["tied", "untied"]
    return Case(
        seed=number,
        spec=specs[int(source.integers(len(specs)))],
        dtype=dtype,
        lengths=tuple(int(length) for length in source.integers(2, sequence_length + 1, int(source.integers(1, 13)))),
        sequence_length=sequence_length,
        rows_per_micro_batch=int(source.integers(1, 5)),
        chunk_tokens=int(source.choice([1, 3, 16, 1000])),
        share_of_first=float(source.choice([0.0, 0.1, 0.5, 1.0])),
        masked=str(source.choice(MASKED, p=[0.5, 0.3, 0.15, 0.05])),
        weighted=bool(source.random() < 0.3),
        recomputed=bool(source.random() < 0.3),
        replicate=int(source.choice([1, 1, 2])),
        expert=int(source.choice([1, 2, 4])),
        tensor=int(source.choice([1, 1, 2])),
        reduced="each_micro_batch" if source.random() < 0.5 else "each_step",
    )


RAGGED = Case(1, "tied", "float32", (11, *[34] * 30), 64, 2, 16, 0.0)
_SMALLER = replace(RAGGED, lengths=(5, 30, 2, 34, 9, 20))
NAMED_CASES = {
    "10 targets on rank 0, 990 on the others": RAGGED,
    "the last rank has nothing but masked labels": replace(_SMALLER, masked="a rank"),
    "all labels are masked": replace(_SMALLER, masked="all"),
    "some of the documents are masked, the others weighted": replace(_SMALLER, masked="some", weighted=True),
    "layers on pairs of ranks, a pair with masked labels alone": replace(_SMALLER, spec="untied", masked="a rank", tensor=2),
    "experts cut over pairs": replace(_SMALLER, spec="biased experts", dtype="float64", tensor=2, recomputed=True),
    "experts cut over pairs, summed up each time": replace(
        _SMALLER, spec="biased experts", dtype="float64", rows_per_micro_batch=1, tensor=2, reduced="each_micro_batch"
    ),
    "two copies, summed up each time": replace(
        _SMALLER, rows_per_micro_batch=1, masked="some", weighted=True, replicate=2, reduced="each_micro_batch"
    ),
    "experts dealt out over pairs of two copies, summed up each time": replace(
        _SMALLER, spec="experts", dtype="float64", rows_per_micro_batch=1, replicate=2, expert=2, reduced="each_micro_batch"
    ),
    "experts on all ranks": replace(_SMALLER, spec="experts", dtype="float64"),
    "experts dealt out over pairs": replace(_SMALLER, spec="experts", dtype="float64", expert=2),
    "experts dealt out, a rank with masked labels alone": replace(
        _SMALLER, spec="biased experts", dtype="float64", masked="a rank", expert=4, recomputed=True
    ),
}
"""[C2, B9, C4] `share_of_first` 0.0 leaves rank 0 the first document alone."""


def check_cases(cases: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Run each case on this process group and compare; rank 0 has the differences."""
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=dist.get_world_size(), threads_per_rank=1)
    meshes: dict[ParallelConfig, DeviceMesh] = {}
    results = []
    for values in cases:
        case = Case(**{**values, "lengths": tuple(values["lengths"])})
        parallel = case.parallel(shape.num_ranks)
        if parallel not in meshes:
            meshes[parallel] = build_mesh(shape, parallel)
        results.append(_differences(case, meshes[parallel], DataPlace.of(dist.get_rank(), shape.num_ranks, parallel)))
        gc.collect()  # the maps of a dead module's shared memory
    return results


def broken_limits(case: Case, found: dict[str, float]) -> list[str]:
    """What is wrong with the differences of a case; nothing where all is well."""
    limits = {"loss": LOSS_LIMIT, "accuracy": LOSS_LIMIT, "num_tokens": 0}
    limits |= dict.fromkeys(("gradient", "norm"), GRADIENT_LIMITS[case.dtype])
    broken = [f"{name} differs by {found[name]:.3g}" for name, limit in limits.items() if not found[name] <= limit]
    if found["num_targets"] != found["expected_targets"]:
        broken.append(f"{found['num_targets']} targets counted of {found['expected_targets']}")
    if found["expected_targets"] == 0 and (found["loss_itself"] != 0.0 or found["greatest_gradient"] != 0.0):
        broken.append("no targets, and yet a loss or a gradient that is not 0")
    return broken


def _differences(case: Case, mesh: DeviceMesh, place: DataPlace) -> dict[str, float]:
    """On rank 0; nothing on the others."""
    documents = _documents(case)
    shares = _shares(case, documents, place.num_ranks)
    silent = _silent(case, documents, shares[-1])
    module = _module(case, case.chunk_tokens)
    config = ModelConfig(activation_checkpointing="layer" if case.recomputed else "none").model_copy(
        update={"compute_dtype": case.dtype}
    )
    shard_model(module, mesh, config)
    module.vocabulary = vocabulary_part(mesh, module.decoder.spec.vocab_size)
    micro = _micro_batches(shares[place.rank], case.rows_per_micro_batch, case.sequence_length, silent)
    flops = FlopCounter(SPECS[case.spec])
    counts = count_step(micro, NextToken(), flops, part_written=True, counted=place.is_first)
    still = Training(module, torch.optim.SGD(module.parameters(), lr=0.0), NextToken(), flops, case.reduced)
    report = train_step(still, micro, counts, step=1, learning_rate=0.0, max_grad_norm=math.inf, device=CPU)
    found = _gradients(module)
    assert counts.num_parts_written == dist.get_world_size()
    assert counts.num_attention_products == flops.attention_products(case.lengths)
    assert counts.num_documents == len(case.lengths)
    assert sorted(report.sample_ids) == sorted(document.sample_id for document in documents)
    if dist.get_rank():
        return {}
    batch, expected_sum, expected_correct, expected = _reference(case, documents, silent)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in expected.values()))
    return {
        "loss": abs(report.loss - expected_sum / (batch.weight_sum or 1.0)),
        "loss_itself": report.loss,
        "gradient": max(_relative(found[name], gradient) for name, gradient in expected.items()),
        "greatest_gradient": max(float(gradient.abs().max()) for gradient in found.values()),
        "norm": abs(report.grad_norm - norm) / (norm or 1.0),
        "accuracy": abs(report.figures["accuracy"] - expected_correct / max(batch.num_targets, 1)),
        "num_targets": report.num_targets,
        "expected_targets": batch.num_targets,
        "num_tokens": abs(report.num_tokens - sum(case.lengths)),
    }


def _reference(
    case: Case, documents: Sequence[Document], silent: frozenset[str]
) -> tuple[PackedBatch, float, int, dict[str, torch.Tensor]]:
    """(the whole batch, its loss sum, right targets, gradients) of one plain process."""
    module = _module(case, 10**6)
    rows = [PackedRow((document,)) for document in documents]
    micro = _micro_batches(rows, len(rows), max(case.lengths), silent)
    batch = micro[0].batch
    sums = accumulate_gradients(module, micro, NextToken(), divisors={"loss": batch.weight_sum}, device=CPU)
    return batch, sums["loss"], int(sums["num_correct"]), _gradients(module)


def _documents(case: Case) -> list[Document]:
    source = np.random.default_rng(case.seed)
    documents = []
    for number, length in enumerate(case.lengths):
        token_ids = source.integers(0, SPECS[case.spec].vocab_size, length).astype(np.int32)
        mask = np.ones(length, np.bool_) if case.masked == "none" else source.random(length) < 0.8
        mask[-1] = True
        weights = np.where(mask, source.choice([0.5, 1.0, 3.0], length), 0.0).astype(np.float32) if case.weighted else None
        documents.append(Document(str(number), token_ids, mask, weights))
    return documents


def _shares(case: Case, documents: Sequence[Document], num_ranks: int) -> list[list[PackedRow]]:
    """[num_ranks] rows of each rank, as many on each; rows without a document make up the number."""
    source = np.random.default_rng([case.seed, 1])
    rows: list[list[Document]] = []
    first, *others = documents
    for document in source.permutation(np.array(others, dtype=object)).tolist():
        has_room = rows and sum(len(other.token_ids) for other in rows[-1]) + len(document.token_ids) <= case.sequence_length
        if has_room and source.random() < 0.8:
            rows[-1].append(document)
        else:
            rows.append([document])
    cut = round(case.share_of_first * len(rows))
    shares = [[[first], *rows[:cut]], *([] for _ in range(num_ranks - 1))]
    for number, row in enumerate(rows[cut:]):
        shares[1 + number % (num_ranks - 1) if num_ranks > 1 else 0].append(row)
    longest = max(len(share) for share in shares)
    return [[PackedRow(tuple(row)) for row in [*share, *[[]] * (longest - len(share))]] for share in shares]


def _silent(case: Case, documents: Sequence[Document], last_share: Sequence[PackedRow]) -> frozenset[str]:
    """Ids of the documents whose labels are all ignored."""
    source = np.random.default_rng([case.seed, 2])
    if case.masked == "some":
        return frozenset(document.sample_id for document in documents if source.random() < 0.5)
    chosen = {"none": [], "a rank": [document for row in last_share for document in row.documents], "all": documents}
    return frozenset(document.sample_id for document in chosen[case.masked])


def _micro_batches(rows: Sequence[PackedRow], size: int, sequence_length: int, silent: frozenset[str]) -> list[MicroBatch]:
    batches = [collate(rows[start : start + size], sequence_length, 0) for start in range(0, len(rows), size)]
    for number, batch in enumerate(batches):
        for row, names in enumerate(batch.sample_ids):
            for index, name in enumerate(names):
                if name in silent:
                    batch.labels[row][batch.document_ids[row] == index] = IGNORE_INDEX
        kept = batch.labels != IGNORE_INDEX
        weight_sum = int(kept.sum()) if batch.weights is None else batch.weights[kept].sum(dtype=torch.float64)
        batches[number] = replace(batch, num_targets=int(kept.sum()), weight_sum=float(weight_sum))
    return [MicroBatch.of(batch) for batch in batches]


def _module(case: Case, chunk_tokens: int) -> LossModule:
    """Random everywhere; logits of a size that a loss of about log(vocab_size) has."""
    module = LossModule(Decoder(SPECS[case.spec]), chunk_tokens).to(getattr(torch, case.dtype))
    generator = torch.Generator().manual_seed(case.seed)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        spread = 1.0 + 0.1 * drawn if "norm" in name else 0.1 * drawn
        parameter.data = spread.to(parameter.dtype)
    return module


def _gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        found[name] = whole(parameter.grad)
    return found


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    return difference / scale if scale else difference

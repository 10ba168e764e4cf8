"""The memory and time models against measured training steps, in fresh processes: the error of each prediction.

`python -m benchmarks estimate [--steps 3] [--only small]`

Random models of several sizes, lengths, dtypes and cuts, one or two ranks of one thread; each variant is run twice. Memory is
the most that a rank's process held, less what it held before the model (interpreter and libraries). Once freed memory goes back
to the system: then a process holds what lives, and that is what `estimate_memory` predicts. And once as ranks do train: the
heap's holes come on top, for which one factor is measured (`heap_factor`, the median). Time is the median step after the
first, in seconds of the processor, against `estimate_step` with the processor's own measured peak; its one free number, the
share of that peak that products reach, is fitted to one variant (`FITTED`) and held for the others.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.report import Report, say
from benchmarks.trial import Trial, device_of, run_trial
from lib.config.model import LoraConfig, ModelConfig
from lib.config.parallel import ClusterShape
from lib.config.train import ReduceGradients
from lib.parallel.memory_model import HEAP_FACTOR, BatchShape, estimate_memory
from lib.parallel.time_model import Machines, estimate_step

TINY = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_layers": 6, "num_heads": 4, "head_dim": 64}
SMALL = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_layers": 6, "num_heads": 6, "head_dim": 64}
WIDE = {"vocab_size": 16384, "hidden_size": 768, "intermediate_size": 2048, "num_layers": 2, "num_heads": 12, "head_dim": 64}
FLOAT = ModelConfig(compute_dtype="float32", loss_chunk_tokens=256)
MIB = 1 << 20
FITTED = "small 1024"


@dataclass(frozen=True)
class Variant:
    """A trial and how many ranks it runs on."""

    size: dict[str, int]
    rows: int
    length: int
    ranks: int = 1
    config: ModelConfig = FLOAT
    micro_batches: int = 1
    reduced: ReduceGradients = "each_step"

    @property
    def trial(self) -> Trial:
        shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=self.ranks, threads_per_rank=1)
        return Trial(self.size, BatchShape(self.rows, self.length, self.micro_batches, self.reduced), self.config, shape)


VARIANTS = {
    "tiny 1024": Variant(TINY, 1, 1024),
    "small 256": Variant(SMALL, 1, 256),
    "small 1024": Variant(SMALL, 1, 1024),
    "wide 512": Variant(WIDE, 1, 512),
    "small 1024 recomputed": Variant(SMALL, 1, 1024, config=FLOAT.model_copy(update={"activation_checkpointing": "layer"})),
    "small 1024 adapters": Variant(SMALL, 1, 1024, config=FLOAT.model_copy(update={"lora": LoraConfig(rank=16)})),
    "small 1024 bfloat16": Variant(SMALL, 1, 1024, config=ModelConfig(loss_chunk_tokens=256)),
    "small 256 on 2": Variant(SMALL, 1, 256, ranks=2),
    "small 1024 on 2": Variant(SMALL, 1, 1024, ranks=2),
    "small 256 on 2, accumulated": Variant(SMALL, 1, 256, ranks=2, micro_batches=2),
    "small 256 on 2, accumulated in pieces": Variant(SMALL, 1, 256, ranks=2, micro_batches=2, reduced="each_micro_batch"),
    "small 1024 selective": Variant(SMALL, 1, 1024, config=FLOAT.model_copy(update={"activation_checkpointing": "selective"})),
}


def memory_row(variant: Variant, returned: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the rank that needed the most."""
    trial = variant.trial
    estimate = estimate_memory(trial.spec, variant.config, {"shard": variant.ranks}, trial.batch, on_gpu=False, frozen_bytes=4)
    needed, taken = (max(rank["peak_bytes"] - rank["held_bytes"] for rank in found) for found in (returned, trained))
    parts = {name: round(value / MIB, 1) for name, value in vars(estimate).items()}
    return {
        "needed_mib": round(needed / MIB, 1),
        "predicted_mib": round(estimate.total / MIB, 1),
        "error": round(estimate.total / needed - 1.0, 4),
        "taken_mib": round(taken / MIB, 1),
        "heap_factor": round(taken / needed, 3),
        "taken_error": round(HEAP_FACTOR * estimate.total / taken - 1.0, 4),
        "process_mib": round(max(rank["held_bytes"] for rank in trained) / MIB, 1),
        "parts_mib": parts,
    }


def time_row(variant: Variant, measured: Sequence[dict[str, Any]], efficiency: float | None) -> dict[str, Any]:
    """efficiency: None: what makes the prediction right, which is found here."""
    trial = variant.trial
    seconds = statistics.median(statistics.median(rank["work_seconds"][1:]) for rank in measured)
    machines = Machines(device_of(measured), per_node=variant.ranks)
    arguments = (trial.spec, variant.config, {"shard": variant.ranks}, trial.batch)
    found = estimate_step(*arguments, machines=machines, efficiency=efficiency or 1.0)
    if efficiency is None:
        efficiency = found.compute_seconds / max(seconds - found.exposed_seconds, 1e-9)
        found = replace(found, compute_seconds=found.compute_seconds / efficiency)
    parts = {
        name: round(statistics.median(row[name] for row in measured[0]["parts"][1:]), 4) for name in measured[0]["parts"][0]
    }
    return {
        "seconds": round(seconds, 4),
        "predicted_seconds": round(found.seconds, 4),
        "error": round(found.seconds / seconds - 1.0, 4),
        "efficiency": round(efficiency, 4),
        "peak_gflops": round(machines.device.flops / 1e9, 1),
        "predicted_transfers": round(found.exposed_seconds, 4),
        "parts": parts,
    }


def main(arguments: Sequence[str]) -> None:
    """Measure all variants and print the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks estimate")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", default="", help="variants whose name begins so")
    options = parser.parse_args(arguments)
    chosen = {name: variant for name, variant in VARIANTS.items() if name.startswith(options.only)}
    measured, memory = {}, {}
    for name, variant in chosen.items():
        returned = run_trial(variant.trial, num_steps=2, return_memory=True)
        measured[name] = run_trial(variant.trial, num_steps=options.steps)
        row = memory[name] = memory_row(variant, returned, measured[name])
        say(
            f"  {name}: {row['needed_mib']} MiB, {row['predicted_mib']} predicted, {row['error']:+.1%}; "
            f"{row['taken_mib']} with the heap's holes, x {row['heap_factor']}"
        )
    fitted = time_row(VARIANTS[FITTED], measured[FITTED], None)["efficiency"] if FITTED in measured else None
    times = {name: time_row(variant, measured[name], fitted) for name, variant in chosen.items()}
    for name, row in times.items():
        say(f"  {name}: {row['seconds']} s, {row['predicted_seconds']} predicted, {row['error']:+.1%}")
    report = Report("estimate")
    errors = {
        "memory": [abs(row["error"]) for row in memory.values()],
        "process": [abs(row["taken_error"]) for row in memory.values()],
        "time": [abs(row["error"]) for row in times.values()],
    }
    report.ours = {f"{what}_median_error": statistics.median(found) for what, found in errors.items()}
    report.ours |= {f"{what}_worst_error": max(found) for what, found in errors.items()}
    report.ours["heap_factor"] = statistics.median(row["heap_factor"] for row in memory.values())
    report.ours["memory_agreement"] = 1.0 - report.ours["memory_worst_error"]
    report.targets = {"memory_agreement": 0.85}
    report.details = {"memory": memory, "time": times, "fitted": FITTED, "options": vars(options)}
    report.print()

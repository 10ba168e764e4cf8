"""Strong and weak scaling of a training step, the models' predictions beside: gloo on CPU ranks, NCCL on GPUs.

`python -m benchmarks scaling [--ranks 1 2 4] [--gpus-per-node 0] [--steps 6]`

Strong: the same rows in a step whatever the number of ranks. Weak: the same rows for each rank. Efficiency is the time that
perfect scaling would take, from one rank's, over the time taken. With --gpus-per-node the ranks are GPUs, in a Ray cluster
where they need several nodes; without it they are processes of one thread on this machine. Where there are more of them than
cores they share those, and the report says so: then no efficiency of time is to be had, only of work, in seconds of the
processor, which waiting and other processes don't enter. The share of the peak that products reach is fitted to one rank's
work; the prediction for more takes the peak that each of them measures while all do.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.report import Report, say
from benchmarks.trial import Trial, device_of, run_trial
from lib.cluster.group import GroupFactory
from lib.cluster.local import LocalGroup
from lib.cluster.ray_backend import RayGroup
from lib.config.model import ModelConfig
from lib.config.parallel import ClusterShape
from lib.parallel.memory_model import BatchShape
from lib.parallel.time_model import Machines, estimate_step

SIZES = {
    "cpu": {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_layers": 4, "num_heads": 6, "head_dim": 64},
    "gpu": {"vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 5632}
    | {"num_layers": 22, "num_heads": 32, "head_dim": 64},
}
LENGTHS = {"cpu": 256, "gpu": 4096}
KINDS = ("strong", "weak")


def trial_of(kind: str, ranks: int, most: int, gpus_per_node: int) -> Trial:
    """Strong: `most` rows in all. Weak: one row a rank. A micro-batch is one row, so that each does the same work."""
    where = "gpu" if gpus_per_node else "cpu"
    per_node = min(ranks, gpus_per_node) if gpus_per_node else ranks
    shape = ClusterShape(
        nodes=ranks // per_node, gpus_per_node=gpus_per_node and per_node, ranks_per_node=per_node, threads_per_rank=1
    )
    config = ModelConfig(compute_dtype="bfloat16" if gpus_per_node else "float32", loss_chunk_tokens=1024)
    micro_batches = most // ranks if kind == "strong" else 1
    return Trial(SIZES[where], BatchShape(1, LENGTHS[where], micro_batches), config, shape)


def predicted(trial: Trial, measured: Sequence[dict[str, Any]], efficiency: float) -> float:
    machines = Machines(device_of(measured), per_node=trial.shape.ranks_per_node)
    sizes = {"shard": trial.shape.num_ranks}
    return estimate_step(trial.spec, trial.config, sizes, trial.batch, machines=machines, efficiency=efficiency).seconds


def scale(kind: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Ranks -> what was measured and predicted."""
    rows: dict[str, dict[str, Any]] = {}
    efficiency, alone, alone_work, most = 0.0, 0.0, 0.0, max(options.ranks)
    for ranks in options.ranks:
        trial = trial_of(kind, ranks, most, options.gpus_per_node)
        factory: GroupFactory = LocalGroup if trial.shape.nodes == 1 else RayGroup
        measured = run_trial(trial, num_steps=options.steps, group_factory=factory)
        seconds, work = (
            statistics.median(second for rank in measured for second in rank[what][1:]) for what in ("seconds", "work_seconds")
        )
        if not rows:
            alone, alone_work, efficiency = seconds, work, predicted(trial, measured, 1.0) / work
        guess = predicted(trial, measured, efficiency)
        share = options.ranks[0] / ranks if kind == "strong" else 1.0
        parts = measured[0]["parts"][1:]
        rows[str(ranks)] = {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(trial.batch.tokens * trial.batch.micro_batches * ranks / seconds, 1),
            "efficiency": round(share * alone / seconds, 4),
            "work_seconds": round(work, 4),
            "work_efficiency": round(share * alone_work / work, 4),
            "predicted_work_seconds": round(guess, 4),
            "prediction_error": round(guess / work - 1.0, 4),
            "parts": {name: round(statistics.median(row[name] for row in parts), 4) for name in parts[0]},
            "peak_memory_mib": [round(rank["peak_bytes"] / (1 << 20), 1) for rank in measured],
            "shares_cores": not options.gpus_per_node and ranks > (os.cpu_count() or 1),
        }
        row = rows[str(ranks)]
        shared = ", the ranks share cores" if row["shares_cores"] else ""
        say(
            f"  {kind}, {ranks} rank(s): {seconds:.3f} s, efficiency {row['efficiency']:.2f}; work {work:.3f} s, {guess:.3f} "
            f"predicted, efficiency {row['work_efficiency']:.2f}{shared}"
        )
    return rows


def main(arguments: Sequence[str]) -> None:
    """Measure and print the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--gpus-per-node", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args(arguments)
    found = {kind: scale(kind, options) for kind in KINDS}
    report = Report("scaling", details={**found, "options": vars(options)})
    for kind, rows in found.items():
        own_cores = {ranks: row for ranks, row in rows.items() if not row["shares_cores"]}
        most = max(own_cores, key=int)
        report.ours[f"{kind}_efficiency_on_{most}"] = own_cores[most]["efficiency"]
        report.ours[f"{kind}_work_efficiency_on_{most}"] = own_cores[most]["work_efficiency"]
        report.ours[f"{kind}_worst_prediction_error"] = max(abs(row["prediction_error"]) for row in own_cores.values())
    report.print()

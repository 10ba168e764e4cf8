"""What the memory and time models say of published models on many GPUs: predictions, not measurements.

`python -m benchmarks predict [--gpus 8 16 ...] [--device H100] [--efficiency .5] [--length 8192] [--rows 512]`

The tables of docs/scaling.md, as Markdown on stderr. Weak: one row a GPU in a step. Strong: the same rows in a step, whatever
the number of GPUs, one row a micro-batch; gradients are summed up once a step, or in each micro-batch. Shards lie over all
GPUs; or over those of a node, with a copy on each node; or over all, with the experts of each layer dealt out over the GPUs
of a node.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.report import Report
from lib.config.recipes import SftJob
from lib.config.train import ReduceGradients
from lib.models.shapes import spec_of_shape
from lib.parallel.devices import DEVICES, GIB
from lib.train.forecast import Forecast, forecast

MODELS = ("qwen3-8b", "qwen3-30b-a3b")
PER_NODE = 8
CUTS = ("shards over all", "a copy on each node", "experts over each node")
SUMMED: dict[ReduceGradients, str] = {"each_step": "once a step", "each_micro_batch": "in each micro-batch"}


def predicted(
    model: str, gpus: int, options: argparse.Namespace, *, strong: bool, cut: str, reduced: ReduceGradients
) -> Forecast:
    nodes = max(1, gpus // PER_NODE)
    rows = max(options.rows, gpus) if strong else gpus
    config = {
        "data": {"num_streams": 4096},
        "model": {"activation_checkpointing": "layer", "loss_chunk_tokens": 2048},
        "train": {"rows_per_step": rows, "reduce_gradients": reduced},
        "parallel": {
            "replicate": nodes if cut == "a copy on each node" else 1,
            "expert": PER_NODE if cut == "experts over each node" else 1,
        },
    }
    size = {"steps": 1000, "sequence_length": options.length, "nodes": nodes, "gpus_per_node": min(gpus, PER_NODE)}
    job = SftJob.parse({"learning_rate": 1e-5, **size, "config": config}, where="predict")
    device = DEVICES[options.device]
    return forecast(job, spec_of_shape(model), device, room_bytes=device.memory_bytes, efficiency=options.efficiency)


def row_of(found: Forecast) -> dict[str, Any]:
    return {
        "memory_gib": round(found.memory.total / GIB, 1),
        "fits": found.fits,
        "micro_batches": found.batch.micro_batches,
        "step_seconds": round(found.step.seconds, 3),
        "transfer_share": round(found.step.exposed_seconds / found.step.seconds, 4),
        "tokens_per_second": round(found.step.tokens_per_second),
        "mfu": round(found.step.mfu(found.num_ranks, found.device), 4),
    }


def tables(options: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """ "model, scaling, cut" -> GPUs -> row."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for model in MODELS:
        cuts = CUTS if spec_of_shape(model).moe else CUTS[:2]
        best = cuts[-1] if len(cuts) > 2 else cuts[0]
        chosen: list[tuple[str, bool, str, ReduceGradients]] = [(f"weak, {cut}", False, cut, "each_step") for cut in cuts]
        chosen += [(f"strong, {best}, gradients summed up {when}", True, best, reduced) for reduced, when in SUMMED.items()]
        for name, strong, cut, reduced in chosen:
            forecasts = {
                gpus: predicted(model, gpus, options, strong=strong, cut=cut, reduced=reduced) for gpus in options.gpus
            }
            found[f"{model}, {name}"] = {str(gpus): row_of(forecast) for gpus, forecast in forecasts.items()}
    return found


def markdown(name: str, rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "",
        f"**{name}**",
        "",
        "| GPUs | GiB of a GPU | fits | micro-batches | s a step | exposed transfers | tokens/s | MFU |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for gpus, row in rows.items():
        lines.append(
            f"| {gpus} | {row['memory_gib']} | {'yes' if row['fits'] else '**no**'} | {row['micro_batches']} | "
            f"{row['step_seconds']:.2f} | {row['transfer_share']:.1%} | {row['tokens_per_second']:,} | {row['mfu']:.1%} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Print tables and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks predict")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--device", choices=sorted(DEVICES), default="H100")
    parser.add_argument("--efficiency", type=float, default=0.5)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=512)
    options = parser.parse_args(arguments)
    found = tables(options)
    for name, rows in found.items():
        print(markdown(name, rows), file=sys.stderr)
    report = Report("predict", details={"predictions_not_measurements": found, "options": vars(options)})
    report.ours = {name: rows[str(options.gpus[-1])]["mfu"] for name, rows in found.items()}
    report.print()

"""`python -m tasks.plan --config configs/sft/x.yaml`: what a run will do and take, in seconds and without a weight.

Checks every setting, the mesh of ranks and the memory of one; counts tokens and floating-point operations; says which tasks
a local run would execute. The last line is one JSON object; the exit status is 1 where something is wrong.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from lib.config.recipes import TrainJob
from lib.core.errors import PostflyteError, UserError
from lib.models.shapes import CONFIGS
from lib.models.spec import DecoderSpec
from lib.parallel.devices import DEVICES, cpu_device
from lib.parallel.plan import check_plan
from lib.train.forecast import Forecast, forecast
from lib.train.meters import peak_flops
from tasks.plan_job import read_job, read_numbers
from tasks.plan_text import describe
from tasks.preview import SAYS, preview


def main(arguments: list[str] | None = None) -> int:
    flags = _flags().parse_args(arguments)
    logging.disable(logging.WARNING)  # flytekit's, about a cache that isn't there yet
    try:
        given = {"nodes": flags.nodes, "gpus_per_node": flags.gpus_per_node, "model": flags.model}
        workflow, inputs, job = read_job(flags.config, {key: value for key, value in given.items() if value is not None})
        spec = read_numbers(job, str(inputs["model"]), flags.shape, inputs["vocabulary"])
        check_plan(job.config.parallel, job.shape.num_ranks, spec=spec, model=job.config.model)
        found = _forecast(job, spec, flags)
        tasks = [] if flags.no_tasks else _tasks(workflow, inputs)
    except PostflyteError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    values = found.to_json() | {"tasks": tasks, "job": job.model_dump(mode="json")}
    sys.stdout.write(f"{describe(found, job, tasks)}{json.dumps(values)}\n")
    return int(not found.fits)


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tasks.plan", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="inputs of a workflow: configs/<workflow>/<name>.yaml")
    parser.add_argument("--nodes", type=int, help="in place of the file's")
    parser.add_argument("--gpus-per-node", type=int, help="in place of the file's")
    parser.add_argument("--model", help="folder with a config.json, in place of the file's; weights aren't looked at")
    parser.add_argument("--shape", help=f"a published model in place of a folder: {', '.join(CONFIGS)}")
    parser.add_argument("--device", default="H100", choices=sorted(DEVICES), help="of the nodes that have GPUs")
    parser.add_argument("--efficiency", type=float, default=0.45, help="share of a device's peak that products reach")
    parser.add_argument("--no-tasks", action="store_true", help="leave out what a local run would execute")
    return parser


def _forecast(job: TrainJob, spec: DecoderSpec, flags: argparse.Namespace) -> Forecast:
    if job.shape.gpus_per_node:
        device = DEVICES[flags.device]
        return forecast(job, spec, device, room_bytes=device.memory_bytes, efficiency=flags.efficiency)
    peak = peak_flops(torch.device("cpu"), getattr(torch, job.config.model.compute_dtype))
    room = psutil.virtual_memory().total / job.shape.ranks_per_node
    return forecast(job, spec, cpu_device(peak), room_bytes=room, efficiency=flags.efficiency)


def _tasks(workflow: Any, inputs: dict[str, Any]) -> list[list[str]]:
    try:
        return [[name, SAYS[state]] for name, state in preview(workflow, inputs).tasks]
    except UserError as error:
        return [["", f"can't be told from this machine: {error}"]]


if __name__ == "__main__":
    sys.exit(main())

"""What the ranks of test_step.py's last test do: whole steps, with every collective between two or more ranks counted."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lib.config.parallel import ParallelConfig
from lib.models.flops import FlopCounter
from lib.parallel.mesh import DataPlace
from lib.train.step import NextToken, Training, count_step, train_step
from tests.lib.parallel.work import unreachable
from tests.lib.train.step_work import CHOICES, CPU, Model, build_module
from tests.numerics.rows import micro_batches, packed_rows

NUM_MICRO_BATCHES = 3
TRAFFIC_MESHES: dict[int, list[dict[str, int]]] = {2: [{}, {"replicate": 2}], 4: [{"replicate": 2}]}
"""Number of ranks -> how the model is cut."""
KINDS = {
    "_allgather_base_": "gather",
    "_reduce_scatter_base_": "scatter",
    "allreduce_": "sum",
    "allgather_": "lists",
    "barrier": "barrier",
}
"""An operator of torch's process groups -> what it is called here; any other one has its own name."""


class Collectives(TorchDispatchMode):
    """Counts what goes to torch's process groups, but for groups of one rank, where nothing moves."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes again as what it does to its pieces
        if func.namespace in ("c10d", "_c10d_functional"):
            kind = func._schema.name.partition("::")[2]
            places = [place for place, value in enumerate(func._schema.arguments) if value.name == "process_group"]
            group = dist.ProcessGroup.unbox(args[places[0]]) if places else None
            if group is None or group.size() > 1:
                self.counts[KINDS.get(kind, kind)] += 1
        return func(*args, **(kwargs or {}))


def traffic() -> dict[str, Any]:
    """Mesh, transport and choice -> {"counts": of the second step; "groups": how many modules are sharded as units}"""
    found = {}
    for mesh in TRAFFIC_MESHES[dist.get_world_size()]:
        for choice in CHOICES:
            found[f"{mesh} shared memory {choice}"] = _step(mesh, choice)
            with unreachable():
                found[f"{mesh} sockets {choice}"] = _step(mesh, choice)
    return found


def _step(mesh: dict[str, int], choice: Any) -> dict[str, Any]:
    parallel = ParallelConfig(**mesh)
    place = DataPlace.of(dist.get_rank(), dist.get_world_size(), parallel)
    # Each rank has rows of its own; where they are fewer than micro-batches, the same ones again.
    rows = (packed_rows()[place.rank :: place.num_ranks] * NUM_MICRO_BATCHES)[:NUM_MICRO_BATCHES]
    model, micro = Model.named("untied"), micro_batches(rows, 1)
    module = build_module(model, parallel)
    training = Training(
        module, torch.optim.AdamW(module.parameters()), NextToken(), FlopCounter(model.spec, model.lora), choice
    )
    for step in (1, 2):
        with Collectives() as collectives:
            counts = count_step(micro, NextToken(), training.flops, part_written=False)
            train_step(training, micro, counts, step=step, learning_rate=1e-2, max_grad_norm=0.5, device=CPU)
    return {"counts": collectives.counts, "groups": sum(isinstance(part, FSDPModule) for part in module.modules())}

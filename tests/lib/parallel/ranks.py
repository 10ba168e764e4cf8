"""Run a function on several real gloo ranks and get what each returns.

Ranks are forked from a server that has imported what they all need: an import of torch costs more than most of what they do.
"""

import json
import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

multiprocessing.get_context("forkserver").set_forkserver_preload(["lib.train.model_folder", __name__])


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """`function(*args)` on each rank of a fresh process group, one process each; the JSON values returned, by rank."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        all_args = (function, num_ranks, Path(folder), args)
        start_processes(_rank, all_args, num_ranks, start_method="forkserver")  # type: ignore[no-untyped-call]
        return [json.loads((Path(folder) / f"result-{rank}.json").read_text()) for rank in range(num_ranks)]


def run_here(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` as the only rank of a process group, in this process."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        _rank(0, function, 1, Path(folder), args)
        return json.loads((Path(folder) / "result-0.json").read_text())


def _rank(rank: int, function: Callable[..., Any], num_ranks: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=120))
    try:
        result = function(*args)
    finally:
        dist.destroy_process_group()
    (folder / f"result-{rank}.json").write_text(json.dumps(result))

"""What ranks do for test_boxes.py: tensors on two-dimensional meshes, saved and read on other meshes; saves in a race."""

import random
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from lib.train.checkpoint import KIND, CheckpointStore, load_state, published_steps, step_name
from lib.train.folder_shelf import FolderShelf
from lib.train.retention import Retention
from lib.train.state import Fetch, Piece, TrainState, piece_of

FACTS: dict[str, Any] = {"layout": {}, "loss": 1.0}
WARM_UP_SAVES = 4
WHOLE = torch.arange(8 * 6, dtype=torch.float32).reshape(8, 6)


class Tensors:
    """Named tensors, of which a rank holds pieces."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def pieces(self) -> dict[str, Piece]:
        return {name: piece_of(tensor) for name, tensor in self.tensors.items()}

    def values(self) -> dict[str, Any]:
        return {}

    def merge(self, values_of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
        return {}

    def load(self, fetch: Fetch, values: dict[str, Any]) -> None:
        for name, piece in self.pieces().items():
            piece.local.copy_(fetch(name, piece.offset, tuple(piece.local.shape)))


def placed(mesh: DeviceMesh, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """The ways in which a tensor may lie on a mesh of data and tensor ranks."""
    one_axis = mesh["tensor"]
    return {
        "fsdp_and_columns": distribute_tensor(whole, mesh, [Shard(0), Shard(1)]),
        "fsdp_of_rows": _fsdp_of_rows(mesh, whole),
        "columns_replicated": distribute_tensor(whole, mesh, [Replicate(), Shard(1)]),
        "replicated": distribute_tensor(whole, mesh, [Replicate(), Replicate()]),
        "on_one_axis": distribute_tensor(whole, one_axis, [Shard(1)]),
        "plain": whole.clone(),
    }


def _fsdp_of_rows(mesh: DeviceMesh, whole: torch.Tensor) -> DTensor:
    """Rows cut by the tensor axis first and by the data axis then, as FSDP2 lays out what is cut already."""
    data, tensor = mesh.get_local_rank("data"), mesh.get_local_rank("tensor")
    num_data, num_tensor = mesh["data"].size(), mesh["tensor"].size()
    local = whole.chunk(num_tensor)[tensor].chunk(num_data)[data].clone()
    placements = [_StridedShard(0, split_factor=num_tensor), Shard(0)]
    return DTensor.from_local(local, mesh, placements, shape=whole.shape, stride=whole.stride(), run_check=False)


def save_and_read(root: Path) -> dict[str, Any]:
    """Save from a 2 x 2 mesh, read into 4 x 1 and 1 x 4; {mesh: names that came back as another tensor}, and file sizes."""
    rank = dist.get_rank()
    store = CheckpointStore(FolderShelf(root), keep=Retention(1), rank=rank, num_ranks=4)
    for step in (1, 2):  # the second time nothing about the boxes is new
        state = TrainState()
        state.register(
            "tensors", Tensors(placed(init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor")), WHOLE * step))
        )
        store.save_async(step, state, FACTS)
        store.wait_for_part()
        dist.barrier()
        store.all_parts_written()
        store.wait_until_published()
        dist.barrier()
    store.close()
    wrong: dict[str, Any] = {}
    for sizes in ((4, 1), (1, 4)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))
        tensors = placed(mesh, torch.zeros_like(WHOLE))
        expected = Tensors(placed(mesh, WHOLE * 2)).pieces()
        state = TrainState()
        state.register("tensors", Tensors(tensors))
        load_state(FolderShelf(root).open(step_name(2)), state, rank=rank, num_ranks=4, layout={})
        for name, piece in Tensors(tensors).pieces().items():
            if not torch.equal(piece.local, expected[name].local):
                wrong[f"{sizes} {name}"] = piece.local.tolist()
    return wrong


def save_and_race(root: Path, num_saves: int) -> dict[str, Any]:
    """{"wrong": of `save_and_read`, and what `race` returns}"""
    return {"wrong": save_and_read(root / "read"), **race(root / "race", num_saves)}


def race(root: Path, num_saves: int, max_delay_seconds: float = 0.02) -> dict[str, Any]:
    """Save again and again into one folder, each rank late by chance at each move; {"published", "growth" of resident memory
    after the first few saves}."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    rng, before = random.Random(rank), 0
    store = CheckpointStore(FolderShelf(root), keep=Retention(2, every=10), rank=rank, num_ranks=num_ranks)
    tensors = {"own": torch.full((1 << 20,), float(rank)), "shared": torch.zeros(1000)}
    for step in range(1, num_saves + 1):
        state = TrainState()
        state.register("tensors", Tensors(tensors))
        for move in (
            lambda state=state, step=step: store.save_async(step, state, FACTS),
            store.wait_for_part,
            dist.barrier,
            store.all_parts_written,
            *((store.wait_until_published, lambda: verify_newest(root)) if rng.random() < 0.2 and rank == 0 else ()),
        ):
            time.sleep(rng.random() * max_delay_seconds)
            move()
        if step == WARM_UP_SAVES:
            before = psutil.Process().memory_info().rss
    store.wait_until_published()
    dist.barrier()
    store.close()
    verify_newest(root)
    return {"published": published_steps(FolderShelf(root)), "growth": psutil.Process().memory_info().rss / before - 1.0}


def verify_newest(root: Path) -> None:
    shelf = FolderShelf(root)
    shelf.verify(step_name(published_steps(shelf)[0]), KIND)

"""How much memory a rank needs to go on from a checkpoint. Kept apart, so that a rank starts without pytest."""

from pathlib import Path
from typing import Any

import torch

from lib.train.checkpoint import CheckpointStore, load_state, step_name
from lib.train.folder_shelf import FolderShelf
from lib.train.retention import Retention
from lib.train.state import Fetch, Piece, TrainState
from tests.lib.parallel.load_memory import forget_peak, status_bytes

NUM_TENSORS, ROWS, COLUMNS = 64, 1024, 1024
CUTS = ("rows", "columns")


class Slices:
    """A rank's equal share of each of many float32 tensors, cut by rows or by columns."""

    def __init__(self, rank: int, num_ranks: int, cut: str, num_tensors: int) -> None:
        whole = (ROWS, COLUMNS)
        dim = CUTS.index(cut)
        share = whole[dim] // num_ranks
        self.offset = tuple(rank * share if axis == dim else 0 for axis in (0, 1))
        shape = tuple(share if axis == dim else size for axis, size in enumerate(whole))
        self.tensors = {f"t{number}": torch.full(shape, float(number)) for number in range(num_tensors)}

    def pieces(self) -> dict[str, Piece]:
        return {name: Piece(tensor, (ROWS, COLUMNS), self.offset) for name, tensor in self.tensors.items()}

    def values(self) -> dict[str, Any]:
        return {}

    def merge(self, values_of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
        return {}

    def load(self, fetch: Fetch, values: dict[str, Any]) -> None:
        for name, piece in self.pieces().items():
            piece.local.copy_(fetch(name, piece.offset, tuple(piece.local.shape)))


def state_of(slices: Slices) -> TrainState:
    state = TrainState()
    state.register("slices", slices)
    return state


def save(root: Path, num_ranks: int, *, num_tensors: int) -> None:
    """A checkpoint of step 1, cut by rows."""
    stores = [CheckpointStore(FolderShelf(root), keep=Retention(1), rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
    for rank, store in enumerate(stores):
        slices = Slices(rank, num_ranks, "rows", num_tensors)
        store.save_async(1, state_of(slices), {"layout": {}, "loss": 1.0})
    for store in stores:
        store.wait_for_part()
    for store in reversed(stores):
        store.all_parts_written()
    stores[0].wait_until_published()
    for store in stores:
        store.close()


def resume(warm: str, root: str, num_ranks: int) -> dict[str, dict[str, int]]:
    """How rank 1 of `num_ranks` cuts what it takes -> bytes of its share, which it has before, and by how much the process was
    larger than that when it was largest, with the pages of files that it had mapped. `warm` is loaded before, so that all code
    is there."""
    found = {}
    for cut in CUTS:
        for folder, num_tensors in ((warm, 1), (root, NUM_TENSORS)):
            slices = Slices(1, num_ranks, cut, num_tensors)
            forget_peak()
            before = status_bytes("VmHWM")
            load_state(FolderShelf(Path(folder)).open(step_name(1)), state_of(slices), rank=1, num_ranks=num_ranks, layout={})
            assert all(bool((tensor == int(name[1:])).all()) for name, tensor in slices.tensors.items())
            share = sum(tensor.nbytes for tensor in slices.tensors.values())
            found[cut] = {"share": share, "beyond": status_bytes("VmHWM") - before}
    return found

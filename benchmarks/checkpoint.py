"""Checkpoints of a run: saving and loading against torch.save and a raw copy of the same bytes; what the step loop waits.

`python -m benchmarks checkpoint [--parameters 60] [--rounds 3] [--steps 20] [--every 10] [--saves 50]`

Weights and two moments of `--parameters` million float32 parameters, one rank, on the disk of the temporary folder; every
variant writes a new file, flushes it and puts it in the place of the one before. Ours also hashes each byte. The loop computes
as many matrix products a step as training so many parameters on 512 tokens takes; its blocked share is the time inside the
store's calls. Memory is looked at over `--saves` saves of a small state.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.floor import measure_floor
from benchmarks.report import Report, medians, say
from lib.core.artifact import fsync_path, verify
from lib.train.checkpoint import KIND, CheckpointStore, load_state, step_name
from lib.train.folder_shelf import FolderShelf, StoredFolder
from lib.train.retention import Retention
from lib.train.state import Fetch, Piece, TrainState

TOKENS_PER_STEP = 512
FACTS: dict[str, Any] = {"layout": {}, "loss": 1.0}
GROWTH_LIMIT = 0.02
WARM_UP_SAVES = 5
TARGETS = {"copy_speed_share": 0.8, "loop_not_blocked": 0.95, "memory_flat": 1.0}


class Tensors:
    """Weights and moments, in tensors of a million numbers."""

    def __init__(self, millions: int) -> None:
        names = [f"{part}/{number}" for part in ("weight", "exp_avg", "exp_avg_sq") for number in range(millions)]
        self.tensors = {name: torch.randn(1000, 1000) for name in names}

    def pieces(self) -> dict[str, Piece]:
        return {name: Piece(tensor, (1000, 1000), (0, 0)) for name, tensor in self.tensors.items()}

    def values(self) -> dict[str, Any]:
        return {}

    def merge(self, values_of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
        return {}

    def load(self, fetch: Fetch, values: dict[str, Any]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(fetch(name, (0, 0), (1000, 1000)))


def registry(tensors: Tensors) -> TrainState:
    state = TrainState()
    state.register("tensors", tensors)
    return state


def save_and_publish(store: CheckpointStore, step: int, state: TrainState) -> None:
    store.save_async(step, state, FACTS)
    store.wait_for_part()
    store.all_parts_written()
    store.wait_until_published()


def timed(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median wall seconds of each, the order turned round every round: a disk has no CPU time."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds):
        for name in list(variants) if index % 2 == 0 else list(variants)[::-1]:
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)
            say(f"  round {index + 1}/{rounds} {name}: {seconds[name][-1]:.2f} s")
    return medians(seconds)


@contextmanager
def _new_file(folder: Path, name: str) -> Iterator[Path]:
    """A path to write to; then the file is flushed and takes the place of the one before, as a checkpoint does: a file that is
    written over keeps its blocks, which saves a disk much work."""
    new = folder / f"{name}.new"
    yield new
    fsync_path(new)
    os.replace(new, folder / name)


def saving_and_loading(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of each variant. What is read back is compared with what was written."""
    tensors = Tensors(options.parameters)
    state, store = registry(tensors), CheckpointStore(FolderShelf(folder / "ours"), keep=Retention(1), rank=0, num_ranks=1)
    expected = {name: tensor.clone() for name, tensor in tensors.tensors.items()}
    steps = iter(range(1, 1000))

    def save() -> None:
        save_and_publish(store, next(steps), state)

    def torch_save() -> None:
        with _new_file(folder, "peer.pt") as target:
            torch.save(tensors.tensors, target)

    def copy() -> None:
        (source,) = next((folder / "ours").glob("step-*")).glob("*.safetensors")
        with _new_file(folder, "copy") as target:
            shutil.copyfile(source, target)

    for warm_up in (save, torch_save, copy) * 2:
        warm_up()
    seconds = timed({"save": save, "torch_save": torch_save, "raw_copy": copy}, options.rounds)

    def load() -> None:
        newest = next((folder / "ours").glob("step-*"))
        verify(newest, KIND)
        load_state(StoredFolder(newest), state, rank=0, num_ranks=1, layout={})

    def torch_load() -> None:
        # The peer's own format, of a file that it wrote above: nothing else in the project reads it.
        read = torch.load(folder / "peer.pt", weights_only=True)
        for name, tensor in tensors.tensors.items():
            tensor.copy_(read[name])

    seconds |= timed({"load": load, "torch_load": torch_load}, options.rounds)
    store.close()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.tensors.items()), "other tensors came back"
    return seconds


def blocked_share(folder: Path, options: argparse.Namespace) -> float:
    """Of a loop of steps that saves every few: share of its time spent in the store's calls."""
    tensors = Tensors(options.parameters)
    state, store = registry(tensors), CheckpointStore(FolderShelf(folder / "loop"), keep=Retention(1), rank=0, num_ranks=1)
    left, right = torch.randn(TOKENS_PER_STEP, 1000), torch.randn(1000, 1000)
    blocked, begun = 0.0, time.perf_counter()
    for step in range(1, options.steps + 1):
        for _ in range(3 * options.parameters):
            left @ right
        start = time.perf_counter()
        if store.pending and store.part_written():
            store.all_parts_written()
        if step % options.every == 0:
            if store.pending:
                store.wait_for_part()
                store.all_parts_written()
            store.save_async(step, state, FACTS)
        blocked += time.perf_counter() - start
    total = time.perf_counter() - begun
    store.wait_for_part()
    store.all_parts_written()
    store.wait_until_published()
    store.close()
    return blocked / total


def memory_growth(folder: Path, num_saves: int) -> float:
    """Resident memory after all saves, in units of that after the first few, less one."""
    state, store = registry(Tensors(4)), CheckpointStore(FolderShelf(folder / "memory"), keep=Retention(1), rank=0, num_ranks=1)
    process, before = psutil.Process(os.getpid()), 0
    for step in range(1, num_saves + 1):
        save_and_publish(store, step, state)
        if step == WARM_UP_SAVES:
            before = process.memory_info().rss
    store.close()
    published = folder / "memory" / step_name(num_saves)
    verify(published, KIND)
    return process.memory_info().rss / before - 1.0


def main(arguments: Sequence[str]) -> None:
    """Measure and print the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks checkpoint")
    parser.add_argument("--parameters", type=int, default=60, help="millions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--saves", type=int, default=50)
    options = parser.parse_args(arguments)
    floor = measure_floor()
    with tempfile.TemporaryDirectory(prefix="postflyte-checkpoint-") as name:
        folder = Path(name)
        say("  memory over many saves")
        growth = memory_growth(folder, options.saves)
        seconds = saving_and_loading(folder, options)
        say("  a loop that saves")
        blocked = blocked_share(folder, options)
    report = Report("checkpoint", details={"options": vars(options), "memory_growth": growth})
    report.ours = {
        "save_seconds": seconds["save"],
        "load_seconds": seconds["load"],
        "copy_speed_share": seconds["raw_copy"] / seconds["save"],
        "loop_not_blocked": 1.0 - blocked,
        "memory_flat": float(growth <= GROWTH_LIMIT),
    }
    report.peers = {
        "torch_save": {"save_seconds": seconds["torch_save"], "load_seconds": seconds["torch_load"]},
        "raw_copy": {"save_seconds": seconds["raw_copy"]},
    }
    report.compare("save_seconds", "torch_save", smaller_is_better=True)
    report.compare("load_seconds", "torch_save", smaller_is_better=True)
    report.compare("save_seconds", "raw_copy", smaller_is_better=True)
    report.targets = TARGETS
    report.print(floor)

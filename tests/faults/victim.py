"""A run that only saves: weights that change by a rule, back-to-back checkpoints, and a kill at a chosen event.

An event is anything that Python's audit hooks report of the file system (open, mkdir, rename, remove, ...), so every
step of a save and of its publishing can be hit without a line of test code in the store.
"""

import errno
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from lib.core.artifact import remove_stale_staging
from lib.train.checkpoint import CheckpointStore, checkpoint_folder, latest_valid, load_state
from lib.train.state import Fetch, Piece, TrainState, Values

STEPS = 6
_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "os.listdir", "os.scandir")


class Weights:
    """A tensor whose every step depends on the one before, to the last bit."""

    def __init__(self) -> None:
        self.tensor = torch.linspace(0, 1, 1000)

    def advance(self, step: int) -> None:
        self.tensor = (self.tensor * 1.1 + step).sin()

    def pieces(self) -> dict[str, Piece]:
        return {"tensor": Piece(self.tensor, tuple(self.tensor.shape), (0,))}

    def values(self) -> dict[str, Any]:
        return {}

    def merge(self, values_of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
        return {}

    def load(self, fetch: Fetch, values: dict[str, Any]) -> None:
        self.tensor = fetch("tensor", (0,), tuple(self.tensor.shape)).clone()


def run(root: Path) -> torch.Tensor:
    """Go on from the newest checkpoint to the last step, saving after each."""
    weights, seen = Weights(), {"steps": 0}
    state = TrainState()
    state.register("weights", weights)
    state.register("seen", Values(lambda: dict(seen), seen.update))
    root.mkdir(parents=True, exist_ok=True)
    remove_stale_staging(root)
    begun = latest_valid(root) or 0
    if begun:
        load_state(checkpoint_folder(root, begun), state, rank=0, num_ranks=1)
    assert seen["steps"] == begun
    store = CheckpointStore(root, keep=2, rank=0, num_ranks=1)
    for step in range(begun + 1, STEPS + 1):
        weights.advance(step)
        seen["steps"] = step
        store.save_async(step, state, {"identity": "victim"})
        store.wait_for_part()
        store.all_parts_written()
    store.wait_until_published()
    store.close()
    return weights.tensor


def run_killed(root: str, at_event: int) -> None:
    """`run`, with SIGKILL at the event of that number. Exit code 0 if the run ends before it."""
    _at_event(Path(root), at_event, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(Path(root))


def run_without_space(root: str, at_event: int) -> None:
    """`run`, where opening, making and renaming fail with ENOSPC from the event of that number on. Exit code 3 on an error."""

    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _at_event(Path(root), at_event, refuse, events=("open", "os.mkdir", "os.rename"), once=False)
    try:
        run(Path(root))
    except Exception as error:  # noqa: BLE001 - the parent judges it by its text
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(3)


def _at_event(root: Path, number: int, act: Any, *, events: tuple[str, ...] = _EVENTS, once: bool = True) -> None:
    seen, lock = 0, threading.Lock()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in events or not any(isinstance(arg, (str, Path)) and str(root) in str(arg) for arg in args):
            return
        if event == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR)) and not once:
            return
        with lock:
            seen += 1
            hit = seen == number or (seen > number and not once)
        if hit:
            act()

    sys.addaudithook(hook)

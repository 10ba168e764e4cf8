"""A run that only saves: weights that change by a rule, back-to-back checkpoints, and a fault at a chosen event.

Its ranks live in one process, each with a slice of the weights and a store of its own. An event is anything that Python's
audit hooks report of the file system (open, mkdir, rename, remove, ...), so every step of a save and of its publishing can
be hit without a line of test code in the store. Flushes are counted at os.fsync, and files are cut short by the kernel's
limit on their size.
"""

import errno
import os
import resource
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lib.train.checkpoint import CheckpointStore, latest_valid, load_state, step_name
from lib.train.retention import Retention
from lib.train.run_home import open_shelf
from lib.train.shelf import Shelf, Stored
from lib.train.state import Fetch, Piece, TrainState, Values

STEPS = 6
FACTS = {"identity": "victim", "layout": {}, "loss": 1.0}
NUM_WEIGHTS = 1000
CALLS = ("open", "os.mkdir", "os.rename", "fsync", "size")
"""What `run_failing` can make fail."""
_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "os.listdir", "os.scandir")


class Weights:
    """A rank's slice of a tensor whose every step depends on the one before, to the last bit."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.start, stop = (NUM_WEIGHTS * number // num_ranks for number in (rank, rank + 1))
        self.tensor = torch.linspace(0, 1, NUM_WEIGHTS)[self.start : stop].clone()

    def advance(self, step: int) -> None:
        self.tensor = (self.tensor * 1.1 + step).sin()

    def pieces(self) -> dict[str, Piece]:
        return {"tensor": Piece(self.tensor, (NUM_WEIGHTS,), (self.start,))}

    def values(self) -> dict[str, Any]:
        return {}

    def merge(self, values_of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
        return {}

    def load(self, fetch: Fetch, values: dict[str, Any]) -> None:
        self.tensor = fetch("tensor", (self.start,), tuple(self.tensor.shape)).clone()


def state_of(weights: Weights) -> TrainState:
    state = TrainState()
    state.register("weights", weights)
    return state


class _Rank:
    """One rank's weights, registry and store."""

    def __init__(self, shelf: Shelf, rank: int, num_ranks: int, start: str) -> None:
        self.place = {"rank": rank, "num_ranks": num_ranks}
        self.weights, self.seen = Weights(rank, num_ranks), {"steps": 0}
        self.state = state_of(self.weights)
        self.state.register("seen", Values(lambda: dict(self.seen), self.seen.update))
        self.store = CheckpointStore(shelf, keep=Retention(2), start=start, **self.place)

    def load(self, stored: Stored) -> None:
        load_state(stored, self.state, layout={}, **self.place)


def run(home: str | Path, num_ranks: int = 1, last_step: int = STEPS) -> torch.Tensor:
    """Go on from the newest checkpoint, by however many ranks, to the last step, saving after each; all the weights."""
    shelf, start = open_shelf(str(home)), secrets.token_hex(4)
    shelf.claim(start)
    begun = latest_valid(shelf) or 0
    ranks = [_Rank(shelf, rank, num_ranks, start) for rank in range(num_ranks)]
    for rank in ranks if begun else []:
        rank.load(shelf.open(step_name(begun)))
        assert rank.seen["steps"] == begun
    for step in range(begun + 1, last_step + 1):
        for rank in ranks:
            rank.weights.advance(step)
            rank.seen["steps"] = step
            rank.store.save_async(step, rank.state, FACTS)
        for rank in ranks:
            rank.store.wait_for_part()
        for rank in ranks:
            rank.store.all_parts_written()
    for rank in ranks:
        rank.store.wait_until_published()
        rank.store.close()
    return torch.cat([rank.weights.tensor for rank in ranks])


def run_killed(root: str, at_event: int, num_ranks: int = 1) -> None:
    """`run`, with SIGKILL at the event of that number. Exit code 0 if the run ends before it."""
    _at_event(Path(root), at_event, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(Path(root), num_ranks)


def run_without_space(root: str, at_event: int) -> None:
    """`run`, where opening, making and renaming fail with ENOSPC from the event of that number on. Exit code 3 on an error."""
    _at_event(Path(root), at_event, _raiser(errno.ENOSPC), events=("open", "os.mkdir", "os.rename"), once=False)
    _run_to_exit(root)


def run_failing(root: str, call: str, number: int, code: int) -> None:
    """`run`, where one call fails once with an errno: the `number`-th of its kind in CALLS, or, for "size", every write
    beyond that many bytes of a file, after what fits has been written. Exit code 3 on an error, 4 if none came of the fault,
    0 if the call was not made."""
    if call == "size":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.RLIM_INFINITY))
    elif call == "fsync":
        _fail_fsync(number, _raiser(code))
    else:
        _at_event(Path(root), number, _raiser(code), events=(call,), writes_only=True)
    _run_to_exit(root)


def _run_to_exit(root: str) -> None:
    try:
        run(Path(root))
    except Exception as error:  # noqa: BLE001 - the parent judges it by its exit code
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(3)
    os._exit(4 if _refused else 0)


_refused: list[int] = []
"""Errnos that were raised in this process."""


def _raiser(code: int) -> Callable[[], None]:
    def refuse() -> None:
        _refused.append(code)
        raise OSError(code, os.strerror(code))

    return refuse


def _fail_fsync(number: int, act: Callable[[], None]) -> None:
    flush, seen, lock = os.fsync, 0, threading.Lock()

    def failing(descriptor: int) -> None:
        nonlocal seen
        with lock:
            seen += 1
            hit = seen == number
        if hit:
            act()
        flush(descriptor)

    os.fsync = failing


def _at_event(
    root: Path,
    number: int,
    act: Callable[[], None],
    *,
    events: tuple[str, ...] = _EVENTS,
    once: bool = True,
    writes_only: bool = False,
) -> None:
    seen, lock = 0, threading.Lock()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in events or not any(isinstance(arg, (str, Path)) and str(root) in str(arg) for arg in args):
            return
        if event == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR)) and (writes_only or not once):
            return
        with lock:
            seen += 1
            hit = seen == number or (seen > number and not once)
        if hit:
            act()

    sys.addaudithook(hook)

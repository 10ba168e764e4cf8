"""A process that reads rows is killed again and again at moments of chance: which rows are lost, and which come twice.

The reader appends the ids of each step to a journal. Every few steps it puts down its position beside the length of the
journal; the next process cuts the journal back to that length and goes on there, as training does from a checkpoint. So
the journal of the last process names the rows that a model would have been trained on.
"""

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

CHECKPOINT_STEPS = 3
"""A kill costs the steps since the last multiple of these, which are then taken again."""
MOST_STEPS = 9
"""A process lives for 1 to so many steps and a random part of the next ones."""
_DEADLINE_SECONDS = 120.0


class Reader(Protocol):
    """Rows from their start, or from a position."""

    def load_state(self, state: dict[str, Any]) -> None: ...

    def next_step(self) -> list[str]:
        """Ids of the next few rows; none at the end."""
        ...

    def state(self) -> dict[str, Any]:
        """Where `next_step` goes on, as JSON values."""
        ...


def lost_and_repeated(
    open_reader: Callable[[], Reader], folder: Path, *, num_kills: int, num_steps: int, seed: int
) -> tuple[int, int, int]:
    """(kills, rows lost, rows repeated) against a process that nobody kills; none is killed any more once the rows end.

    Args:
        num_steps: all that is read; at least as many steps as the killed processes make.
    """
    whole, killed = folder / "whole", folder / "killed"
    for place in (whole, killed):
        place.mkdir(parents=True)
        (place / "journal").touch()
    chance = random.Random(seed)
    _check(os.waitpid(_fork(open_reader, whole, num_steps), 0)[1])
    done = 0
    while done < num_kills and _kill(open_reader, killed, chance):
        done += 1
    _check(os.waitpid(_fork(open_reader, killed, num_steps), 0)[1])
    expected, found = ((place / "journal").read_text(encoding="utf-8").split() for place in (whole, killed))
    lost, repeated = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
    if not lost and not repeated and expected != found:
        raise AssertionError("all rows came, in another order")
    return done, lost.total(), repeated.total()


def _fork(open_reader: Callable[[], Reader], folder: Path, num_steps: int | None = None) -> int:
    """A process that reads; a copy of this one, so that starting it takes no imports. No thread may be running here."""
    saved = _rolled_back(folder)
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        reader = open_reader()
        if "state" in saved:
            reader.load_state(saved["state"])
        _read(reader, folder, saved["step"], num_steps)
        status = 0
    finally:
        os._exit(status)


def _rolled_back(folder: Path) -> dict[str, Any]:
    """The last position that was put down; the journal is cut back to what belongs to it."""
    checkpoint = folder / "checkpoint.json"
    saved: dict[str, Any] = json.loads(checkpoint.read_bytes()) if checkpoint.exists() else {"size": 0, "step": 0}
    os.truncate(folder / "journal", saved["size"])
    return saved


def _read(reader: Reader, folder: Path, step: int, num_steps: int | None) -> None:
    with (folder / "journal").open("ab") as journal:
        while (num_steps is None or step < num_steps) and (ids := reader.next_step()):
            journal.write((" ".join(ids) + "\n").encode())
            journal.flush()
            step += 1
            if step % CHECKPOINT_STEPS == 0:
                state = {"size": journal.tell(), "step": step, "state": reader.state()}
                (folder / "new.json").write_text(json.dumps(state), encoding="utf-8")
                os.replace(folder / "new.json", folder / "checkpoint.json")


def _kill(open_reader: Callable[[], Reader], folder: Path, chance: random.Random) -> bool:
    """Start a process and kill it some steps later; False where it came to the end before."""
    process = _fork(open_reader, folder)
    journal, deadline = folder / "journal", time.monotonic() + _DEADLINE_SECONDS
    goal = journal.read_bytes().count(b"\n") + chance.randint(1, MOST_STEPS)
    while journal.read_bytes().count(b"\n") < goal:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            _check(status)
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"the reader made no step within {_DEADLINE_SECONDS:.0f} s")
        time.sleep(0.001)
    time.sleep(chance.random() * 0.01)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def _check(status: int) -> None:
    if code := os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"the reader ended with the exit code {code}; see its messages above")

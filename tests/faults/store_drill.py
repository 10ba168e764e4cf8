"""Faults of the checkpoint store by the hundred: kills, input/output errors, single flipped bits.

The victim is tests/faults/victim.py in children of a fork server that has torch imported already. After each fault every
published checkpoint must verify, and the run, started again, must end in the bits of an unharmed one.
"""

import errno
import itertools
import logging
import multiprocessing
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

from lib.core.artifact import verify
from lib.core.errors import PostflyteError
from lib.train.checkpoint import KIND, latest_valid, published_steps, step_name
from lib.train.folder_shelf import FolderShelf
from tests.faults import victim

NUM_RANKS = (1, 2, 4)
DEADLINE_SECONDS = 60.0
MAX_EVENT = 200
"""About the file-system events of a whole run of one rank; those of four are more."""
SEED_STEPS = 2
ERRORS = (errno.ENOSPC, errno.EIO)
SIZES = range(1, 7000, 61)
"""Of RLIMIT_FSIZE, in bytes: from nothing to more than the largest file of a checkpoint."""
FULL_RESUME_EVERY = 10


def server() -> ForkServerContext:
    """Children that have torch imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.victim"])
    return context


def run_kills(root: Path, num_trials: int, *, seed: int) -> dict[str, Any]:
    """SIGKILL at a random event of the file system, up to three times a trial, each start with 1, 2 or 4 ranks."""
    rng, processes = random.Random(seed), server()
    expected = victim.run(root / "unharmed")
    kills, problems = 0, []
    for number in range(num_trials):
        home = root / f"trial-{number}"
        starts = [(rng.randrange(1, MAX_EVENT), rng.choice(NUM_RANKS)) for _ in range(3)]
        found = [_child(processes, victim.run_killed, str(home), *start) for start in starts]
        kills += found.count(-signal.SIGKILL)
        problems += _problems(home, expected, found, {0, -signal.SIGKILL}, num_ranks=rng.choice(NUM_RANKS))
        shutil.rmtree(home, ignore_errors=True)
        _tell(number + 1, num_trials)
    return _figures("store", num_trials, kills, problems, {"seed": seed})


def run_io_errors(root: Path, *, every: int = 1) -> dict[str, Any]:
    """Each call of a save and its publishing fails once, with each errno; and each file is cut at many lengths. A flush that
    fails must be told.

    Args:
        every: take each n-th case alone.
    """
    processes, expected = server(), victim.run(root / "unharmed")
    victim.run(root / "seed", last_step=SEED_STEPS)
    problems: list[str] = []
    reached: Counter[str] = Counter()
    num_trials = 0
    for call, code in itertools.product(victim.CALLS, ERRORS):
        if call == "size" and code != ERRORS[0]:
            continue  # the kernel chooses the errno of a file that is too long
        for number in SIZES if call == "size" else itertools.count(1):
            if number % every:
                continue
            home = root / f"{call}-{code}-{number}"
            shutil.copytree(root / "seed", home)
            exit_code = _child(processes, victim.run_failing, str(home), call, number, code)
            if exit_code == 0 and call != "size":
                break  # there is no call of that number
            num_trials += 1
            reached[call] += exit_code == 3
            if not published_steps(FolderShelf(home)):
                problems.append(f"{home.name}: no checkpoint is left")
            problems += _problems(home, expected, [exit_code], {0, 3} if call == "fsync" else {0, 3, 4})
            shutil.rmtree(home, ignore_errors=True)
            _tell(num_trials, None)
    return _figures("io", num_trials, 0, problems, {"errors": dict(reached)})


def run_bitflips(root: Path, num_trials: int, *, seed: int) -> dict[str, Any]:
    """One bit of one file of the newest checkpoint is turned: it must be found, and the checkpoint before be used."""
    rng = random.Random(seed)
    expected = victim.run(root / "unharmed")
    victim.run(root / "seed", num_ranks=2, last_step=victim.STEPS - 1)
    problems = []
    logging.getLogger("lib.train.checkpoint").setLevel(logging.ERROR)
    for number in range(num_trials):
        home = root / f"flip-{number}"
        shutil.copytree(root / "seed", home)
        newest, before = published_steps(FolderShelf(home))
        path = rng.choice(sorted(file for file in (home / step_name(newest)).iterdir()))
        content = bytearray(path.read_bytes())
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        found = latest_valid(FolderShelf(home))
        if found != before:
            problems.append(f"{home.name}: bit {bit} of {path.name}: step {found} was taken, not {before}")
        if number % FULL_RESUME_EVERY == 0 and not torch.equal(victim.run(home), expected):
            problems.append(f"{home.name}: resumed to other bits")
        shutil.rmtree(home, ignore_errors=True)
        _tell(number + 1, num_trials)
    return _figures("bitflip", num_trials, 0, problems, {"seed": seed})


def _child(processes: ForkServerContext, target: Any, *args: Any) -> int | None:
    """Exit code of a child; None where it had to be ended at the deadline."""
    child = processes.Process(target=target, args=args)
    child.start()
    child.join(DEADLINE_SECONDS)
    code = child.exitcode
    if code is None:
        child.kill()
        child.join()
    return code


def _problems(
    home: Path, expected: torch.Tensor, exit_codes: list[int | None], allowed: set[int], num_ranks: int = 1
) -> Iterator[str]:
    for code in exit_codes:
        if code is None:
            yield f"{home.name}: hung"
        elif code not in allowed:
            yield f"{home.name}: exit code {code}"
    try:
        for step in published_steps(FolderShelf(home)) if home.exists() else []:
            verify(home / step_name(step), KIND)
        if not torch.equal(victim.run(home, num_ranks), expected):
            yield f"{home.name}: resumed to other bits"
    except PostflyteError as error:
        yield f"{home.name}: {type(error).__name__}: {error}"


def _figures(kind: str, num_trials: int, kills: int, problems: list[str], details: dict[str, Any]) -> dict[str, Any]:
    harmed = {problem.split(":")[0] for problem in problems}
    return {
        "kind": kind,
        "trials": num_trials,
        "survived": num_trials - len(harmed),
        "kills": kills,
        "hangs": sum(problem.endswith("hung") for problem in problems),
        "leaks": len(multiprocessing.active_children()),
        "details": {**details, "problems": problems[:20]},
    }


def _tell(done: int, total: int | None) -> None:
    if done % 50 == 0:
        print(f"{done}/{total or '?'} trials", file=sys.stderr, flush=True)

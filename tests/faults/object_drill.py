"""Faults of checkpoints in an object store: a kill at every put and delete, and a turned bit in every object.

The store is fsspec's in-memory one, whose user can be made to die (fragile_store.py); the run is that of victim.py.
"""

import random
from pathlib import Path
from typing import Any

import torch

from lib.core.errors import PostflyteError
from lib.train.checkpoint import KIND, latest_valid, published_steps, step_name
from lib.train.object_shelf import ObjectShelf
from tests.faults import victim
from tests.faults.fragile_store import MOMENTS, FragileStore, fragile_store

HOME = "fragile://bucket/run"
SEED_STEPS = 3
NUM_RANKS = (1, 2)


def run_kills(*, every: int = 1) -> dict[str, Any]:
    """Killed at each put and delete of a run that goes on from step 3, on one rank and on two, at each of MOMENTS.

    Args:
        every: take each n-th case alone.
    """
    store = fragile_store()
    expected = victim.run(HOME)
    store.restore(HOME, {})
    victim.run(HOME, last_step=SEED_STEPS)
    seed, problems, num_trials = store.dump(HOME), [], 0
    cases = [(num_ranks, moment) for num_ranks in NUM_RANKS for moment in MOMENTS]
    for case, (num_ranks, moment) in enumerate(cases):
        number = case % every
        while True:
            number += every
            store.restore(HOME, seed)
            if not _killed(number, moment, num_ranks):
                break
            num_trials += 1
            problem = _problem(expected, all_valid=moment != "half", num_ranks=NUM_RANKS[number % 2])
            problems += [f"{num_ranks} ranks, {moment} change {number}: {problem}"] if problem else []
    return _figures("objects", num_trials, problems)


def run_bitflips(*, num_trials: int, seed: int) -> dict[str, Any]:
    """One bit of one object of the newest checkpoint is turned, each object in turn: the one before is used."""
    rng, store, shelf = random.Random(seed), fragile_store(), ObjectShelf(HOME)
    expected = victim.run(HOME)
    store.restore(HOME, {})
    victim.run(HOME, num_ranks=2, last_step=victim.STEPS - 1)
    whole, problems = store.dump(HOME), []
    newest, before = published_steps(shelf)
    paths = sorted(path for path in whole if f"/{step_name(newest)}" in path)
    for number in range(num_trials):
        path = paths[number % len(paths)]
        content, bit = bytearray(whole[path]), rng.randrange(8 * len(whole[path]))
        content[bit // 8] ^= 1 << bit % 8
        store.restore(HOME, {**whole, path: bytes(content)})
        found = latest_valid(shelf)
        if found != before or published_steps(shelf) != [before]:
            problems.append(f"bit {bit} of {path}: step {found} was taken, not {before}")
        if number < len(paths) and not torch.equal(victim.run(HOME), expected):
            problems.append(f"bit {bit} of {path}: resumed to other bits")
    return _figures("object_bitflips", num_trials, problems) | {"objects": [Path(path).name for path in paths]}


def _killed(number: int, moment: str, num_ranks: int) -> bool:
    FragileStore.revive(kill_at=number, moment=moment)
    try:
        victim.run(HOME, num_ranks)
    except (PostflyteError, OSError):
        assert FragileStore.is_dead(), "it failed before it was killed"
    killed = FragileStore.is_dead()
    FragileStore.revive()
    return killed


def _problem(expected: torch.Tensor, *, all_valid: bool, num_ranks: int) -> str | None:
    """What is wrong with what a kill has left, and with the run that goes on from it.

    all_valid: everything that can be seen must be whole. Half an object, which stores don't keep, must be seen through.
    """
    shelf = ObjectShelf(HOME)
    try:
        for step in published_steps(shelf) if all_valid else []:
            shelf.verify(step_name(step), KIND)
        found = latest_valid(shelf) or 0
        if found < SEED_STEPS or found != published_steps(shelf)[0]:
            return f"step {found} was found"
        return None if torch.equal(victim.run(HOME, num_ranks), expected) else "resumed to other bits"
    except PostflyteError as error:
        return f"{type(error).__name__}: {error}"


def _figures(kind: str, num_trials: int, problems: list[str]) -> dict[str, Any]:
    return {
        "kind": kind,
        "trials": num_trials,
        "survived": num_trials - len(problems),
        "kills": num_trials,
        "hangs": 0,
        "leaks": 0,
        "details": {"problems": problems[:20]},
    }

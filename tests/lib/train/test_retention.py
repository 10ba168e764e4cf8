"""Laws of what is saved and what stays: the set of checkpoints is a function of the settings, whenever one looks."""

import itertools
import os
import random
from pathlib import Path

import pytest

from lib.config.recipes import SftJob
from lib.config.train import TrainConfig
from lib.core.artifact import verify
from lib.core.errors import ConfigError
from lib.train.checkpoint import CheckpointStore, published_steps, step_name
from lib.train.folder_shelf import FolderShelf
from lib.train.retention import Retention, is_saved
from lib.train.shelf import Shelf
from lib.train.state import TrainState, Values

GRID = list(itertools.product((1, 4, 7, 10), (1, 2, 3, 5, 20), (1, 3), (None, 2, 6), (0, 2)))


def expected(saved: list[int], losses: dict[int, float], keep: Retention) -> set[int]:
    """A step stays if fewer than `newest` saved ones are later, fewer than `best` are better, or it is a multiple."""
    return {
        step
        for step in saved
        if sum(later > step for later in saved) < keep.newest
        or sum((losses[other], other) < (losses[step], step) for other in saved) < keep.best
        or (keep.every and step % keep.every == 0)
    }


def test_the_checkpoints_of_a_run_are_the_closed_form_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[F11] 240 settings of (steps, save every, keep newest, keep every, keep best) with random losses, equal ones too: after
    each save, on the disk is exactly what should be; the last step is always there, whole.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the disk is not what is tried here
    assert len(GRID) == 240
    for number, (steps, every, newest, multiple, best) in enumerate(GRID):
        root = tmp_path / str(number)
        check_retention(FolderShelf(root), steps, every, newest, multiple, best, seed=number)
        verify(root / step_name(steps), "train_state")


def check_retention(shelf: Shelf, steps: int, every: int, newest: int, multiple: int | None, best: int, *, seed: int) -> None:
    """Save as a run does, and look at the shelf after each save."""
    rng, state, keep = random.Random(seed), TrainState(), Retention(newest, multiple, best)
    state.register("nothing", Values(dict, lambda values: None))
    store = CheckpointStore(shelf, keep=keep, rank=0, num_ranks=1)
    losses = {step: rng.choice([1.0, 2.0, 3.0]) for step in range(1, steps + 1)}
    saved: list[int] = []
    for step in range(1, steps + 1):
        if is_saved(step, steps=steps, every=every):
            store.save_async(step, state, {"layout": {}, "loss": losses[step]})
            store.wait_for_part()
            store.all_parts_written()
            store.wait_until_published()
            saved.append(step)
            assert set(published_steps(shelf)) == expected(saved, losses, keep)
    store.close()
    assert saved == sorted({*range(every, steps + 1, every), steps})


def test_a_damaged_checkpoint_is_never_the_best(tmp_path: Path) -> None:
    """The loss of step 1 can't be read: it goes when it is no longer among the newest; step 2 is the best then."""
    state = TrainState()
    state.register("nothing", Values(dict, lambda values: None))
    store = CheckpointStore(FolderShelf(tmp_path), keep=Retention(1, best=1), rank=0, num_ranks=1)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        store.save_async(step, state, {"layout": {}, "loss": loss})
        store.wait_for_part()
        store.all_parts_written()
        store.wait_until_published()
        if step == 2:
            (tmp_path / step_name(1) / "train_state.json").write_bytes(b"{")
    store.close()
    assert published_steps(FolderShelf(tmp_path)) == [3, 2]


def test_steps_that_are_kept_must_be_saved() -> None:
    values = {"learning_rate": 1e-3, "steps": 100, "sequence_length": 64, "nodes": 1, "gpus_per_node": 0}
    with pytest.raises(ConfigError, match=r"keep_every \(30\) is not a multiple of checkpoint_every \(20\)"):
        SftJob.parse({**values, "config": {"train": {"checkpoint_every": 20, "keep_every": 30}}}, where="test")
    assert TrainConfig(checkpoint_every=20, keep_every=40).keep_every == 40

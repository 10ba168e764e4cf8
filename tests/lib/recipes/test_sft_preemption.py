"""Laws of SIGTERM: the step under way is saved, the error is one that is retried, and the run ends in the same bits."""

import signal
from pathlib import Path
from typing import Any

import pytest

from lib.config.recipes import SftJob
from lib.core.errors import PreemptedError
from lib.core.manifest import Manifest
from lib.train.checkpoint import published_steps
from lib.train.folder_shelf import FolderShelf
from tests.lib.recipes.conftest import Inputs, job, metrics, train
from tests.lib.recipes.signalled import TOLD_AT, TRACED, ToldWorker, group_of

STEPS = 8


def long_job(ranks: int = 1, **train: Any) -> SftJob:
    """Nothing is saved before its end but what a stop saves."""
    return job(ranks=ranks, steps=STEPS, sequence_length=128, train={"checkpoint_every": 100, **train})


@pytest.fixture(scope="module")
def uninterrupted(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    root = tmp_path_factory.mktemp("uninterrupted")
    return root / "checkpoint", train(inputs, long_job(), root)


def test_sigterm_to_the_driver_saves_and_the_run_goes_on_bit_for_bit(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path
) -> None:
    """[F1] The signal comes between two steps. One checkpoint, of the step that the error names, is what is left."""
    before, told = signal.getsignal(signal.SIGTERM), group_of(ToldWorker, in_process=True)
    with pytest.raises(PreemptedError, match=rf"SIGTERM ended the run after step {TOLD_AT + 1} of {STEPS}, which is saved"):
        train(inputs, long_job(**TRACED), tmp_path, group_factory=told)
    assert signal.getsignal(signal.SIGTERM) == before
    assert published_steps(FolderShelf(tmp_path / "run" / "checkpoints")) == [TOLD_AT + 1]
    assert train(inputs, long_job(), tmp_path).digest == uninterrupted[1].digest


@pytest.mark.timeout(600)
def test_sigterm_to_one_rank_stops_all_after_the_same_step(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path
) -> None:
    """[F1] Rank 1 of 2 alone is told. One rank goes on from what both saved, with the same samples and losses."""
    with pytest.raises(PreemptedError, match=r"which is saved; run again to go on \[rank \d of 2"):
        train(inputs, long_job(ranks=2, **TRACED), tmp_path, group_factory=group_of(ToldWorker))
    assert published_steps(FolderShelf(tmp_path / "run" / "checkpoints")) == [TOLD_AT + 1]
    train(inputs, long_job(), tmp_path)
    for row, same in zip(metrics(uninterrupted[0]), metrics(tmp_path / "checkpoint"), strict=True):
        assert row["samples"] == same["samples"]
        assert same["loss"] == pytest.approx(row["loss"], abs=1e-5)

"""Laws of SIGTERM: the step under way is saved, the error is one that is retried, and the run ends in the same bits."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lib.cluster.local import LocalGroup
from lib.config.recipes import SftJob
from lib.core.errors import PreemptedError
from lib.core.manifest import Manifest
from lib.train.checkpoint import published_steps
from tests.lib.recipes.conftest import Inputs, Shown, job, metrics, train

STEPS = 40


def long_job(ranks: int = 1) -> SftJob:
    """Long enough to be met under way; nothing is saved before its end but what a stop saves."""
    return job(ranks=ranks, steps=STEPS, sequence_length=128, train={"checkpoint_every": 100})


class Once:
    """Acts on the first event of at least a step."""

    def __init__(self, at_step: int, act: Callable[[], None]) -> None:
        self.at_step, self.act, self.acts = at_step, act, 0

    def __call__(self, count: int) -> None:
        if count >= self.at_step and not self.acts:
            self.acts += 1
            self.act()


@pytest.fixture(scope="module")
def uninterrupted(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    root = tmp_path_factory.mktemp("uninterrupted")
    return root / "checkpoint", train(inputs, long_job(), root)


def test_sigterm_to_the_driver_saves_and_the_run_goes_on_bit_for_bit(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path
) -> None:
    """[F1] The signal comes while the model is loaded. One checkpoint, of the step the error names, is what is left."""
    before = signal.getsignal(signal.SIGTERM)
    shown = Shown(act=Once(0, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(PreemptedError, match=rf"SIGTERM ended the run after step \d+ of {STEPS}, which is saved") as stopped:
        train(inputs, long_job(), tmp_path, shown=shown)
    assert signal.getsignal(signal.SIGTERM) == before
    (step,) = published_steps(tmp_path / "run" / "checkpoints")
    assert f"after step {step} of" in str(stopped.value) and step < STEPS
    assert train(inputs, long_job(), tmp_path).digest == uninterrupted[1].digest


@pytest.mark.timeout(600)
def test_sigterm_to_one_rank_stops_all_after_the_same_step(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path
) -> None:
    """[F1] Rank 1 of 2 alone is told. One rank goes on from what both saved, with the same samples and losses."""
    groups: list[LocalGroup] = []

    def factory(*args: Any, **kwargs: Any) -> LocalGroup:
        groups.append(LocalGroup(*args, **kwargs))
        return groups[-1]

    shown = Shown(act=Once(1, lambda: os.kill(groups[0]._watch._identity[1]["pid"], signal.SIGTERM)))
    with pytest.raises(PreemptedError, match=r"which is saved; run again to go on \[rank \d of 2"):
        train(inputs, long_job(ranks=2), tmp_path, shown=shown, group_factory=factory)
    (step,) = published_steps(tmp_path / "run" / "checkpoints")
    assert 1 <= step < STEPS and len(groups) == 1
    train(inputs, long_job(), tmp_path)
    for row, same in zip(metrics(uninterrupted[0]), metrics(tmp_path / "checkpoint"), strict=True):
        assert sorted(row["sample_ids"]) == sorted(same["sample_ids"])
        assert same["loss"] == pytest.approx(row["loss"], abs=1e-5)

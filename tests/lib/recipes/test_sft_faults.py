"""A run whose numbers go wrong or whose tracker is down: what it had stays as it was, and it goes on from there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lib.core.errors import NonFiniteLossError
from lib.core.manifest import Manifest
from lib.train import loop
from lib.train.meters import StepReport
from lib.train.samples import samples_of_step
from lib.train.step import Training
from tests.lib.recipes.conftest import Inputs, job, metrics, train


@pytest.fixture(scope="module")
def uninterrupted(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    root = tmp_path_factory.mktemp("uninterrupted")
    return root, train(inputs, job(), root)


def test_a_loss_that_stops_being_finite_costs_no_step_before_it(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[C5] A weight turns infinite before step 4: the error names exactly the samples of that step; steps 1 to 3 are on
    record, the checkpoint of step 2 is whole. Without the fault the run goes on from there and ends in the same bits."""
    real = loop.train_step

    def struck(training: Training, *args: Any, step: int, **settings: Any) -> StepReport:
        if step == 4:
            next(training.module.parameters()).data.view(-1)[0] = float("inf")
        return real(training, *args, step=step, **settings)

    with monkeypatch.context() as patch, pytest.raises(NonFiniteLossError, match="step 4: loss nan") as caught:
        patch.setattr(loop, "train_step", struck)
        train(inputs, job(), tmp_path)
    assert set(re.findall(r"row-\d+", str(caught.value))) == set(samples_of_step(uninterrupted[0] / "checkpoint", 4))
    assert metrics(tmp_path / "run") == metrics(uninterrupted[0] / "checkpoint")[:3]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert train(inputs, job(), tmp_path).digest == uninterrupted[1].digest


@pytest.mark.timeout(300)
def test_a_tracker_that_is_down_changes_nothing_and_loses_nothing(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path, fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[K3] Every step's metrics are those of a run that nobody tracks, and wait for a server with a point for each step."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    manifest = train(inputs, job(mlflow=True), tmp_path)
    assert metrics(tmp_path / "checkpoint") == metrics(uninterrupted[0] / "checkpoint")
    assert manifest.info["mlflow_run_id"] is None
    (spool,) = (fresh_home / "tracking").glob("*/steps.jsonl")
    kept = [json.loads(line) for line in spool.read_text().splitlines()]
    assert [row["step"] for row in kept] == [1, 2, 3, 4, 5, 6]
    assert [row["metrics"]["loss"] for row in kept] == [row["loss"] for row in metrics(tmp_path / "checkpoint")]

"""Laws of tracking: one point a step, nothing but finite numbers, and never in the way."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lib.core.paths import mlflow_uri
from lib.train.tracking import ATTEMPTS_TAG, IDENTITY_TAG, SKIPPED_TAG, Tracker, log_evaluation, log_files

_PARAMS = {"optim.beta1": 0.9, "job.steps": 4}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One sqlite file for all tests here: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def home(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("POSTFLYTE_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    yield tmp_path


def _tracker(identity: str, **params: object) -> Tracker:
    return Tracker(experiment="laws", identity=identity, params={**_PARAMS, **params}, tags={"lineage.model": "abc"})


def _steps(run_id: str, key: str = "loss") -> list[int]:
    return [point.step for point in MlflowClient(mlflow_uri()).get_metric_history(run_id, key)]


def _until_delivered(tracker: Tracker, num_points: int) -> None:
    deadline = time.monotonic() + 60
    while tracker.run_id is None or len(_steps(tracker.run_id)) < num_points:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_killed_and_resumed_goes_on_with_one_point_a_step(home: Path) -> None:
    """[K1] [K2] Steps 1 to 3, no close (a kill), resumed from a checkpoint at 1 with another beta: 2 and 3 aren't repeated."""
    first = _tracker("run-a")
    for step in (1, 2, 3):
        first.log(step, {"loss": 1.0 / step, "grad_norm": 2.0})
    _until_delivered(first, 3)
    second = _tracker("run-a", **{"optim.beta1": 0.8, "new.key": "x"})
    for step in (2, 3, 4):
        second.log(step, {"loss": 1.0 / step, "grad_norm": 2.0})
    run_id = second.close("FINISHED")
    assert run_id is not None and run_id == first.run_id
    assert _steps(run_id) == _steps(run_id, "grad_norm") == [1, 2, 3, 4]
    run = MlflowClient(mlflow_uri()).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optim.beta1": "0.9", "job.steps": "4", "new.key": "x"}
    assert run.data.tags["attempt_2.optim.beta1"] == "0.8" and run.data.tags[ATTEMPTS_TAG] == "2"
    assert run.data.tags[IDENTITY_TAG] == "run-a" and run.data.tags["lineage.model"] == "abc"
    assert not (home / "tracking" / "run-a").exists()


def test_only_finite_values_and_bounded_parameters(home: Path) -> None:
    """[K4] inf and NaN are counted in a tag, and 9,000 characters are cut to what MLflow takes."""
    tracker = _tracker("run-b", long="y" * 9000)
    tracker.log(1, {"loss": 1.0, "bad": float("inf"), "worse": float("nan")})
    run_id = tracker.close("FAILED")
    assert run_id is not None
    run = MlflowClient(mlflow_uri()).get_run(run_id)
    assert run.data.metrics == {"loss": 1.0} and run.data.tags[SKIPPED_TAG] == "2" and run.info.status == "FAILED"
    assert 5900 < len(run.data.params["long"]) <= 6000 and "sha256" in run.data.params["long"]


def test_an_outage_costs_nothing_and_the_next_run_delivers(home: Path, monkeypatch: pytest.MonkeyPatch, database: str) -> None:
    """[K3] The server accepts connections and never answers; logging returns at once and the spool waits."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        tracker = _tracker("run-c")
        for step in range(1, 1501):
            tracker.log(step, {"loss": 1.0 / step})
        assert tracker.close("FINISHED", wait_seconds=0.2) is None
        assert log_evaluation("0" * 32, {"accuracy": 1.0}) is False
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    other = _tracker("run-d")
    other.log(1, {"loss": 1.0})
    other.close("FINISHED", wait_seconds=60)
    deadline = time.monotonic() + 60
    while (home / "tracking" / "run-c").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    client = MlflowClient(mlflow_uri())
    experiment = client.get_experiment_by_name("laws")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], filter_string=f"tags.`{IDENTITY_TAG}` = 'run-c'")
    assert _steps(found.info.run_id) == list(range(1, 1501))


def test_results_and_files_join_a_run_that_has_ended(home: Path) -> None:
    """The same results twice make one point."""
    run_id = _tracker("run-e").close("FINISHED")
    assert run_id is not None
    (home / "report.html").write_text("<p>report</p>")
    for _ in range(2):
        assert log_evaluation(run_id, {"accuracy_after": 0.75, "broken": float("nan")}, {"lineage.checkpoint": "def"})
        assert log_files(run_id, [home / "report.html"])
    client = MlflowClient(mlflow_uri())
    assert [point.value for point in client.get_metric_history(run_id, "accuracy_after")] == [0.75]
    assert client.get_run(run_id).data.tags["lineage.checkpoint"] == "def"
    assert [item.path for item in client.list_artifacts(run_id)] == ["report.html"]

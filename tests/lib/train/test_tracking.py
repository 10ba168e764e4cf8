"""Laws of what reaches MLflow: one point a step, nothing but finite numbers, and what is late is delivered later."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lib.core.paths import mlflow_uri
from lib.train.tracker import Spool
from lib.train.tracking import (
    ATTEMPTS_TAG,
    IDENTITY_TAG,
    SKIPPED_TAG,
    deliver_while_running,
    log_evaluation,
    log_files,
)

_PARAMS = {"optim.beta1": 0.9, "job.steps": 4}
_DEAD = -1
"""Process id of a driver that is gone: one attempt is made to deliver what it has left."""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One sqlite file for all tests here: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def home(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POSTFLYTE_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    return tmp_path


def _spool(identity: str, **params: object) -> Spool:
    return Spool(experiment="laws", identity=identity, params={**_PARAMS, **params}, tags={"lineage.model": "abc"})


def _run_id(identity: str) -> str:
    client = MlflowClient(mlflow_uri())
    experiment = client.get_experiment_by_name("laws")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], filter_string=f"tags.`{IDENTITY_TAG}` = '{identity}'")
    return str(found.info.run_id)


def _steps(run_id: str, key: str = "loss") -> list[int]:
    return [point.step for point in MlflowClient(mlflow_uri()).get_metric_history(run_id, key)]


def test_a_run_killed_and_resumed_goes_on_with_one_point_a_step(home: Path) -> None:
    """[K1] [K2] Steps 1 to 3, killed; resumed from a checkpoint at 1 with another beta, failed; resumed again, finished.

    Steps 2 and 3 come three times and are points once. One MLflow run, never FAILED because of a changed parameter.
    """
    first = _spool("run-a")
    for step in (1, 2, 3):
        first.log(step, {"loss": 1.0 / step, "grad_norm": 2.0})
    deliver_while_running(first.folder, _DEAD)
    second = _spool("run-a", **{"optim.beta1": 0.8, "new.key": "x"})
    for step in (2, 3, 4):
        second.log(step, {"loss": 1.0 / step, "grad_norm": 2.0})
    second.end("FAILED")
    deliver_while_running(second.folder, _DEAD)
    run_id = _run_id("run-a")
    assert MlflowClient(mlflow_uri()).get_run(run_id).info.status == "FAILED"
    third = _spool("run-a")
    for step in (2, 3, 4, 5):
        third.log(step, {"loss": 1.0 / step, "grad_norm": 2.0})
    third.end("FINISHED")
    deliver_while_running(third.folder, _DEAD)
    assert _run_id("run-a") == run_id
    assert _steps(run_id) == _steps(run_id, "grad_norm") == [1, 2, 3, 4, 5]
    run = MlflowClient(mlflow_uri()).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optim.beta1": "0.9", "job.steps": "4", "new.key": "x"}
    assert run.data.tags["attempt_2.optim.beta1"] == "0.8" and run.data.tags[ATTEMPTS_TAG] == "3"
    assert run.data.tags["lineage.model"] == "abc"


def test_ten_starts_of_a_run_are_one_run(home: Path) -> None:
    """[K1] [K2] Ten starts that are each killed in the step after their last, every other one with another beta, and each
    begins with the step before: one MLflow run with one point a step, its parameters the first start's, what changed in tags.
    """
    for start in range(1, 11):
        spool = _spool("run-f", **({"optim.beta1": start / 100} if start % 2 == 0 else {}))
        for step in (start - 1, start) if start > 1 else (start,):
            spool.log(step, {"loss": 1.0 / step})
        if start == 10:
            spool.end("FINISHED")
        deliver_while_running(spool.folder, _DEAD)
    run = MlflowClient(mlflow_uri()).get_run(_run_id("run-f"))
    assert run.info.status == "FINISHED" and run.data.params == {"optim.beta1": "0.9", "job.steps": "4"}
    assert _steps(run.info.run_id) == list(range(1, 11))
    changed = {tag: value for tag, value in run.data.tags.items() if tag.startswith("attempt_")}
    assert changed == {f"attempt_{start}.optim.beta1": str(start / 100) for start in range(2, 11, 2)}


def test_a_run_that_finished_and_is_run_again_is_a_new_run(home: Path) -> None:
    for _ in range(2):
        spool = _spool("run-again")
        spool.log(1, {"loss": 1.0})
        spool.end("FINISHED")
        deliver_while_running(spool.folder, _DEAD)
    client = MlflowClient(mlflow_uri())
    experiment = client.get_experiment_by_name("laws")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], filter_string=f"tags.`{IDENTITY_TAG}` = 'run-again'")
    assert [_steps(run.info.run_id) for run in found] == [[1], [1]]


def test_only_finite_values_and_bounded_parameters(home: Path) -> None:
    """[K4] inf and NaN are counted in a tag, and 9,000 characters are cut to what MLflow takes."""
    spool = _spool("run-b", long="y" * 9000)
    spool.log(1, {"loss": 1.0, "bad": float("inf"), "worse": float("nan")})
    spool.end("FAILED")
    deliver_while_running(spool.folder, _DEAD)
    run = MlflowClient(mlflow_uri()).get_run(_run_id("run-b"))
    assert run.data.metrics == {"loss": 1.0} and run.data.tags[SKIPPED_TAG] == "2" and run.info.status == "FAILED"
    assert 5900 < len(run.data.params["long"]) <= 6000 and "sha256" in run.data.params["long"]


class _Failing(BaseHTTPRequestHandler):
    """Answers everything with 500."""

    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_PATCH = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def _broken_server(kind: str) -> Iterator[str]:
    """Address of a server that accepts and never answers, answers with errors, or isn't there."""
    if kind == "failing":
        with HTTPServer(("127.0.0.1", 0), _Failing) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()
                thread.join()
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if kind == "silent":
            yield address
    if kind == "gone":
        yield address


@pytest.mark.parametrize("kind", ["silent", "failing", "gone"])
def test_what_an_outage_kept_back_is_delivered_beside_the_next_run(
    kind: str, home: Path, monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    """[K3] While the server is down nothing is lost, and nobody hears of it but the log; a later run finds one that answers."""
    with _broken_server(kind) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        late = _spool(f"run-{kind}")
        for step in range(1, 1501):
            late.log(step, {"loss": 1.0 / step})
        late.end("FINISHED")
        deliver_while_running(late.folder, _DEAD)
        assert log_evaluation("0" * 32, {"accuracy": 1.0}) is False
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    other = _spool(f"run-after-{kind}")
    other.end("FINISHED")
    deliver_while_running(other.folder, _DEAD)
    assert _steps(_run_id(f"run-{kind}")) == list(range(1, 1501))


def test_results_and_files_join_a_run_that_has_ended(home: Path) -> None:
    """The same results twice make one point."""
    spool = _spool("run-e")
    spool.end("FINISHED")
    deliver_while_running(spool.folder, _DEAD)
    run_id = _run_id("run-e")
    (home / "report.html").write_text("<p>report</p>")
    for _ in range(2):
        assert log_evaluation(run_id, {"accuracy_after": 0.75, "broken": float("nan")}, {"lineage.checkpoint": "def"})
        assert log_files(run_id, [home / "report.html"])
    client = MlflowClient(mlflow_uri())
    assert [point.value for point in client.get_metric_history(run_id, "accuracy_after")] == [0.75]
    assert client.get_run(run_id).data.tags["lineage.checkpoint"] == "def"
    assert [item.path for item in client.list_artifacts(run_id)] == ["report.html"]

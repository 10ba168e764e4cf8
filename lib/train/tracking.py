"""The only file that imports mlflow: delivers spools (see lib/train/tracker.py), and adds results to runs that have ended.

A run that was killed and started again goes on in the same MLflow run, found by its identity's tag, with one point a
step: what the server has is never sent again.
"""

import fcntl
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from lib.core.manifest import Json, canonical_json
from lib.core.paths import home, mlflow_uri
from lib.train.meters import read_rows
from lib.train.tracker import DELIVERED_NAME, FAILING_NAME, OUTCOME_NAME, RUN_NAME, STEPS_NAME, spool_root

IDENTITY_TAG = "postflyte.run_identity"
ATTEMPTS_TAG = "postflyte.attempts"
SKIPPED_TAG = "postflyte.non_finite_values_skipped"
_STEP_KEY = "loss"
_BATCH_METRICS = 900
_POLL_SECONDS = 0.5
_RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
_LOGGER = logging.getLogger(__name__)


def deliver_while_running(folder: Path, driver_pid: int) -> None:
    """Deliver a spool as it grows, until the run's outcome is delivered or the driver is gone; then spools left behind."""
    with (folder / ".delivery").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a killed driver's process may still be at it
        delivery = _Delivery(folder)
        failures = 0
        while True:
            driver_is_gone = os.getppid() != driver_pid
            if _try(delivery, folder):
                failures, pause = 0, _POLL_SECONDS
            else:
                failures, pause = failures + 1, _RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)]
            if delivery.complete:
                break
            if driver_is_gone:
                return
            time.sleep(pause)
    for left in sorted(spool_root().iterdir()):
        if (left / OUTCOME_NAME).exists() and not (left / DELIVERED_NAME).exists():
            with (left / ".delivery").open("w") as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _try(_Delivery(left), left)


class _Delivery:
    """Brings one spool to the server; safe to repeat from any point."""

    def __init__(self, folder: Path) -> None:
        self.complete = False
        self._folder = folder
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._delivered_step = 0
        self._skipped = 0

    def deliver(self) -> None:
        """Send what isn't there yet, the outcome last."""
        ended = (self._folder / OUTCOME_NAME).exists()
        if self._client is None:
            client = MlflowClient(tracking_uri=mlflow_uri())
            self._connect(client, json.loads((self._folder / RUN_NAME).read_text(encoding="utf-8")))
            self._client = client
        for batch in _batches([row for row in read_rows(self._folder / STEPS_NAME) if row["step"] > self._delivered_step]):
            points = [Metric(k, v, row["milliseconds"], row["step"]) for row in batch for k, v in row["metrics"].items()]
            self._skipped += sum(row["skipped"] for row in batch)
            tags = [RunTag(SKIPPED_TAG, str(self._skipped))] if self._skipped else []
            self._client.log_batch(self._run_id, metrics=points, tags=tags, synchronous=True)
            self._delivered_step = batch[-1]["step"]
        if ended:
            outcome = json.loads((self._folder / OUTCOME_NAME).read_text(encoding="utf-8"))["outcome"]
            self._client.set_terminated(self._run_id, status=outcome)
            (self._folder / DELIVERED_NAME).write_text(canonical_json({"run_id": self._run_id}), encoding="utf-8")
            (self._folder / STEPS_NAME).unlink(missing_ok=True)
            self.complete = True

    def _connect(self, client: MlflowClient, run: Json) -> None:
        found = _find_run(client, run["experiment"], run["identity"])
        if found is None or found.info.status == "FINISHED":
            tags = {**run["tags"], IDENTITY_TAG: run["identity"], ATTEMPTS_TAG: "1"}
            created = client.create_run(_experiment_id(client, run["experiment"]), tags=tags, run_name=run["identity"][:12])
            self._run_id = created.info.run_id
            params = [Param(key, value) for key, value in run["params"].items()]
        else:
            self._run_id = found.info.run_id
            client.update_run(self._run_id, status="RUNNING")
            attempt = int(found.data.tags.get(ATTEMPTS_TAG, "1")) + 1
            client.set_tag(self._run_id, ATTEMPTS_TAG, str(attempt))
            params = [Param(key, value) for key, value in run["params"].items() if key not in found.data.params]
            for key, value in run["params"].items():
                if found.data.params.get(key, value) != value:
                    client.set_tag(self._run_id, f"attempt_{attempt}.{key}", value)
            self._delivered_step = max((point.step for point in client.get_metric_history(self._run_id, _STEP_KEY)), default=0)
        for start in range(0, len(params), 90):
            client.log_batch(self._run_id, params=params[start : start + 90], synchronous=True)


def log_evaluation(run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str] | None = None) -> bool:
    """Add results to a run that has ended; the same results twice make one point. False if the server doesn't answer."""

    def send(client: MlflowClient) -> None:
        began = client.get_run(run_id).info.start_time
        points = [Metric(key, float(value), began, 0) for key, value in metrics.items() if math.isfinite(value)]
        client.log_batch(run_id, metrics=points, tags=[RunTag(k, v) for k, v in (tags or {}).items()], synchronous=True)

    return _once(send, f"evaluation of run {run_id}")


def log_files(run_id: str, paths: Sequence[Path]) -> bool:
    """Keep files with a run. False if the server doesn't answer."""

    def send(client: MlflowClient) -> None:
        for path in paths:
            client.log_artifact(run_id, str(path))

    return _once(send, f"files of run {run_id}")


def _once(send: Callable[[MlflowClient], None], what: str) -> bool:
    try:
        send(MlflowClient(tracking_uri=mlflow_uri()))
    except (MlflowException, OSError) as error:
        _LOGGER.warning("MLflow at %s did not take the %s: %s", mlflow_uri(), what, error)
        return False
    return True


def _try(delivery: _Delivery, folder: Path) -> bool:
    try:
        delivery.deliver()
    except Exception as error:  # noqa: BLE001 - whatever a server or its client comes up with, the spool waits
        _LOGGER.warning("MLflow at %s: %s; trying again", mlflow_uri(), error)
        (folder / FAILING_NAME).touch()
        return False
    (folder / FAILING_NAME).unlink(missing_ok=True)
    return True


def _find_run(client: MlflowClient, experiment: str, identity: str) -> Run | None:
    found = client.search_runs(
        [_experiment_id(client, experiment)],
        filter_string=f"tags.`{IDENTITY_TAG}` = '{identity}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return found[0] if found else None


def _experiment_id(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = mlflow_uri().startswith("sqlite:")
    return str(client.create_experiment(name, artifact_location=(home() / "mlruns" / name).as_uri() if local else None))


def _batches(rows: list[Json]) -> list[list[Json]]:
    batches: list[list[Json]] = []
    size = 0
    for row in rows:
        if not batches or size + len(row["metrics"]) > _BATCH_METRICS:
            batches.append([])
            size = 0
        batches[-1].append(row)
        size += len(row["metrics"])
    return batches


if __name__ == "__main__":
    deliver_while_running(Path(sys.argv[1]), int(sys.argv[2]))

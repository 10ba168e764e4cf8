"""Metrics to MLflow, from one process, never in the way of training.

What is logged goes to a spool on the local disk first; a background thread delivers it. A server that is slow or down
costs training nothing: the spool waits, is delivered when the server answers, or by the next run on this machine. A run
that is killed and started again goes on in the same MLflow run, with one point a step. The only file that imports mlflow.
"""

import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from lib.core.manifest import Json, canonical_json, digest_of
from lib.core.paths import home, mlflow_uri
from lib.train.meters import read_rows

IDENTITY_TAG = "postflyte.run_identity"
ATTEMPTS_TAG = "postflyte.attempts"
SKIPPED_TAG = "postflyte.non_finite_values_skipped"
_STEP_KEY = "loss"
_MAX_VALUE_CHARS = 6000
_BATCH_METRICS = 900
_RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
_LOGGER = logging.getLogger(__name__)

Outcome = Literal["FINISHED", "FAILED"]


class Tracker:
    """The tracking of one run; belongs to the driver. Nothing here raises because of the server, or waits for it."""

    def __init__(self, *, experiment: str, identity: str, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """identity: names the run across restarts. params: dotted key -> value; what changed on a restart becomes a tag."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        self._folder = _spool_root() / identity
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "outcome.json").unlink(missing_ok=True)
        run = {"experiment": experiment, "identity": identity, "params": {k: _short(v) for k, v in params.items()}, "tags": dict(tags)}
        (self._folder / "run.json").write_text(canonical_json(run), encoding="utf-8")
        rows = read_rows(self._folder / "steps.jsonl")
        _write_rows(self._folder / "steps.jsonl", rows)  # without a last line that a kill cut short
        self._last_step = max((row["step"] for row in rows), default=0)
        self._spool = (self._folder / "steps.jsonl").open("a", encoding="utf-8")
        self._delivery = _Delivery(self._folder)
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._deliver_until_closed, name="tracking", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None as long as no server has answered."""
        return self._delivery.run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point of each metric; a step that has been logged before, in this start or another, isn't again."""
        if step <= self._last_step:
            return
        self._last_step = step
        finite = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
        row = {"step": step, "milliseconds": time.time_ns() // 1_000_000, "metrics": finite, "skipped": len(metrics) - len(finite)}
        self._spool.write(canonical_json(row) + "\n")
        self._spool.flush()
        self._wake.set()

    def close(self, outcome: Outcome, *, wait_seconds: float = 30.0) -> str | None:
        """End the run; wait that long for what is still to deliver, and leave it in the spool if that isn't enough."""
        self._spool.close()
        (self._folder / "outcome.json").write_text(json.dumps({"outcome": outcome}), encoding="utf-8")
        self._closing.set()
        self._wake.set()
        self._thread.join(wait_seconds)
        if self._folder.exists():
            _LOGGER.warning("MLflow at %s doesn't answer; the metrics wait in %s for the next run", mlflow_uri(), self._folder)
        return self.run_id

    def _deliver_until_closed(self) -> None:
        failures = 0
        while True:
            self._wake.wait()
            self._wake.clear()
            last = self._closing.is_set()
            if _try(self._delivery):
                failures = 0
                if last:
                    break
            else:
                pause = _RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)]
                failures += 1
                time.sleep(min(pause, 1.0) if last else pause)
                self._wake.set()
        _deliver_leftovers()


class _Delivery:
    """Brings one spool folder to the server; safe to repeat from any point."""

    def __init__(self, folder: Path) -> None:
        self.run_id: str | None = None
        self._folder = folder
        self._client: MlflowClient | None = None
        self._delivered_step = 0
        self._skipped = 0

    def deliver(self) -> None:
        """Send what isn't there yet; remove the folder once the run has ended and all is delivered."""
        ended = (self._folder / "outcome.json").exists()
        if self._client is None:
            client = MlflowClient(tracking_uri=mlflow_uri())
            self._connect(client, json.loads((self._folder / "run.json").read_text(encoding="utf-8")))
            self._client = client
        assert self.run_id is not None
        rows = [row for row in read_rows(self._folder / "steps.jsonl") if row["step"] > self._delivered_step]
        for batch in _batches(rows):
            points = [Metric(k, v, row["milliseconds"], row["step"]) for row in batch for k, v in row["metrics"].items()]
            self._skipped += sum(row["skipped"] for row in batch)
            tags = [RunTag(SKIPPED_TAG, str(self._skipped))] if self._skipped else []
            self._client.log_batch(self.run_id, metrics=points, tags=tags, synchronous=True)
            self._delivered_step = batch[-1]["step"]
        if ended:
            outcome = json.loads((self._folder / "outcome.json").read_text(encoding="utf-8"))["outcome"]
            self._client.set_terminated(self.run_id, status=outcome)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _connect(self, client: MlflowClient, run: Json) -> None:
        found = _find_run(client, run["experiment"], run["identity"])
        if found is None or found.info.status == "FINISHED":
            tags = {**run["tags"], IDENTITY_TAG: run["identity"], ATTEMPTS_TAG: "1"}
            created = client.create_run(_experiment_id(client, run["experiment"]), tags=tags, run_name=run["identity"][:12])
            self.run_id = created.info.run_id
            params = [Param(key, value) for key, value in run["params"].items()]
        else:
            self.run_id = found.info.run_id
            client.update_run(self.run_id, status="RUNNING")
            attempt = int(found.data.tags.get(ATTEMPTS_TAG, "1")) + 1
            client.set_tag(self.run_id, ATTEMPTS_TAG, str(attempt))
            params = [Param(key, value) for key, value in run["params"].items() if key not in found.data.params]
            for key, value in run["params"].items():
                if found.data.params.get(key, value) != value:
                    client.set_tag(self.run_id, f"attempt_{attempt}.{key}", value)
            self._delivered_step = max((point.step for point in client.get_metric_history(self.run_id, _STEP_KEY)), default=0)
        for start in range(0, len(params), 90):
            client.log_batch(self.run_id, params=params[start : start + 90], synchronous=True)


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


def _once(send: Any, what: str) -> bool:
    try:
        send(MlflowClient(tracking_uri=mlflow_uri()))
    except (MlflowException, OSError) as error:
        _LOGGER.warning("MLflow at %s did not take the %s: %s", mlflow_uri(), what, error)
        return False
    return True


def _try(delivery: _Delivery) -> bool:
    try:
        delivery.deliver()
    except Exception as error:  # whatever a server or its client comes up with: training goes on, the spool waits
        _LOGGER.warning("MLflow at %s: %s; trying again", mlflow_uri(), error)
        return False
    return True


def _deliver_leftovers() -> None:
    """Spools of earlier runs that ended while the server was down."""
    for folder in sorted(_spool_root().iterdir()):
        if (folder / "outcome.json").exists():
            _try(_Delivery(folder))


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
    return client.create_experiment(name, artifact_location=(home() / "mlruns" / name).as_uri() if local else None)


def _spool_root() -> Path:
    root = home() / "tracking"
    root.mkdir(parents=True, exist_ok=True)
    return root


def _short(value: object) -> str:
    """The text of a parameter, or its beginning and digest where MLflow wouldn't take all of it."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[: _MAX_VALUE_CHARS - 80]}… sha256 {digest_of(text)}"


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


def _write_rows(path: Path, rows: list[Json]) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(canonical_json(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(fresh, path)

"""Metrics on their way to MLflow: written to a spool on the local disk, delivered by a process of its own.

What a run logs is a line appended to a file; nothing here talks to a server, so a server that is slow or down costs
training nothing. `python -m lib.train.tracking` delivers the spool while the run goes on, and what it couldn't deliver is
delivered beside the next run on this machine. One process delivers, whoever logs.
"""

import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lib.config.train import TrackingConfig
from lib.core.manifest import Json, canonical_json, digest_of
from lib.core.paths import home, safe_name
from lib.train.meters import read_rows

RUN_NAME, STEPS_NAME, OUTCOME_NAME, DELIVERED_NAME = "run.json", "steps.jsonl", "outcome.json", "delivered.json"
FAILING_NAME = "failing"
"""There while the last attempt to deliver has failed."""
_TRACKED = (
    *("loss", "grad_norm", "learning_rate", "num_targets"),
    *("seconds", "tokens_per_second", "mfu", "slowest_rank", "slowest_over_mean"),
)
_MAX_VALUE_CHARS = 6000
_POLL_SECONDS = 0.05
_LOGGER = logging.getLogger(__name__)

Outcome = Literal["FINISHED", "FAILED"]


def spool_root() -> Path:
    """Folder of spools, one for each run identity."""
    root = home() / "tracking"
    root.mkdir(parents=True, exist_ok=True)
    return root


class Spool:
    """The file side of a run's tracking. A run that is started again goes on with the same spool."""

    def __init__(self, *, experiment: str, identity: str, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """identity: names the run across restarts. params: dotted key -> value; what changed on a restart becomes a tag."""
        self.folder = spool_root() / safe_name(identity, what="run identity")
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / DELIVERED_NAME).exists():  # the last start of this run is over and on the server
            (self.folder / STEPS_NAME).unlink(missing_ok=True)
            (self.folder / DELIVERED_NAME).unlink()
        for name in (OUTCOME_NAME, FAILING_NAME):
            (self.folder / name).unlink(missing_ok=True)
        short = {key: _short(value) for key, value in params.items()}
        run = {"experiment": experiment, "identity": identity, "params": short, "tags": dict(tags)}
        _replace(self.folder / RUN_NAME, canonical_json(run))
        rows = read_rows(self.folder / STEPS_NAME)  # without a last line that a kill cut short
        _replace(self.folder / STEPS_NAME, "".join(canonical_json(row) + "\n" for row in rows))
        self._last_step = max((row["step"] for row in rows), default=0)
        self._steps = (self.folder / STEPS_NAME).open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point of each metric; a step that was logged before, in this start or another, isn't logged again."""
        if step <= self._last_step:
            return
        self._last_step = step
        finite = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
        now = time.time_ns() // 1_000_000
        row = {"step": step, "milliseconds": now, "metrics": finite, "skipped": len(metrics) - len(finite)}
        self._steps.write(canonical_json(row) + "\n")
        self._steps.flush()

    def end(self, outcome: Outcome) -> None:
        """Nothing more will be logged by this start of the run."""
        self._steps.close()
        _replace(self.folder / OUTCOME_NAME, canonical_json({"outcome": outcome}))


class Tracker:
    """A spool and the process that delivers it; belongs to the driver."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self.log = spool.log
        self.delivery = _start_delivery(spool.folder)
        """Ends when the run's outcome is delivered, or soon after this process is gone."""

    def close(self, outcome: Outcome, *, wait_seconds: float = 60.0) -> str | None:
        """End the run and wait that long for the delivery, not at all for a server that doesn't take anything; returns MLflow's
        run id, None if it couldn't be delivered yet."""
        self._spool.end(outcome)
        failing, delivered = (self._spool.folder / name for name in (FAILING_NAME, DELIVERED_NAME))
        deadline = time.monotonic() + wait_seconds
        while self.delivery.poll() is None and not failing.exists() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if not delivered.exists():
            _LOGGER.warning("MLflow can't be reached; the metrics wait in %s for the next run", self._spool.folder)
            return None
        return str(json.loads(delivered.read_text(encoding="utf-8"))["run_id"])


class TrackedRun:
    """What the driver tells of a run; tells nobody where tracking is switched off."""

    def __init__(self, tracker: Tracker | None) -> None:
        self._tracker = tracker
        self.run_id: str | None = None
        """MLflow's id of the run once it has ended and is delivered."""

    def log(self, event: Mapping[str, Any]) -> None:
        if self._tracker and event["kind"] == "step":
            metrics = {name: event[name] for name in (*_TRACKED, *event["figures"])}
            metrics |= {f"{part}_seconds": seconds for part, seconds in event["parts"].items()}
            metrics["peak_memory_bytes"] = max(event["peak_memory_bytes"])
            self._tracker.log(event["step"], metrics)

    def end(self, outcome: Outcome) -> None:
        if self._tracker:
            self.run_id = self._tracker.close(outcome)


@contextmanager
def track(config: TrackingConfig, identity: str, values: Json, lineage: Mapping[str, str]) -> Iterator[TrackedRun]:
    """The tracking of a run for the duration of the block; it has failed if the block raises.

    values: the job, whose leaves become parameters. lineage: input -> digest, become tags.
    """
    tracker = None
    if config.mlflow:
        tags = {f"lineage.{name}": digest for name, digest in lineage.items()}
        spool = Spool(experiment=config.experiment, identity=identity, params=flatten(values), tags=tags)
        tracker = Tracker(spool)
    run = TrackedRun(tracker)
    try:
        yield run
    except BaseException:
        run.end("FAILED")
        raise
    run.end("FINISHED")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _start_delivery(folder: Path) -> "subprocess.Popen[bytes]":
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lib.train.tracking", str(folder), str(os.getpid())]
    return subprocess.Popen(
        command,
        env={**limits, **os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the driver, which then tells the outcome
    )


def _short(value: object) -> str:
    """The text of a parameter, or its beginning and digest where MLflow wouldn't take all of it."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[: _MAX_VALUE_CHARS - 80]}… sha256 {digest_of(text)}"


def _replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)

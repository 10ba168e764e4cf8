"""Laws of the tracker: it never waits for a server, and its process delivers what was logged."""

import socket
from pathlib import Path

import pytest

from lib.config.train import TrackingConfig
from lib.core.errors import ConfigError
from lib.train.tracker import OUTCOME_NAME, Spool, Tracker, flatten, track

_EVENT = {
    "kind": "step",
    "step": 1,
    "loss": 2.0,
    "accuracy": 0.5,
    "grad_norm": 1.0,
    "learning_rate": 1e-5,
    "num_targets": 7,
    "tokens_per_second": 10.0,
    "mfu": 0.5,
    "figures": ["accuracy"],
    "seconds": 0.25,
    "parts": {"forward": 0.1, "other": 0.15},
    "slowest_rank": 1,
    "slowest_over_mean": 1.1,
    "peak_memory_bytes": [1 << 20, 3 << 20],
}


def _spool(identity: str) -> Spool:
    return Spool(experiment="laws", identity=identity, params={"a": 1}, tags={})


@pytest.mark.timeout(300)
def test_the_process_delivers_and_tells_the_run(fresh_home: Path) -> None:
    with track(TrackingConfig(experiment="laws"), "run-a", {"job": {"steps": 1}}, {"model": "abc"}) as run:
        run.log({"kind": "phase", "phase": "load", "step": 0})
        run.log(_EVENT)
        tracker = run._tracker
        assert tracker is not None
    assert tracker.delivery.wait(240) == 0
    assert (fresh_home / "tracking" / "run-a" / "delivered.json").exists()


def test_a_server_that_never_answers_costs_nothing(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[K3] Nothing is waited for but the time given at the end, and the spool keeps everything."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker = Tracker(_spool("run-b"))
        for step in range(1, 1001):
            tracker.log(step, {"loss": 1.0 / step})
        assert tracker.close("FINISHED", wait_seconds=0.1) is None
        tracker.delivery.kill()
        tracker.delivery.wait()
    folder = fresh_home / "tracking" / "run-b"
    assert len((folder / "steps.jsonl").read_text().splitlines()) == 1000 and (folder / OUTCOME_NAME).exists()


@pytest.mark.timeout(300)
def test_a_run_does_not_wait_at_its_end_for_a_server_that_is_down(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[K3] Nobody listens at the address: a run that would wait 600 s for its delivery ends once that has failed."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{gone.getsockname()[1]}")
    tracker = Tracker(_spool("run-e"))
    tracker.log(1, {"loss": 1.0})
    assert tracker.close("FINISHED", wait_seconds=600.0) is None
    tracker.delivery.kill()
    tracker.delivery.wait()
    assert (fresh_home / "tracking" / "run-e" / "steps.jsonl").read_text().count("\n") == 1


def test_a_spool_goes_on_after_a_kill(fresh_home: Path) -> None:
    """[K2] A last line that was cut short is dropped and its step logged again; whole ones aren't."""
    first = _spool("run-c")
    first.log(1, {"loss": 1.0})
    with (first.folder / "steps.jsonl").open("a") as stream:
        stream.write('{"step":2,"met')
    second = _spool("run-c")
    for step in (1, 2):
        second.log(step, {"loss": 1.0})
    second.end("FINISHED")
    lines = (first.folder / "steps.jsonl").read_text().splitlines()
    assert len(lines) == 2 and '"step":1' in lines[0] and '"step":2' in lines[1]


def test_switched_off_is_silent(fresh_home: Path) -> None:
    with track(TrackingConfig(mlflow=False), "run-d", {}, {}) as run:
        run.log(_EVENT)
    assert run.run_id is None and not (fresh_home / "tracking").exists()


def test_names_and_keys(fresh_home: Path) -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
    with pytest.raises(ConfigError, match="run identity"):
        _spool("../elsewhere")

"""What happens when a rank fails: the driver learns who and why, soon, and nothing is left behind."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import ray

from lib.cluster.group import WorkerGroup
from lib.cluster.processes import exit_cause
from lib.core.errors import DataError, GenerationError, InfraError, WorkerDiedError
from tests.lib.cluster.workers import BrokenAtBirth

SOON = 60.0
Start = Callable[..., WorkerGroup]


def _pids(group: WorkerGroup) -> list[int]:
    return [one["pid"] for one in group.call("identity", deadline_seconds=SOON)]


def _assert_nothing_left(pids: list[int], backend: str) -> None:
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    if backend == "ray":
        end = time.monotonic() + 30.0
        while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
            assert time.monotonic() < end, "CPUs are still reserved"
            time.sleep(0.1)


class _SignalAtFirstEvent:
    """Signals a process once, when the work is under way."""

    def __init__(self, pid: int, number: signal.Signals) -> None:
        self.pid, self.number, self.sent_at = pid, number, 0.0

    def __call__(self, events: list[dict[str, Any]]) -> None:
        if not self.sent_at:
            self.sent_at = time.monotonic()
            os.kill(self.pid, self.number)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named(start: Start, backend: str, rank: int) -> None:
    """[J6, J1] SIGKILL one of two ranks in a loop of collectives: the error blames it, not the one that lost its peer."""
    group = start()
    pids = _pids(group)
    kill = _SignalAtFirstEvent(pids[rank], signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match=rf"rank {rank} of 2 .*died: .*killed"):
        group.call("train", 120.0, deadline_seconds=SOON, on_events=kill)
    assert time.monotonic() - kill.sent_at < 60.0
    _assert_nothing_left(pids, backend)
    with pytest.raises(WorkerDiedError, match="closed"):
        group.call("whoami", deadline_seconds=SOON)


def test_a_stopped_rank_is_named_and_ended(start: Start, backend: str) -> None:
    """[J6] SIGSTOP one of two ranks: found by its unanswered pulse, named with its state, and killed though stopped."""
    group = start(heartbeat=8.0)
    pids = _pids(group)
    stop = _SignalAtFirstEvent(pids[1], signal.SIGSTOP)
    try:
        with pytest.raises(WorkerDiedError, match=r"rank 1 of 2 .*has not answered for \d+ s .*stopped"):
            group.call("train", 120.0, deadline_seconds=SOON, on_events=stop)
        assert time.monotonic() - stop.sent_at < 60.0
        _assert_nothing_left(pids, backend)
    finally:
        if psutil.pid_exists(pids[1]):
            os.kill(pids[1], signal.SIGKILL)


def test_a_user_error_reaches_the_driver_as_itself(start: Start, backend: str) -> None:
    """The class is the closest that lib.core.errors knows; the other rank, stuck in a barrier, doesn't delay it."""
    group = start()
    pids = _pids(group)
    with pytest.raises(DataError, match=r"^rows.jsonl:7: no role \[rank 1 of 2") as caught:
        group.call("fail", 1, "data", deadline_seconds=SOON)
    assert type(caught.value) is DataError
    _assert_nothing_left(pids, backend)


def test_a_broken_worker_reports_its_error_at_the_start(solo: Start) -> None:
    with pytest.raises(DataError, match=r"model folder is empty \[rank"):
        solo(BrokenAtBirth)


@pytest.mark.parametrize(
    ("kind", "raised", "text"),
    [("infra", GenerationError, "engine gave up"), ("disk", InfraError, "the disk failed"), ("bug", RuntimeError, "ZeroDiv")],
)
def test_other_errors_keep_their_kind(solo: Start, kind: str, raised: type[Exception], text: str) -> None:
    """[J7, I10] An infrastructure error stays one, what a disk raises becomes one, a bug comes with its traceback."""
    with solo() as group, pytest.raises(raised, match=text):
        group.call("fail", 0, kind, deadline_seconds=SOON)


def test_a_silent_rank_misses_the_deadline_but_events_prolong_it(solo: Start) -> None:
    """200 steps of 10 ms last longer than the 1 s deadline, yet no wait for an event does."""
    with solo() as group:
        assert group.call("emit_steps", 200, deadline_seconds=1.0) == "done"
        with pytest.raises(WorkerDiedError, match=r"rank 0 of 1 .*no event and no result within 1 s"):
            group.call("be_silent", 60.0, deadline_seconds=1.0)


def test_a_busy_rank_is_alive(solo: Start) -> None:
    """Python code that never rests still lets pulses through well within the shortest heartbeat."""
    with solo(heartbeat=5.0) as group:
        assert group.call("compute", 7.0, deadline_seconds=SOON) > 0


def test_a_result_that_is_no_plain_value_is_a_bug(solo: Start) -> None:
    with solo() as group, pytest.raises(RuntimeError, match="can't cross processes"):
        group.call("give_object", deadline_seconds=SOON)


def test_an_error_of_the_driver_ends_the_workers(solo: Start, backend: str) -> None:
    def explode(events: list[dict[str, Any]]) -> None:
        raise KeyError("in on_events")

    group = solo()
    pids = _pids(group)
    with pytest.raises(KeyError):
        group.call("emit_steps", 5, deadline_seconds=SOON, on_events=explode)
    if backend == "ray":
        _assert_nothing_left(pids, backend)
    with pytest.raises(WorkerDiedError, match="closed"):
        group.call("whoami", deadline_seconds=SOON)


def test_causes_are_in_words() -> None:
    """[J2] Want of memory is told apart from a plain kill."""
    assert exit_cause(-9, 0) == "killed by signal SIGKILL"
    assert "out of memory" in exit_cause(-9, 1)
    assert exit_cause(3, 0) == "its process ended with exit code 3"

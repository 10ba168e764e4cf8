"""Laws of stopping: a request reaches every rank, SIGTERM is one where it is heeded, and nobody waits for ever."""

import os
import signal

import pytest

from lib.cluster.stop import Stop
from lib.core.errors import PreemptedError, WorkerDiedError
from tests.lib.cluster.conftest import Start


def test_a_request_of_the_driver_reaches_the_rank(solo: Start) -> None:
    stop, seen = Stop(), []

    def on_events(events: list[dict[str, object]]) -> None:
        seen.extend(events)
        stop.request()

    with solo() as group, pytest.raises(PreemptedError, match=r"saved \[rank 0 of 1"):
        group.call("work_until_stopped", 60.0, deadline_seconds=60.0, on_events=on_events, stop=stop)
    assert seen


def test_sigterm_is_a_request_where_it_is_heeded_and_the_end_where_it_is_not(start: Start) -> None:
    """[J2] On each backend, in the rank's own process."""
    for method, error in (("work_until_stopped", PreemptedError), ("be_silent_after_a_word", WorkerDiedError)):
        with start(ranks=1, process_group=False) as group:
            pid = group.call("identity", deadline_seconds=60.0)[0]["pid"]
            with pytest.raises(error, match="rank 0 of 1"):
                group.call(method, 60.0, deadline_seconds=90.0, on_events=lambda _, pid=pid: os.kill(pid, signal.SIGTERM))


def test_who_does_not_end_in_the_time_that_is_left_is_not_waited_for(solo: Start) -> None:
    stop = Stop(grace_seconds=0.5)
    stop.request()
    with solo() as group, pytest.raises(PreemptedError, match="didn't end in the time that was left"):
        group.call("be_silent", 5.0, deadline_seconds=60.0, stop=stop)


def test_a_block_leaves_the_handler_that_was_there() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = Stop()
    with stop.on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and not stop.overdue
    assert signal.getsignal(signal.SIGTERM) == before

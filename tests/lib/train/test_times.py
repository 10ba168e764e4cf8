"""Laws of the ranks' times: the mean covers the step, the slowest is named, memory is the kernel's own figure."""

import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.parallel.clock import CLOCK, PARTS
from lib.train.times import RankTime, StepTimes, peak_memory, times_summary
from tests.lib.parallel.ranks import run_ranks
from tests.lib.train import slow_rank

seconds = st.floats(0.0, 10.0)
rank_times = st.builds(
    lambda parts, more, memory: RankTime(sum(parts) + more, dict(zip(PARTS, parts)), memory),
    st.lists(seconds, min_size=len(PARTS), max_size=len(PARTS)),
    seconds,
    st.integers(1, 1 << 40),
)


@given(st.lists(rank_times, min_size=1, max_size=5))
def test_parts_and_what_they_leave_are_the_step(ranks: list[RankTime]) -> None:
    row = StepTimes(tuple(ranks)).row()
    mean = sum(rank.seconds for rank in ranks) / len(ranks)
    assert sum(row["parts"].values()) == pytest.approx(mean)
    assert row["parts"]["other"] >= -1e-6
    assert row["busy_seconds"][row["slowest_rank"]] == max(row["busy_seconds"])
    assert row["slowest_over_mean"] >= 1.0 - 1e-9 or max(row["busy_seconds"]) < 1e-9
    assert row["peak_memory_bytes"] == [rank.peak_memory_bytes for rank in ranks]


def test_a_slow_rank_is_named_and_its_peers_wait() -> None:
    """Rank 1 of 2 works 50 ms longer in each of 3 steps: both see the same table, which says so."""
    one, other = run_ranks(slow_rank.steps, 2, 3)
    assert one == other
    summary = times_summary(one)
    assert summary["slowest"]["rank"] == 1 and summary["slowest"]["share_of_steps"] == 1.0
    assert summary["slowest"]["over_mean"] > 1.2
    for row in one:
        assert row["parts"]["wait"] * 2 >= 0.04, "rank 0 waits for rank 1"
        assert row["busy_seconds"][1] - row["busy_seconds"][0] >= 0.03
        assert len(row["peak_memory_bytes"]) == 2


def test_peak_memory_is_what_the_process_has_held_at_most() -> None:
    """It grows by what is held and then given back."""
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    after = peak_memory(torch.device("cpu"))
    assert after >= before
    assert after <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + (1 << 20)


def test_one_rank_alone_needs_no_group() -> None:
    CLOCK.start(torch.device("cpu"))
    times = StepTimes.over_ranks(torch.device("cpu"))
    assert len(times.ranks) == 1 and times.row()["slowest_over_mean"] == pytest.approx(1.0)


def test_a_summary_of_nothing_names_nobody() -> None:
    assert times_summary([]) == {"part_seconds": {}, "peak_memory_bytes": [], "slowest": None}

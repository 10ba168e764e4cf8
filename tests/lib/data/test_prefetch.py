"""Laws of the prefetcher: the stream's own steps in order, the position of the step consumed, errors in their place."""

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from lib.config.data import DataConfig
from lib.core.errors import DataError, InfraError
from lib.data.mixture import OWN_DATA
from lib.data.prefetch import Prefetcher
from lib.data.stream import PackedStream, Share, StepRows
from tests.lib.data.memory import PLAIN, source_of

CONFIG = DataConfig(num_streams=4, open_packs=3)
LENGTHS = [n % 17 + 2 for n in range(60)]


def _streams(workers: int = 1, rank: int = 0, num_ranks: int = 1, lengths: Sequence[int] = LENGTHS) -> list[PackedStream]:
    sources = {OWN_DATA: source_of([60], lengths)}
    shares = [Share(rank, num_ranks, worker, workers) for worker in range(workers)]
    return [PackedStream(sources, PLAIN, CONFIG, sequence_length=64, rows_per_step=6, share=share) for share in shares]


def _ids(step: StepRows) -> list[tuple[str, ...]]:
    return [row.sample_ids for row in step.rows]


@pytest.mark.parametrize(("workers", "depth"), [(1, 0), (1, 4), (2, 4), (2, 0), (4, 1)])
def test_snapshot_belongs_to_the_step_consumed(workers: int, depth: int) -> None:
    """[F3] Whatever the workers are ahead; after each step the position is that of a plain stream at the same step, and
    any other number of workers that goes on from it gives the next step."""
    plain = _streams()[0]
    state: dict[str, Any] = plain.state()
    for run in range(3):
        prefetcher = Prefetcher(_streams(workers), _ids, depth)
        prefetcher.load_state(state)
        with prefetcher:
            assert prefetcher.position().to_json() == state
            for _ in range(7 + run):
                assert prefetcher.next_step() == _ids(plain.next_step())
                state = json.loads(json.dumps(prefetcher.position().to_json()))
                assert state == plain.state()


def test_workers_of_a_rank_share_its_rows() -> None:
    """Two ranks of two workers: together the rows of one stream, rank by rank those it has without workers."""
    plain = [_streams(1, rank, 2)[0] for rank in (0, 1)]
    for rank in (0, 1):
        with Prefetcher(_streams(2, rank, 2), _ids, 2) as prefetcher:
            for _ in range(10):
                assert prefetcher.next_step() == _ids(plain[rank].next_step())


@pytest.mark.parametrize("depth", [0, 4])
def test_error_comes_after_the_steps_before_it(depth: int) -> None:
    """Two good steps, then the error of the third, as it was raised; then the prefetcher is closed."""
    steps = iter(range(10))

    def prepare(step: StepRows) -> int:
        number = next(steps)
        if number == 2:
            raise DataError("row x is bad")
        return number

    prefetcher = Prefetcher(_streams(), prepare, depth)
    assert [prefetcher.next_step(), prefetcher.next_step()] == [0, 1]
    with pytest.raises(DataError, match="row x is bad"):
        prefetcher.next_step()
    with pytest.raises(RuntimeError, match="closed"):
        prefetcher.next_step()


@pytest.mark.parametrize("workers", [1, 2])
def test_long_row_reaches_the_consumer(workers: int) -> None:
    before = threading.active_count()
    producers = _streams(workers, lengths=[500 if n == 7 else 3 for n in range(60)])
    with Prefetcher(producers, _ids, 2) as prefetcher, pytest.raises(DataError, match="row 'r7'"):
        for _ in range(20):
            prefetcher.next_step()
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_close_leaves_no_thread_though_the_queue_is_full(workers: int) -> None:
    before = threading.active_count()
    prefetcher = Prefetcher(_streams(workers), _ids, 1)
    prefetcher.next_step()
    prefetcher.close()
    prefetcher.close()
    assert threading.active_count() == before


def test_hanging_source_ends_with_an_infrastructure_error() -> None:
    """Every wait has a deadline."""
    prefetcher = Prefetcher(_streams(), lambda step: time.sleep(1.0), 1, deadline_seconds=0.1)
    with pytest.raises(InfraError, match=r"no batch was prepared within|did not end"):
        prefetcher.next_step()
    with pytest.raises(InfraError, match="did not end"):
        prefetcher.close()


def test_waiting_is_measured() -> None:
    """A step that takes 0.05 s to prepare, in the caller's thread: all of it is a stall."""
    with Prefetcher(_streams(), lambda step: time.sleep(0.05), 0) as prefetcher:
        prefetcher.next_step()
        assert prefetcher.stall_seconds >= 0.05

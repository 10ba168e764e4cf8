"""Laws of the prefetcher: the stream's own steps in order, the position of the step consumed, errors in their place."""

import json
import threading
import time
from pathlib import Path

import pytest

from lib.config.data import DataConfig
from lib.core.errors import DataError, InfraError
from lib.data.prefetch import Prefetcher
from lib.data.rows import ConversationTable
from lib.data.stream import PackedStream, StepRows
from lib.tokens.chat import ChatEncoder
from tests.lib.data.datasets import row, table

CONFIG = DataConfig(num_streams=4, open_packs=3)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ConversationTable:
    return table(tmp_path_factory.mktemp("rows"), [row(n, "ab " * (n % 17 + 1)) for n in range(60)])


def _stream(rows: ConversationTable, encoder: ChatEncoder) -> PackedStream:
    return PackedStream(rows, encoder, CONFIG, sequence_length=256, rows_per_step=2)


def _ids(step: StepRows) -> list[tuple[str, ...]]:
    return [row.sample_ids for row in step.rows]


def test_snapshot_belongs_to_the_step_consumed(rows: ConversationTable, encoder: ChatEncoder) -> None:
    """The thread is up to 5 steps ahead; after each step the position is that of a plain stream at the same step, and a
    stream that goes on from it gives the next step."""
    plain = _stream(rows, encoder)
    with Prefetcher(_stream(rows, encoder), _ids, 4) as prefetcher:
        assert prefetcher.state() == plain.state()
        for _ in range(20):
            assert prefetcher.next_step() == _ids(plain.next_step())
            assert json.dumps(prefetcher.state()) == json.dumps(plain.state())
        state = prefetcher.state()
    resumed = _stream(rows, encoder)
    resumed.load_state(state)
    assert _ids(resumed.next_step()) == _ids(plain.next_step())


def test_error_comes_after_the_steps_before_it(rows: ConversationTable, encoder: ChatEncoder) -> None:
    """Two good steps, then the error of the third, as it was raised; then the prefetcher is closed."""
    steps = iter(range(10))

    def prepare(step: StepRows) -> int:
        number = next(steps)
        if number == 2:
            raise DataError("row x is bad")
        return number

    prefetcher = Prefetcher(_stream(rows, encoder), prepare, 4)
    assert [prefetcher.next_step(), prefetcher.next_step()] == [0, 1]
    with pytest.raises(DataError, match="row x is bad"):
        prefetcher.next_step()
    with pytest.raises(RuntimeError, match="closed"):
        prefetcher.next_step()


def test_long_row_reaches_the_consumer(tmp_path: Path, encoder: ChatEncoder) -> None:
    bad = table(tmp_path, [row(n, "ab " * (500 if n == 7 else 1)) for n in range(20)])
    with Prefetcher(_stream(bad, encoder), _ids, 2) as prefetcher, pytest.raises(DataError, match="row 'r7'"):
        for _ in range(20):
            prefetcher.next_step()


def test_close_leaves_no_thread_though_the_queue_is_full(rows: ConversationTable, encoder: ChatEncoder) -> None:
    before = threading.active_count()
    prefetcher = Prefetcher(_stream(rows, encoder), _ids, 1)
    prefetcher.next_step()
    prefetcher.close()
    prefetcher.close()
    assert threading.active_count() == before


def test_hanging_source_ends_with_an_infrastructure_error(rows: ConversationTable, encoder: ChatEncoder) -> None:
    """Every wait has a deadline."""
    prefetcher = Prefetcher(_stream(rows, encoder), lambda step: time.sleep(1.0), 1, deadline_seconds=0.1)
    with pytest.raises(InfraError, match="no batch was prepared within"):
        prefetcher.next_step()
    with pytest.raises(InfraError, match="did not end"):
        prefetcher.close()

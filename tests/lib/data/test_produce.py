"""Laws of a stream in another process: the same rows and positions as here, errors and deaths reach the consumer."""

import json
from dataclasses import replace
from typing import Any

import psutil
import pytest

from lib.config.data import DataConfig
from lib.core.errors import DataError, InfraError
from lib.core.manifest import Json
from lib.data.document import PackedRow
from lib.data.mixture import OWN_DATA
from lib.data.prefetch import Prefetcher
from lib.data.produce import ProcessProducer
from lib.data.stream import Encoding, PackedStream, Share, StepRows
from tests.lib.data.memory import PLAIN, source_of


def weighted(texts: Any) -> Any:
    """Rows of an even number of tokens have weights, those of a multiple of three have labels."""
    for document in PLAIN.encode(texts):
        num_tokens = len(document.token_ids)
        weights = document.loss_mask.astype("float32") / 2 if num_tokens % 2 == 0 else None
        yield replace(document, weights=weights, labels=f'{{"length": {num_tokens}}}' if num_tokens % 3 == 0 else None)


def opened(arguments: Json, share: Share) -> PackedStream:
    if "errno" in arguments:
        raise OSError(arguments["errno"], "the disk failed")
    config = DataConfig(num_streams=4, open_packs=3, shuffle_rows=5)
    sources = {OWN_DATA: source_of([60], arguments["lengths"])}
    encoding = Encoding(lambda texts: list(weighted(texts)), {"tokenizer": "numbers"})
    return PackedStream(
        sources, encoding, config, sequence_length=arguments.get("sequence_length", 64), rows_per_step=6, share=share
    )


ARGUMENTS = {"lengths": [n % 17 + 2 for n in range(60)]}


def _content(row: PackedRow) -> list[Any]:
    return [
        (d.sample_id, d.token_ids.tolist(), d.loss_mask.tolist(), None if d.weights is None else d.weights.tolist(), d.labels)
        for d in row.documents
    ]


def _contents(step: StepRows) -> list[list[Any]]:
    return [_content(row) for row in step.rows]


def _children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "lib.data.produce" in child.cmdline()]


def test_processes_give_the_rows_and_positions_of_a_stream() -> None:
    """[F3] Two processes: their rows by number and their positions are those of one stream here; ended after five steps and
    gone on by another pair, from the step consumed. No process is left."""
    plain = opened(ARGUMENTS, Share())
    state: dict[str, Any] = plain.state()
    for _ in range(2):
        producers = [ProcessProducer(opened, ARGUMENTS, Share(0, 1, worker, 2)) for worker in (0, 1)]
        feed = Prefetcher(producers, _contents, 2)
        feed.load_state(state)
        with feed:
            for _ in range(5):
                assert feed.next_step() == _contents(plain.next_step())
                state = json.loads(json.dumps(feed.position().to_json()))
                assert state == plain.state()
    assert not _children()


def test_errors_and_deaths_reach_the_consumer() -> None:
    """A row that is too long, as the error it is; a process that is killed, as the machine's fault."""
    bad = ProcessProducer(opened, {"lengths": [3] * 30 + [500]}, Share())
    with Prefetcher([bad], _contents, 2) as feed, pytest.raises(DataError, match="row 'r30' has 500 tokens"):
        for _ in range(30):
            feed.next_step()
    with Prefetcher([ProcessProducer(opened, ARGUMENTS, Share())], _contents, 1) as feed:
        feed.next_step()
        for child in _children():
            child.kill()
        with pytest.raises(InfraError, match="the data process died"):
            for _ in range(1000):
                feed.next_step()
    assert not _children()


@pytest.mark.parametrize(
    ("arguments", "kind", "text"), [({}, RuntimeError, "KeyError: 'lengths'"), ({"errno": 5}, InfraError, "failed")]
)
def test_other_failures_keep_their_kind(arguments: Json, kind: type[Exception], text: str) -> None:
    """[I10] A bug comes with its traceback and isn't taken for the machine's fault, as a disk that fails is."""
    producer = ProcessProducer(opened, arguments, Share())
    with pytest.raises(kind, match=text) as caught:
        producer.position()
    producer.stop()
    assert type(caught.value) is kind


def test_a_death_amid_a_step_is_the_machines_fault() -> None:
    """Killed when a step's header is in the pipe, whose room its arrays exceed: the consumer gets no part of that step."""
    rows = {"lengths": [60_000] * 60, "sequence_length": 60_000}
    producer = ProcessProducer(opened, rows, Share())
    producer.position()
    assert producer._frames is not None and producer._frames.poll(60)
    for child in _children():
        child.kill()
    with pytest.raises(InfraError, match="the data process died"):
        producer.next_step()

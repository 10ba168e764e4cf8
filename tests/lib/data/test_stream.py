"""Laws of the stream: the samples of a step depend on data, seed and number of streams alone; nothing is lost or doubled."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lib.config.data import DataConfig
from lib.core.errors import ConfigError, DataError
from lib.core.examples import Conversation, Message
from lib.core.seeding import permutation
from lib.data.batch import PackedRow
from lib.data.rows import ConversationTable
from lib.data.stats import packing_report
from lib.data.stream import PackedStream, merge_states
from lib.tokens.chat import ChatEncoder
from tests.lib.data.datasets import row, table

NUM_ROWS = 90
LENGTH = 256
ROWS_PER_STEP = 4
CONFIG = DataConfig(num_streams=8, open_packs=3)
NUM_STEPS = 40


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ConversationTable:
    source = random.Random(0)
    return table(tmp_path_factory.mktemp("rows"), [row(n, "ab 12 " * source.randint(1, 30)) for n in range(NUM_ROWS)])


def _streams(rows: ConversationTable, encoder: ChatEncoder, num_ranks: int, config: DataConfig = CONFIG) -> list[PackedStream]:
    return [
        PackedStream(rows, encoder, config, sequence_length=LENGTH, rows_per_step=ROWS_PER_STEP, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]


def _content(row: PackedRow) -> tuple[Any, ...]:
    return tuple((d.sample_id, d.token_ids.tolist(), d.loss_mask.tolist()) for d in row.documents)


def _step(streams: list[PackedStream]) -> list[tuple[Any, ...]]:
    """The rows of one step over all ranks, in the order of their global numbers."""
    shares = [[_content(row) for row in stream.next_step().rows] for stream in streams]
    return [row for rows in zip(*shares, strict=True) for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(rows: ConversationTable, encoder: ChatEncoder) -> list[list[tuple[Any, ...]]]:
    streams = _streams(rows, encoder, 1)
    steps = [_step(streams) for _ in range(NUM_STEPS)]
    epochs = [stream["epoch"] for stream in streams[0].state()["streams"].values()]
    assert min(epochs) >= 2, "the laws below are to be seen over several epochs"
    return steps


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_share_the_same_steps(
    rows: ConversationTable, encoder: ChatEncoder, uninterrupted: list[list[tuple[Any, ...]]], num_ranks: int
) -> None:
    streams = _streams(rows, encoder, num_ranks)
    assert [_step(streams) for _ in range(NUM_STEPS)] == uninterrupted


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (2, 1), (2, 4), (4, 2), (4, 4)])
def test_resume_at_any_step_on_any_ranks_is_as_if_never_stopped(
    rows: ConversationTable, encoder: ChatEncoder, uninterrupted: list[list[tuple[Any, ...]]], before: int, after: int
) -> None:
    """Stopped after each step in turn, mid-pack and in later epochs too; ids, tokens and masks equal. The state is JSON."""
    streams = _streams(rows, encoder, before)
    for stopped in range(NUM_STEPS - 3):
        saved = json.loads(json.dumps([stream.state() for stream in streams]))
        resumed = _streams(rows, encoder, after)
        for stream in resumed:
            stream.load_state(merge_states(saved))
        assert [_step(resumed) for _ in range(3)] == uninterrupted[stopped : stopped + 3]
        _step(streams)
    again = [json.dumps(stream.state()) for stream in resumed]
    reloaded = _streams(rows, encoder, after)
    for stream in reloaded:
        stream.load_state(merge_states([json.loads(text) for text in again]))
    assert [json.dumps(stream.state()) for stream in reloaded] == again


def test_every_epoch_has_every_sample_once(rows: ConversationTable, encoder: ChatEncoder) -> None:
    """After any step: samples given out + those in open and waiting packs = the rows read, epoch by epoch, stream by
    stream, each epoch's order dealt out anew. Worked out here from the permutations alone."""
    stream = _streams(rows, encoder, 1)[0]
    given: Counter[int] = Counter()
    for _ in range(NUM_STEPS):
        given.update(int(name[1:]) for packed in stream.next_step().rows for name in packed.sample_ids)
        read: Counter[int] = Counter()
        held: Counter[int] = Counter()
        for number, state in stream.state()["streams"].items():
            for epoch in range(state["epoch"] + 1):
                order = permutation(NUM_ROWS, CONFIG.seed, epoch)[int(number) :: CONFIG.num_streams].tolist()
                read.update(order if epoch < state["epoch"] else order[: state["cursor"]])
            held.update(row for _, pack in state["open"] + state["pending"] for row in pack)
        assert given + held == read
    whole = min(state["epoch"] for state in stream.state()["streams"].values())
    assert all(read[number] >= whole for number in range(NUM_ROWS))


def test_a_state_is_not_changed_by_later_steps(rows: ConversationTable, encoder: ChatEncoder) -> None:
    stream = _streams(rows, encoder, 1)[0]
    stream.next_step()
    state = stream.state()
    text = json.dumps(state)
    for _ in range(10):
        stream.next_step()
    assert json.dumps(state) == text != json.dumps(stream.state())


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"num_streams": 16}, {"open_packs": 4}, {"long_rows": "drop"}, {"train_on": "last_assistant_turn"}],
    ids=lambda change: next(iter(change)),
)
def test_position_of_another_run_is_refused(rows: ConversationTable, encoder: ChatEncoder, change: dict[str, Any]) -> None:
    """[A10] Every setting that decides the order is part of the position; the error names it."""
    other = CONFIG.model_copy(update=change)
    stream = _streams(rows, ChatEncoder(encoder.tokenizer, other.train_on), 1, other)[0]
    with pytest.raises(ConfigError, match=next(iter(change))):
        stream.load_state(_streams(rows, encoder, 1)[0].state())


def test_position_without_all_streams_is_refused(rows: ConversationTable, encoder: ChatEncoder) -> None:
    halves = _streams(rows, encoder, 2)
    with pytest.raises(ConfigError, match="lacks streams 1, 3, 5, 7"):
        _streams(rows, encoder, 1)[0].load_state(halves[0].state())
    halves[0].next_step()
    with pytest.raises(ConfigError, match="can't be merged"):
        merge_states([stream.state() for stream in halves])


def test_wrong_shapes_are_refused(rows: ConversationTable, encoder: ChatEncoder) -> None:
    """[A18] With the value and the remedy."""
    with pytest.raises(DataError, match=r"90 rows for 91 streams.*lower data.num_streams to 90"):
        _streams(rows, encoder, 1, DataConfig(num_streams=91))
    with pytest.raises(ConfigError, match=r"data.num_streams \(8\) is not a multiple of the 3 ranks"):
        _streams(rows, encoder, 3)
    with pytest.raises(ConfigError, match=r"train.rows_per_step \(3\) is not a multiple of the 2 ranks"):
        PackedStream(rows, encoder, CONFIG, sequence_length=LENGTH, rows_per_step=3, num_ranks=2)
    with pytest.raises(ConfigError, match="train_on"):
        _streams(rows, encoder, 1, CONFIG.model_copy(update={"train_on": "last_assistant_turn"}))


def _around(folder: Path, encoder: ChatEncoder) -> ConversationTable:
    """Rows of LENGTH - 2 ... LENGTH + 2 and of 10 LENGTH tokens, and one whose answer only starts beyond LENGTH.

    A digit is a token; an answer of n digits makes a row of base + n tokens."""
    probe = Conversation("p", (Message("user", "q0"), Message("assistant", "1")), "p:1")
    base = len(encoder.encode([probe])[0].token_ids) - 1
    lengths = [*range(LENGTH - 2, LENGTH + 3), 10 * LENGTH]
    values = [row(number, "1" * (length - base)) for number, length in enumerate(lengths)]
    late = {"id": "r6", "messages": [{"role": "user", "content": "1" * LENGTH}, {"role": "assistant", "content": "1"}]}
    return table(folder, [*values, late])


def test_long_rows_are_refused_with_id_place_length_and_remedy(tmp_path: Path, encoder: ChatEncoder) -> None:
    """[A8] LENGTH + 1 is too long; LENGTH is not."""
    config = DataConfig(num_streams=1, open_packs=1, long_rows="refuse")
    stream = PackedStream(_around(tmp_path, encoder), encoder, config, sequence_length=LENGTH, rows_per_step=1)
    with pytest.raises(DataError, match=r"rows\.jsonl:\d: row 'r[3-6]' has \d+ tokens, the sequence 256; raise.*'truncate'"):
        for _ in range(7):
            stream.next_step()


@pytest.mark.parametrize(("policy", "kept", "cut"), [("drop", {0, 1, 2}, set()), ("truncate", {0, 1, 2, 3, 4, 5}, {3, 4, 5})])
def test_long_rows_are_dropped_or_cut_and_counted(
    tmp_path: Path, encoder: ChatEncoder, policy: str, kept: set[int], cut: set[int]
) -> None:
    """[A8] Of rows of L-2 ... L+2, 10 L tokens and one whose answer lies beyond L: the first three are whole; the next
    three are cut to L at the end, with their start; the last has nothing to train and is dropped under either policy."""
    rows = _around(tmp_path, encoder)
    config = DataConfig.model_validate({"num_streams": 1, "open_packs": 1, "long_rows": policy})
    stream = PackedStream(rows, encoder, config, sequence_length=LENGTH, rows_per_step=1)
    whole = {name: encoder.encode([rows[name]])[0] for name in range(7)}
    seen = set()
    for _ in range(2 * len(kept)):
        for document in stream.next_step().rows[0].documents:
            number = int(document.sample_id[1:])
            seen.add(number)
            assert document.token_ids.tolist() == whole[number].token_ids[:LENGTH]
            assert document.loss_mask.tolist() == whole[number].loss_mask[:LENGTH]
            assert document.num_targets
    assert seen == kept
    state = stream.state()["streams"]["0"]
    counts = state["counts"]
    in_flight = sum(len(pack) for _, pack in state["open"] + state["pending"])
    assert counts["visited"] == counts["documents"] + in_flight + counts["dropped"]
    epochs, rest = divmod(counts["visited"], 7)
    assert epochs * (7 - len(kept)) <= counts["dropped"] <= epochs * (7 - len(kept)) + rest
    assert epochs * len(cut) <= counts["truncated"] <= epochs * len(cut) + rest


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_data_of_which_nothing_can_be_used_ends_with_an_error(tmp_path: Path, encoder: ChatEncoder, policy: str) -> None:
    """[A17] Not with an endless search."""
    rows = table(tmp_path, [row(number, "a") for number in range(20)])
    config = DataConfig.model_validate({"num_streams": 4, "long_rows": policy})
    stream = PackedStream(rows, encoder, config, sequence_length=16, rows_per_step=4)
    with pytest.raises(DataError, match="raise sequence_length"):
        stream.next_step()


def test_report_adds_up(rows: ConversationTable, encoder: ChatEncoder) -> None:
    """Rows, documents, tokens and padding are those of the rows given out; after a merge of two ranks as well."""
    streams = _streams(rows, encoder, 2)
    given = [packed for _ in range(10) for stream in streams for packed in stream.next_step().rows]
    report = packing_report(merge_states([stream.state() for stream in streams]))
    lengths = [len(document.token_ids) for packed in given for document in packed.documents]
    assert (report.rows, report.documents, report.tokens) == (40, len(lengths), sum(lengths))
    assert report.padding == 40 * LENGTH - sum(lengths)
    assert report.efficiency == sum(lengths) / (40 * LENGTH)
    for greatest, count in report.length_histogram:
        assert count == sum(greatest // 2 < length <= greatest for length in lengths)
    assert json.loads(json.dumps(report.to_json()))["documents_per_row"] == len(lengths) / 40
    empty = packing_report(_streams(rows, encoder, 1)[0].state())
    assert (empty.efficiency, empty.documents_per_row, empty.length_histogram) == (0.0, 0.0, ())


def test_each_setting_changes_the_order_of_samples(rows: ConversationTable, encoder: ChatEncoder) -> None:
    """[A18] No setting of the stream does nothing."""
    orders = set()
    for change in ({}, {"seed": 1}, {"num_streams": 16}, {"open_packs": 2}):
        streams = _streams(rows, encoder, 1, CONFIG.model_copy(update=change))
        orders.add(tuple(packed.sample_ids for _ in range(6) for packed in streams[0].next_step().rows))
    assert len(orders) == 4

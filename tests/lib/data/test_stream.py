"""Laws of the stream: the samples of a step depend on data, seed and number of streams alone; nothing is lost or doubled."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config.data import DataConfig
from lib.core.errors import ConfigError, DataError
from lib.data.batch import PackedRow
from lib.data.mixture import OWN_DATA
from lib.data.shuffle import ExampleSource
from lib.data.stats import packing_report
from lib.data.stream import Encoding, PackedStream, Share, merge_states
from tests.lib.data.memory import PLAIN, source_of

LENGTH = 64
ROWS_PER_STEP = 4
NUM_STEPS = 60
LENGTHS = random.Random(0).choices(range(2, 41), k=97)
MIXED = {
    "mixture": [
        {"name": "a", "weight": 3.0},
        {"name": "b", "location": "/b", "schedule": [{"step": 5, "weight": 0.0}, {"step": 30, "weight": 2.0}]},
        {"name": "c", "location": "/c", "weight": 2.0, "max_epochs": 2},
    ],
    "temperature": 1.5,
}
CASES: dict[str, dict[str, Any]] = {
    "packed": {},
    "whole_splits": {"num_streams": 4, "shuffle_rows": 3},
    "padded": {"packing": "pad"},
    "split": {"long_rows": "split"},
    "truncated": {"long_rows": "truncate"},
    "short_delay": {"max_delay": 1, "open_packs": 1},
    "mixed": MIXED,
}
LONG = {"split", "truncated", "mixed"}
"""Cases with rows longer than the sequence."""


def _config(**changes: Any) -> DataConfig:
    return DataConfig.parse(
        {"num_streams": 8, "open_packs": 3, "shuffle_rows": 5, "long_rows": "split", **changes}, where="test"
    )


def _sources(case: str) -> dict[str, ExampleSource]:
    lengths = [200, 64, 65, 63, 128, 127, *LENGTHS] if case in LONG else LENGTHS
    own = source_of([7, 0, 9, 1, 5] * 4 if case == "whole_splits" else [90], lengths)
    if case != "mixed":
        return {OWN_DATA: own}
    return {"a": own, "b": source_of([20, 20], [9, 33], prefix="b"), "c": source_of([15], [50, 3], prefix="c")}


def _streams(case: str, num_ranks: int = 1, config: DataConfig | None = None, workers: int = 1) -> list[PackedStream]:
    settings = {"sequence_length": LENGTH, "rows_per_step": ROWS_PER_STEP}
    return [
        PackedStream(
            _sources(case), PLAIN, config or _config(**CASES[case]), **settings, share=Share(rank, num_ranks, worker, workers)
        )
        for rank in range(num_ranks)
        for worker in range(workers)
    ]


def _content(row: PackedRow) -> tuple[Any, ...]:
    return tuple((d.sample_id, d.token_ids.tolist(), d.loss_mask.tolist()) for d in row.documents)


def _step(streams: Sequence[PackedStream]) -> list[tuple[Any, ...]]:
    """The rows of one step over all ranks and workers, by their numbers."""
    parts = [stream.next_step() for stream in streams]
    numbered = sorted((number, _content(row)) for part in parts for number, row in zip(part.numbers, part.rows, strict=True))
    first = numbered[0][0]
    assert [number for number, _ in numbered] == list(range(first, first + ROWS_PER_STEP))
    return [row for _, row in numbered]


@cache
def _uninterrupted(case: str) -> list[list[tuple[Any, ...]]]:
    streams = _streams(case)
    steps = [_step(streams) for _ in range(NUM_STEPS)]
    epochs = [stream["mixer"]["cursors"][0][0] for stream in streams[0].state()["streams"].values()]
    assert min(epochs) >= 2, "the laws below are to be seen over several epochs"
    return steps


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("num_ranks", "workers"), [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_ranks_and_workers_share_the_same_steps(case: str, num_ranks: int, workers: int) -> None:
    if _config(**CASES[case]).num_streams % (num_ranks * workers):
        return
    streams = _streams(case, num_ranks, workers=workers)
    assert [_step(streams) for _ in range(NUM_STEPS)] == _uninterrupted(case)


@pytest.mark.parametrize("case", CASES)
def test_resume_at_any_step_on_any_ranks_is_as_if_never_stopped(case: str) -> None:
    """[F3][F4] Stopped after each step in turn, mid-pack, mid-block, mid-split and in later epochs too, by a group of 1, 2
    or 4 ranks and gone on by another; ids, tokens and masks equal. The state is JSON."""
    source, checkpoint = random.Random(case), None
    for stopped in range(NUM_STEPS - 3):
        before, after = source.choice([1, 2, 4]), source.choice([1, 2, 4])
        streams = _streams(case, before)
        if checkpoint:
            for stream in streams:
                stream.load_state(checkpoint)
            assert _step(streams) == _uninterrupted(case)[stopped - 1]
        checkpoint = json.loads(json.dumps(merge_states([stream.state() for stream in streams])))
        resumed = _streams(case, after)
        for stream in resumed:
            stream.load_state(checkpoint)
        assert merge_states([stream.state() for stream in resumed]) == checkpoint
        assert [_step(resumed) for _ in range(3)] == _uninterrupted(case)[stopped : stopped + 3]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 25), min_size=1, max_size=24).filter(lambda sizes: sum(sizes) > 3),
    st.lists(st.integers(2, 150), min_size=1, max_size=9),
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 4])), min_size=1, max_size=5),
    st.integers(1, 30),
    st.sampled_from(["truncate", "split"]),
)
def test_random_kills_lose_and_repeat_nothing(
    sizes: list[int], lengths: list[int], runs: list[tuple[int, int]], shuffle_rows: int, long_rows: str
) -> None:
    """[F3] Runs of random lengths on random numbers of ranks, one after the other, over random data."""
    config = _config(num_streams=4, shuffle_rows=shuffle_rows, long_rows=long_rows)

    def streams(num_ranks: int) -> list[PackedStream]:
        sources = {OWN_DATA: source_of(sizes, lengths)}
        plain = {"sequence_length": LENGTH, "rows_per_step": ROWS_PER_STEP}
        return [PackedStream(sources, PLAIN, config, **plain, share=Share(rank, num_ranks)) for rank in range(num_ranks)]

    whole = streams(1)
    state = whole[0].state()
    for num_steps, num_ranks in runs:
        ranks = streams(num_ranks)
        for stream in ranks:
            stream.load_state(state)
        assert [_step(ranks) for _ in range(num_steps)] == [_step(whole) for _ in range(num_steps)]
        state = merge_states([stream.state() for stream in ranks])


@pytest.mark.parametrize("case", ["packed", "whole_splits", "padded", "short_delay"])
def test_every_epoch_has_every_sample_once(case: str) -> None:
    """After any step: samples given out + those in open and waiting packs = the rows that the streams have read; and a
    row read n times by all streams was read in n epochs, which are at most one apart from the fewest."""
    stream = _streams(case)[0]
    ids = [text.sample_id for split in _sources(case)[OWN_DATA].splits for text in split]  # type: ignore[attr-defined]
    offsets = [0]
    for split in _sources(case)[OWN_DATA].splits:  # type: ignore[attr-defined]
        offsets.append(offsets[-1] + len(split))
    given: Counter[str] = Counter()
    for _ in range(NUM_STEPS):
        given.update(name for packed in stream.next_step().rows for name in packed.sample_ids)
        streams = stream.state()["streams"].values()
        packs = [pack[-1] for state in streams for pack in state["open"] + state["pending"]]
        held = Counter(ids[offsets[split] + row] for pack in packs for _, split, row, _ in pack)
        read = given + held
        assert sum(read.values()) == sum(state["counts"]["visited"] for state in streams)
        epochs = [state["mixer"]["cursors"][0][0] for state in streams]
        assert all(min(epochs) <= read[name] <= max(epochs) + 1 for name in ids)


@pytest.mark.parametrize("sizes", [(0, 7), (1, 100), (5, 5), (0, 7, 1, 100)])
def test_unequal_shares_end_with_equal_steps(sizes: tuple[int, ...]) -> None:
    """[B8] Ranks of one stream each, on splits of very unequal sizes: in every step each has as many rows of the same
    length, and within an epoch no sample comes twice and none is left out, up to what open packs hold."""
    sources, num_ranks = {OWN_DATA: source_of(sizes, [10, 20])}, len(sizes)
    config, numbers = _config(num_streams=num_ranks, open_packs=1), {"sequence_length": LENGTH, "rows_per_step": num_ranks}
    ranks = [PackedStream(sources, PLAIN, config, **numbers, share=Share(rank, num_ranks)) for rank in range(num_ranks)]
    given: Counter[str] = Counter()
    for _ in range(50):
        steps = [rank.next_step() for rank in ranks]
        assert [len(step.rows) for step in steps] == [1] * num_ranks
        given.update(name for step in steps for row in step.rows for name in row.sample_ids)
        states = [state for rank in ranks for state in rank.state()["streams"].values()]
        epochs = [state["mixer"]["cursors"][0][0] for state in states]
        held = sum(len(pack[-1]) for state in states for pack in state["open"] + state["pending"])
        assert all(count <= max(epochs) + 1 for count in given.values())
        assert sum(max(0, min(epochs) - given[f"r{n}"]) for n in range(sum(sizes))) <= held


def test_a_position_is_not_changed_by_later_steps() -> None:
    stream = _streams("mixed")[0]
    stream.next_step()
    position = stream.position()
    text = json.dumps(position.to_json())
    for _ in range(10):
        stream.next_step()
    assert json.dumps(position.to_json()) == text != json.dumps(stream.state())


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": 1}, {"num_streams": 16}, {"open_packs": 4}, {"long_rows": "drop"}, {"train_on": "last_assistant_turn"}),
        *({"shuffle_rows": 6}, {"max_delay": 7}, {"packing": "pad"}, {"mixture": [{"name": "data", "weight": 2.0}]}),
    ],
    ids=lambda change: next(iter(change)),
)
def test_position_of_another_run_is_refused(change: dict[str, Any]) -> None:
    """[A10] Every setting that decides the batches is part of the position; the error names it."""
    stream = _streams("packed", config=_config(**change))[0]
    with pytest.raises(ConfigError, match=next(iter(change))):
        stream.load_state(_streams("packed")[0].state())


def test_position_of_other_data_tokens_or_step_size_is_refused() -> None:
    """[A10] The rows of a step only matter where weights follow a schedule."""
    plain = {"sequence_length": LENGTH, "rows_per_step": ROWS_PER_STEP}
    state = _streams("packed")[0].state()
    own = _sources("packed")[OWN_DATA]
    changes: list[tuple[str, ExampleSource, Encoding, dict[str, int]]] = [
        ("sources", type(own)(own.splits, "other"), PLAIN, plain),  # type: ignore[call-arg,attr-defined]
        ("tokenizer", own, Encoding(PLAIN.encode, {"tokenizer": "other"}), plain),
        ("sequence_length", own, PLAIN, {**plain, "sequence_length": 65}),
    ]
    for name, source, encoding, values in changes:
        with pytest.raises(ConfigError, match=name):
            PackedStream({OWN_DATA: source}, encoding, _config(), **values).load_state(state)
    PackedStream({OWN_DATA: own}, PLAIN, _config(), **{**plain, "rows_per_step": 8}).load_state(state)
    with pytest.raises(ConfigError, match="rows_per_step was 4, is 8"):
        PackedStream(_sources("mixed"), PLAIN, _config(**MIXED), **{**plain, "rows_per_step": 8}).load_state(
            _streams("mixed")[0].state()
        )


@pytest.mark.parametrize("change", [{"workers": 0}, {"worker_kind": "process"}, {"prefetch_batches": 9}])
def test_position_survives_a_change_of_workers(change: dict[str, Any]) -> None:
    _streams("packed", config=_config(**change))[0].load_state(_streams("packed")[0].state())


def test_position_without_all_streams_is_refused() -> None:
    halves = _streams("packed", 2)
    with pytest.raises(ConfigError, match="lacks streams 1, 3, 5, 7"):
        _streams("packed")[0].load_state(halves[0].state())
    halves[0].next_step()
    with pytest.raises(ConfigError, match="can't be merged"):
        merge_states([stream.state() for stream in halves])


def test_wrong_shapes_are_refused() -> None:
    """[A18] With the value and the remedy."""
    with pytest.raises(ConfigError, match=r"data.num_streams \(8\) is not a multiple of the 3 ranks"):
        _streams("packed", 3)
    with pytest.raises(ConfigError, match=r"data.num_streams \(8\) is not a multiple of the 2 ranks x 8 workers"):
        _streams("packed", 2, workers=8)
    with pytest.raises(ConfigError, match=r"train.rows_per_step \(3\) is not a multiple of the 2 ranks"):
        PackedStream(_sources("packed"), PLAIN, _config(), sequence_length=LENGTH, rows_per_step=3, share=Share(0, 2))


def test_report_adds_up() -> None:
    """Rows, documents, tokens and padding are those of the rows given out; after a merge of two ranks as well. The sources'
    parts add up to the whole, and what was read was given out, is held, or is counted as dropped."""
    streams = _streams("mixed", 2)
    given = [packed for _ in range(10) for stream in streams for packed in stream.next_step().rows]
    report = packing_report(json.loads(json.dumps(merge_states([stream.state() for stream in streams]), sort_keys=True)))
    documents = [document for packed in given for document in packed.documents]
    lengths = [len(document.token_ids) for document in documents]
    assert (report.rows, report.documents, report.tokens) == (40, len(lengths), sum(lengths))
    assert report.targets == sum(document.num_targets for document in documents)
    assert report.padding == 40 * LENGTH - sum(lengths)
    assert report.efficiency == sum(lengths) / (40 * LENGTH)
    for greatest, count in report.length_histogram:
        assert count == sum(greatest // 2 < length <= greatest for length in lengths)
    values = json.loads(json.dumps(report.to_json()))
    assert values["documents_per_row"] == len(lengths) / 40
    for name in ("documents", "tokens", "targets", "visited"):
        assert sum(source[name] for source in values["sources"].values()) == values[name]
    by_source = Counter({"r": "a"}.get(document.sample_id[0], document.sample_id[0]) for document in documents)
    assert {name: source["documents"] for name, source in values["sources"].items()} == {"a": 0, "b": 0, "c": 0} | by_source
    assert sum(source["share_of_tokens"] for source in values["sources"].values()) == pytest.approx(1.0)
    empty = packing_report(_streams("packed")[0].state())
    assert (empty.efficiency, empty.documents_per_row, empty.length_histogram) == (0.0, 0.0, ())


def test_waste_is_told_apart() -> None:
    """Of 100 s, 10 were waited for data and 5 for other ranks; padding and lost tokens come from the report."""
    stream = _streams("truncated", config=_config(long_rows="truncate"))[0]
    for _ in range(30):
        stream.next_step()
    report = packing_report(stream.state())
    found = report.waste(train_seconds=100.0, stall_seconds=10.0, straggler_seconds=5.0)
    assert (found.stall, found.straggler_wait) == (0.1, 0.05)
    assert found.padding == pytest.approx(report.padding / (30 * ROWS_PER_STEP * LENGTH))
    assert 0 < found.lost_to_length == report.cut_tokens / (report.tokens + report.cut_tokens)


def test_each_setting_changes_the_order_of_samples() -> None:
    """[A18] No setting of the stream does nothing."""
    orders = set()
    changes: list[dict[str, Any]] = [{}, {"seed": 1}, {"num_streams": 16}, {"open_packs": 2}, {"shuffle_rows": 1}]
    changes += [{"max_delay": 1}, {"packing": "pad"}, {"num_streams": 1}]
    for change in changes:
        stream = _streams("packed", config=_config(**change))[0]
        orders.add(tuple(packed.sample_ids for _ in range(25) for packed in stream.next_step().rows))
    assert len(orders) == len(changes)


@pytest.mark.parametrize("policy", ["drop", "refuse"])
def test_data_of_which_nothing_can_be_used_ends_with_an_error(policy: str) -> None:
    """[A17] Not with an endless search."""
    config = _config(num_streams=4, long_rows=policy)
    stream = PackedStream({OWN_DATA: source_of([20], [99])}, PLAIN, config, sequence_length=16, rows_per_step=4)
    with pytest.raises(DataError, match="raise sequence_length"):
        stream.next_step()


def test_a_row_is_drawn_by_the_weights_of_its_step() -> None:
    """Source a alone until step 4, b alone from step 5 on, a document a row and no window: of the 4 rows of each step all are
    a's before, all b's after. Whatever is read ahead, a step's rows are those of its own weights."""
    sides = {"a": [(4, 1.0), (5, 0.0)], "b": [(4, 0.0), (5, 1.0)]}
    mixture = [
        {"name": name, "location": f"/{name}", "schedule": [{"step": step, "weight": weight} for step, weight in points]}
        for name, points in sides.items()
    ]
    config = _config(mixture=mixture, packing="pad", open_packs=1, num_streams=4)
    sources = {name: source_of([50], prefix=name) for name in sides}
    stream = PackedStream(sources, PLAIN, config, sequence_length=LENGTH, rows_per_step=ROWS_PER_STEP)
    for step in range(10):
        names = [name[0] for row in stream.next_step().rows for name in row.sample_ids]
        assert names == ["a" if step <= 4 else "b"] * ROWS_PER_STEP

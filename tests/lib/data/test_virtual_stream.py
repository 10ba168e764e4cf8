"""Laws of long rows: refused with their place, dropped, cut or split, and every token and row accounted for."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config.data import DataConfig
from lib.core.errors import DataError
from lib.core.examples import Conversation, Message
from lib.data.batch import Document
from lib.data.examples import TableExamples
from lib.data.mixture import OWN_DATA, Mixture
from lib.data.stream import Encoding, PackedStream
from lib.data.table import ExampleTable
from lib.data.virtual_stream import VirtualStream
from lib.tokens.chat import ChatEncoder
from tests.lib.data.datasets import row, table
from tests.lib.data.memory import PLAIN, source_of

LENGTH = 256


def _stream(lengths: list[int], capacity: int, **changes: Any) -> VirtualStream:
    """One stream over one row of each length."""
    config = DataConfig.parse({"num_streams": 1, "open_packs": 4, **changes}, where="test")
    mixture = Mixture.of({OWN_DATA: source_of([len(lengths)], lengths)}, config)
    return VirtualStream(mixture, PLAIN.encode, config, capacity, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 100), min_size=1, max_size=12), st.integers(2, 20), st.sampled_from(["pack", "pad"]))
def test_split_keeps_every_target_once(lengths: list[int], capacity: int, packing: str) -> None:
    """[B5] Lengths below, at and far above the capacity T: the pieces hold T tokens at most, follow one another with one
    token of context, and predict tokens 1 to n - 1 of the row once each. Token t is t, so a target names itself.

    A row of n > T tokens has ceil((n - 1) / (T - 1)) pieces; they are counted as one row that was split."""
    stream = _stream(lengths, capacity, long_rows="split", packing=packing, shuffle_rows=1)
    documents = [document for _ in range(10) for document in stream.next_row(0).documents]
    position = stream.position()
    documents += [found for pack in (*position.held.packs(), *position.pending) for _, _, found in pack.refs if found]
    epochs, rest = divmod(stream.counts["visited"], len(lengths))
    targets: Counter[tuple[str, int]] = Counter()
    for document in documents:
        assert len(document.token_ids) <= capacity
        targets.update((document.sample_id, int(token)) for token in document.token_ids[1:][document.loss_mask[1:]])
    expected = {(f"r{n}", token): epochs + (n < rest) for n, length in enumerate(lengths) for token in range(1, length)}
    assert targets == Counter(expected)
    pieces = [1 if n <= capacity else -(-(n - 1) // (capacity - 1)) for n in lengths]
    assert len(documents) == epochs * sum(pieces) + sum(pieces[:rest])
    long = [length > capacity for length in lengths]
    assert stream.counts["split"] == epochs * sum(long) + sum(long[:rest])
    assert stream.counts["dropped"] == stream.counts["truncated"] == stream.counts["cut_tokens"] == 0


def test_pieces_without_a_target_are_left_out() -> None:
    """A row of 10 tokens of which the last 2 are trained, T = 4: pieces 0-3, 3-6, 6-9; the first two predict nothing."""

    def encode(texts: Any) -> list[Document]:
        documents = PLAIN.encode(texts)
        return [Document(d.sample_id, d.token_ids, d.token_ids >= len(d.token_ids) - 2) for d in documents]

    config = DataConfig(num_streams=1, open_packs=1, long_rows="split")
    stream = VirtualStream(Mixture.of({OWN_DATA: source_of([1], [10])}, config), encode, config, 4, 0)
    for _ in range(3):
        assert [document.token_ids.tolist() for document in stream.next_row(0).documents] == [[6, 7, 8, 9]]
        resumed = VirtualStream(stream.mixture, encode, config, 4, 0)
        resumed.load_state(stream.position().to_json())
        stream = resumed


def test_a_row_is_given_out_within_a_bounded_delay() -> None:
    """Rows of 2 tokens and one of 9 in packs of 10, which nothing but a row of 1 fills: while open packs are enough, only
    the delay closes its pack. It is given out before `max_delay` + two windows of `open_packs` rows more are read."""
    for max_delay in (1, 5, 40):
        stream = _stream([9, *[4] * 200], 10, max_delay=max_delay, open_packs=8, shuffle_rows=1)
        while "r0" not in stream.next_row(0).sample_ids:
            assert stream.counts["visited"] <= max_delay + 3 * 8
        assert stream.counts["visited"] <= max_delay + 3 * 8


def test_padded_rows_hold_one_document_in_the_order_read() -> None:
    stream = _stream([3, 5, 7], 8, packing="pad", shuffle_rows=1)
    assert [stream.next_row(0).sample_ids for _ in range(6)] == [("r0",), ("r1",), ("r2",)] * 2
    assert stream.counts["padding"] == 2 * (5 + 3 + 1)


def _around(folder: Path, encoder: ChatEncoder) -> ExampleTable[Conversation]:
    """Rows of LENGTH - 2 ... LENGTH + 2 and of 10 LENGTH tokens, and one whose answer only starts beyond LENGTH.

    A digit is a token; an answer of n digits makes a row of base + n tokens."""
    probe = Conversation("p", (Message("user", "q0"), Message("assistant", "1")), "p:1")
    base = len(encoder.encode([probe])[0].token_ids) - 1
    lengths = [*range(LENGTH - 2, LENGTH + 3), 10 * LENGTH]
    values = [row(number, "1" * (length - base)) for number, length in enumerate(lengths)]
    late = {"id": "r6", "messages": [{"role": "user", "content": "1" * LENGTH}, {"role": "assistant", "content": "1"}]}
    return table(folder, [*values, late])


def _packed(rows: ExampleTable[Conversation], encoder: ChatEncoder, policy: str) -> PackedStream:
    config = DataConfig.parse({"num_streams": 1, "open_packs": 1, "long_rows": policy}, where="test")
    sources = {OWN_DATA: TableExamples(rows)}
    return PackedStream(sources, Encoding.of_chat(encoder), config, sequence_length=LENGTH, rows_per_step=1)


def test_long_rows_are_refused_with_id_place_length_and_remedy(tmp_path: Path, encoder: ChatEncoder) -> None:
    """[A8] LENGTH + 1 is too long; LENGTH is not."""
    stream = _packed(_around(tmp_path, encoder), encoder, "refuse")
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
    stream = _packed(rows, encoder, policy)
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
    in_flight = sum(len(pack[-1]) for pack in state["open"] + state["pending"])
    assert counts["visited"] == counts["documents"] + in_flight + counts["dropped"]
    epochs, rest = divmod(counts["visited"], 7)
    assert epochs * (7 - len(kept)) <= counts["dropped"] <= epochs * (7 - len(kept)) + rest
    assert epochs * len(cut) <= counts["truncated"] <= epochs * len(cut) + rest
    lost = {n: len(whole[n].token_ids) - LENGTH for n in cut}
    assert epochs * sum(lost.values()) <= counts["cut_tokens"] <= (epochs + 1) * sum(lost.values())

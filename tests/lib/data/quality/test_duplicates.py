"""Duplicates: what is dropped is like something kept, what is like it is found, the rest stays."""

import random
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config.quality import CleanConfig
from lib.core.examples import Conversation, Example, Message
from lib.data.quality.clean import Choice, find_duplicates
from lib.data.quality.duplicates import (
    NUM_HASHES,
    RECALL,
    bands,
    find_chance,
    jaccard,
    rows_in_band,
    signature,
)
from lib.data.quality.text import mixed, sequences, words


def row(number: int, text: str, system: str = "") -> Conversation:
    turns = (Message("user", "Go on."), Message("assistant", text))
    messages = (Message("system", system), *turns) if system else turns
    return Conversation(f"r{number}", messages, f"f:{number}")


def _chosen(rows: Sequence[Example], **values: object) -> Choice:
    return find_duplicates(rows, iter(rows), CleanConfig(**values))  # type: ignore[arg-type]


def _text(rng: random.Random, length: int) -> list[str]:
    return [f"w{rng.randrange(10_000)}" for _ in range(length)]


def test_equal_content_is_a_duplicate_whatever_id_and_place() -> None:
    """The first stays. Another system message is another content, and near rows are left alone when asked to."""
    rows = [row(0, "one two three"), row(1, "one two three"), row(2, "one two three", "Be brief."), row(3, "four")]
    choice = _chosen(rows, near_duplicates="keep")
    assert choice.kept.tolist() == [True, False, True, True]
    assert choice.to_json() == {"exact_duplicate": {"rows": 1, "first_ids": ["r1"]}}
    assert _chosen(rows, exact_duplicates="keep", near_duplicates="keep").kept.all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.6, 0.8, 0.95]))
def test_rows_are_dropped_exactly_where_a_kept_earlier_row_is_similar(seed: int, similarity: float) -> None:
    """Against comparing every row with every other. Families of edited copies make similarities on both sides of the limit.
    A pair may be missed with a chance of 1 - RECALL at the limit and less above it; with some 100 pairs a run that is rare,
    so two may be missed, and none may be dropped wrongly."""
    rng = random.Random(seed)
    rows: list[Conversation] = []
    for _ in range(6):
        base = _text(rng, rng.randrange(1, 60))
        for _ in range(5):
            edited = list(base)
            for _ in range(rng.randrange(4)):
                edited[rng.randrange(len(edited))] = "new"
            rows.append(row(len(rows), " ".join(edited)))
    rng.shuffle(rows)
    found = _chosen(rows, exact_duplicates="keep", similarity=similarity)
    sets = [sequences(words("Go on. " + one.messages[1].content), 5) for one in rows]
    expected: list[int] = []
    for number, own in enumerate(sets):
        if all(jaccard(own, sets[other]) < similarity for other in expected):
            expected.append(number)
    kept = np.flatnonzero(found.kept).tolist()
    assert all(
        any(jaccard(sets[number], sets[other]) >= similarity for other in kept if other < number)
        for number in set(range(len(rows))) - set(kept)
    )
    assert len(set(kept) ^ set(expected)) <= 2


def test_likeness_is_the_share_of_common_sequences() -> None:
    """Ten words have 6 sequences of 5. With the last word changed one of them differs: 5 shared of 7, so 0.714..."""
    left, right = (sequences(text.split(), 5) for text in ("a b c d e f g h i j", "a b c d e f g h i x"))
    assert jaccard(left, right) == 5 / 7


def test_a_signature_estimates_likeness() -> None:
    """The share of equal values has the mean J and the variance J (1 - J) / 128, so 5 sigma is 0.22 at J = 1/2."""
    rng = np.random.default_rng(3)
    for shared in (0, 300, 600, 900):
        numbers = mixed(rng.integers(0, 2**63, 1200 + 1200 - shared).astype(np.uint64))
        left, right = np.unique(numbers[:1200]), np.unique(numbers[1200 - shared :])
        exact = jaccard(left, right)
        estimate = float(np.mean(signature(left) == signature(right)))
        assert abs(estimate - exact) <= 5 * (max(exact * (1 - exact), 0.01) / NUM_HASHES) ** 0.5


def test_bands_find_what_they_must() -> None:
    """As many values to a band as the recall allows; the cost of a row is a digest and its bands."""
    for similarity in (0.3, 0.5, 0.8, 0.9, 1.0):
        rows = rows_in_band(similarity)
        assert find_chance(similarity, rows) >= RECALL
        assert rows == 32 or find_chance(similarity, rows + 1) < RECALL
        assert len(bands(signature(np.arange(9, dtype=np.uint64)), rows)) == NUM_HASHES // rows
    assert 16 + 8 * (NUM_HASHES // rows_in_band(0.8)) + NUM_HASHES <= 320


def test_rows_without_words_are_no_near_duplicates() -> None:
    """Of "..." and "?!" nothing can be compared; they differ in content, so both stay."""
    rows = [
        Conversation(f"r{n}", (Message("user", "?"), Message("assistant", text)), "f") for n, text in enumerate(["...", "?!"])
    ]
    assert _chosen(rows).kept.all()


def test_scripts_without_spaces_have_sequences_too() -> None:
    """One changed character of many leaves two Chinese texts alike; word by word they would be one word each."""
    text = "我们今天一起去公园散步然后回家吃饭看书写字听音乐"
    rows = [row(0, text * 2), row(1, text * 2 + "好")]
    assert _chosen(rows).kept.tolist() == [True, False]
    assert words("Ünï ÜNÏ １２") == ["ünï", "ünï", "12"]


def test_operators_are_words_and_hyphens_are_none() -> None:
    assert words("15 - 26, 15-26, -3 \u2212 4") == ["15", "-", "26", "15", "-", "26", "-", "3", "-", "4"]
    assert words("a well-known C++ rule: x<=y*2") == ["a", "well", "known", "c", "+", "+", "rule", "x", "<", "=", "y", "*", "2"]

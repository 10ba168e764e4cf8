"""Splits, contamination and subsets."""

import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config.quality import CleanConfig, ContaminationConfig, SplitConfig
from lib.core.artifact import read_manifest, stage_artifact
from lib.core.errors import DataError
from lib.core.examples import Completion, Conversation, Event, EventSequence, Example, Message, PreferencePair, Prompt
from lib.data.quality.clean import find_contaminated, find_duplicates, held_out
from lib.data.quality.subset import write_subset
from lib.data.quality.text import content_digest, prompt_digest
from lib.data.rows import ingest_dataset
from lib.data.table import ExampleTable

QUESTION = "A farmer has seventeen sheep and all but nine of them run away in the night; how many sheep are left now?"
"""21 words, so 9 sequences of 13."""


def talk(number: int, question: str, answer: str = "Nine.", system: str = "") -> Conversation:
    turns = (Message("user", question), Message("assistant", answer))
    return Conversation(f"r{number}", (Message("system", system), *turns) if system else turns, f"f:{number}")


ROWS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=2, max_size=60)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.sampled_from(["prompt", "content"]), st.randoms(use_true_random=False))
def test_a_split_is_stable_and_its_sides_share_nothing(drawn: list[tuple[int, int]], group: str, rng: random.Random) -> None:
    """[A14] A row's side is the same in any order and in any shard; no content, and with "prompt" no prompt, is on both."""
    config = SplitConfig(evaluation_fraction=0.5, group=group)  # type: ignore[arg-type]
    rows: list[Example] = [talk(number, f"q{q}", f"a{a}") for number, (q, a) in enumerate(drawn)]
    try:
        sides = held_out(rows, config)
    except DataError:
        return
    digest = prompt_digest if group == "prompt" else content_digest
    assert not {digest(r) for r, s in zip(rows, sides) if s} & {digest(r) for r, s in zip(rows, sides) if not s}
    assert not {content_digest(r) for r, s in zip(rows, sides) if s} & {content_digest(r) for r, s in zip(rows, sides) if not s}
    side_of = dict(zip((row.sample_id for row in rows), sides.tolist()))
    shuffled = rng.sample(rows, len(rows))
    assert held_out(shuffled, config).tolist() == [side_of[row.sample_id] for row in shuffled]
    shard = rows[::2]
    if len({side_of[row.sample_id] for row in shard}) == 2:
        assert held_out(shard, config).tolist() == [side_of[row.sample_id] for row in shard]


def test_a_split_has_the_asked_size_and_other_salts_give_others() -> None:
    """Of 4,000 groups a share of 0.1 is 400; the standard deviation is 19, so 5 sigma is 95."""
    rows = [talk(number, f"question {number}") for number in range(4000)]
    sides = held_out(rows, SplitConfig(evaluation_fraction=0.1))
    assert abs(int(sides.sum()) - 400) <= 95
    assert (held_out(rows, SplitConfig(evaluation_fraction=0.1, salt="b")) != sides).any()
    with pytest.raises(DataError, match="fall to training"):
        held_out(rows[:2], SplitConfig(evaluation_fraction=1e-9))


def test_every_kind_of_example_has_a_prompt_and_a_content() -> None:
    """Another id changes neither, another answer the content alone, another question both."""
    user, one, two = Message("user", "q"), (Message("assistant", "1"),), (Message("assistant", "2"),)

    def kinds(sample_id: str, question: str, answer: str) -> list[Example]:
        said = Message("assistant", answer)
        asked = Message("user", question)
        return [
            talk(0, question, answer),
            Completion(sample_id, question, answer, "f"),
            PreferencePair(sample_id, (asked,), (said,), two, "f"),
            EventSequence(sample_id, question, (Event(answer, "play", 1),), "f"),
        ]

    for base, renamed, answered, asked in zip(
        kinds("a", "q", "1"), kinds("b", "q", "1"), kinds("a", "q", "3"), kinds("a", "p", "1"), strict=True
    ):
        assert content_digest(base) == content_digest(renamed) != content_digest(answered)
        assert prompt_digest(base) == prompt_digest(answered) != prompt_digest(asked)
    assert prompt_digest(Prompt("a", (user,), "f", "v", "1")) == prompt_digest(Prompt("b", (user,), "f", "v", "2"))
    assert one != two
    openings = [Conversation(name, (Message("assistant", name),), "f") for name in ("hello", "welcome")]
    assert prompt_digest(openings[0]) != prompt_digest(openings[1])


@pytest.mark.parametrize(
    ("question", "answer", "contaminated"),
    [
        (QUESTION, "Nine.", True),
        (QUESTION, "Another answer altogether.", True),
        (QUESTION.upper().replace(" ", "\n"), "9", True),
        (f"Please solve this. {QUESTION} Explain.", "9", True),
        ("Solve it.", f"The task was: {QUESTION}", True),
        (QUESTION.replace("now", "today"), "9", True),  # 8 of 9 sequences are there: 0.89
        (QUESTION.replace("them", "those"), "9", False),  # word 12 of 21 is in all 9 sequences
        (QUESTION[:60], "9", False),
        ("How many sheep are left?", "9", False),
        ("What is 2 + 2?", "4", True),
        ("What is 2 + 2? Think.", "4", False),
        ("What is 2 - 2?", "0", False),
        ("what is 2+2", "0", True),
    ],
)
def test_a_row_that_holds_an_evaluation_question_is_found(question: str, answer: str, contaminated: bool) -> None:
    """Whatever the case, the white space, the answer and what stands around; a short question only as a whole message."""
    evaluation = [talk(0, QUESTION), talk(1, "What is 2 + 2?", "4")]
    choice = find_contaminated([talk(7, question, answer)], evaluation, ContaminationConfig())
    assert choice.kept.tolist() == [not contaminated]
    assert choice.to_json() == {"contaminated": {"rows": int(contaminated), "first_ids": ["r7"] * contaminated}}


def test_a_common_system_message_is_no_contamination() -> None:
    system = "You are a careful assistant that thinks step by step and gives the final answer in a box at the end."
    evaluation = [talk(0, QUESTION, system=system)]
    assert find_contaminated([talk(1, "Name a colour.", system=system)], evaluation, ContaminationConfig()).kept.all()


@settings(max_examples=8, deadline=None)
@given(st.lists(st.booleans(), min_size=30, max_size=30), st.integers(1, 4))
def test_a_subset_holds_the_kept_rows_and_their_splits(flags: list[bool], num_files: int) -> None:
    """[I8] Rows, order, splits and counts; with none kept it is refused."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "raw").mkdir()
        rows = [
            {"id": f"r{n}", "messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}
            for n in range(30)
        ]
        for number in range(num_files):
            lines = [json.dumps(row) for row in rows[number::num_files]]
            (root / "raw" / f"{number}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        with stage_artifact(root / "all", "dataset") as staged:
            ingest_dataset(root / "raw", staged)
        kept = np.array(flags)
        if not kept.any():
            with pytest.raises(DataError, match="none of its 30 rows"), stage_artifact(root / "some", "dataset") as staged:
                write_subset(root / "all", kept, staged)
            return
        with stage_artifact(root / "some", "dataset") as staged:
            write_subset(root / "all", kept, staged)
        whole, some = ExampleTable.open(root / "all", Conversation), ExampleTable.open(root / "some", Conversation)
        assert [some[index] for index in range(len(some))] == [whole[index] for index in np.flatnonzero(kept).tolist()]
        assert [split.name for split in some.splits] == [split.name for split in whole.splits]
        for before, after in zip(range(len(whole.splits)), range(len(some.splits))):
            start = whole.splits[before].start
            expected = [row for number, row in enumerate(whole.read(before), start) if kept[number]]
            assert list(some.read(after)) == expected
        counts = read_manifest(root / "some").counts
        assert counts["rows_seen"] == 30 and counts["rows_kept"] == len(some) == counts["assistant_messages"]
        assert counts["rows_kept"] + counts["rows_dropped"] == 30 and counts["messages"] == 2 * len(some)


def test_cleaning_twice_drops_nothing_more() -> None:
    rng = random.Random(1)
    rows = [talk(number, f"q{rng.randrange(20)} " + "same words here " * rng.randrange(5)) for number in range(200)]
    first = find_duplicates(rows, iter(rows), CleanConfig())
    kept = [row for row, stays in zip(rows, first.kept) if stays]
    assert 0 < len(kept) < 200
    assert find_duplicates(kept, iter(kept), CleanConfig()).kept.all()

"""Laws of compact ids: nothing is lost, the order of ranks doesn't show, and a step of thousands takes few characters."""

import json
import random
from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib.core.manifest import canonical_json
from lib.train.compact_ids import compact_ids, expand_ids

IDS = st.one_of(
    st.builds(
        lambda stem, number: f"{stem}{number}", st.sampled_from(["", "row-", "a/b.jsonl:", "x0", "é"]), st.integers(0, 40)
    ),
    st.builds(lambda number: f"{number:05d}", st.integers(0, 10**6)),
    st.integers(10**16, 10**22).map(str),
    st.text(max_size=6),
)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(IDS, max_size=40), seed=st.integers(0, 9))
@example(ids=["5", "5", "6", "007", "7", "07", "0", "00", "", "\u0663", "5\n"], seed=0)
def test_the_ids_come_back(ids: list[str], seed: int) -> None:
    """Each as often as it was there, through a line of JSON; the same text for any order; and no longer than the list but for
    the names of the two kinds, and a character where ids are two bare numbers."""
    found = compact_ids(ids)
    assert Counter(expand_ids(json.loads(canonical_json(found)))) == Counter(ids)
    shuffled = random.Random(seed).sample(ids, len(ids))
    assert compact_ids(shuffled) == found
    assert len(canonical_json(found)) <= len(canonical_json(ids)) + len('{"named":,"numbered":{}}') + 1


def test_neighbours_are_one_run() -> None:
    """118, two on and the four that follow, forty on; ids that no number ends stand as they are."""
    ids = [*(f"data/rows.jsonl:{number}" for number in (164, 118, 120, 121, 122, 123, 124)), "intro", "a3f0"]
    assert compact_ids(ids) == {"numbered": {"data/rows.jsonl:": "118,2+4,40"}, "named": ["a3f0", "intro"]}
    assert expand_ids(compact_ids(["row-10", "row-9", "row-9"])) == ["row-9", "row-9", "row-10"]


def test_a_step_of_thousands_of_rows_takes_few_characters() -> None:
    """4096 rows of 65,536 that are shuffled together, named by file and line: a twelfth of the list. In the order of the file,
    one run. Ids that are random take what the list takes."""
    rng, name = random.Random(0), "data/part-00012.jsonl:{}"
    ids = [name.format(number) for number in rng.sample(range(500_000, 565_536), 4096)]
    assert len(canonical_json(compact_ids(ids))) <= len(canonical_json(ids)) / 11
    ids = [name.format(number) for number in range(500_000, 504_096)]
    assert len(canonical_json(compact_ids(ids))) < 80
    ids = [f"{rng.getrandbits(128):032x}" for _ in range(4096)]
    assert len(canonical_json(compact_ids(ids))) <= 1.001 * len(canonical_json(ids))

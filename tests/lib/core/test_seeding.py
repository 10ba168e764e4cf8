"""Seeds are functions of their names, equal in every process, unequal for unequal names."""

import random
import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lib.core.seeding import derive_seed, permutation, seed_process

PARTS = st.lists(st.integers(-(2**63), 2**63) | st.text(max_size=6).filter(lambda text: "\x1f" not in text), max_size=4)


@given(PARTS, PARTS)
def test_other_parts_give_another_seed(one: list[int | str], two: list[int | str]) -> None:
    """[A14] 1 and -1 differ, and so do 1 and "1", (1, 2) and (12,)."""
    assert (derive_seed(*one) == derive_seed(*two)) == (one == two)


def test_every_process_derives_the_same_seed() -> None:
    """Python's own hash of a string differs between processes; this must not."""
    code = "from lib.core.seeding import derive_seed; print(derive_seed('shuffle', 3, 'stream'))"
    seeds = {subprocess.check_output([sys.executable, "-c", code], env={"PYTHONHASHSEED": str(n)}) for n in range(2)}
    assert seeds == {f"{derive_seed('shuffle', 3, 'stream')}\n".encode()}


@given(st.integers(0, 300), st.integers(0, 5))
def test_a_permutation_visits_each_item_once(num_items: int, epoch: int) -> None:
    assert sorted(permutation(num_items, "stream", epoch)) == list(range(num_items))


def test_a_process_is_seeded_whole() -> None:
    draws = []
    for _ in range(2):
        seed_process("test", 1)
        draws.append((random.random(), float(np.random.rand())))
    assert draws[0] == draws[1]

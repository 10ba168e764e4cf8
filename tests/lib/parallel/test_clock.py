"""Laws of the step clock: parts never overlap, and never add up to more than there was."""

import time

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.parallel.clock import PARTS, StepClock

nested = st.recursive(st.just([]), lambda inner: st.lists(st.tuples(st.sampled_from(PARTS), inner), max_size=3), max_leaves=12)


def _enter(clock: StepClock, blocks: list[tuple[str, list[object]]]) -> None:
    for name, inner in blocks:
        with clock.part(name):  # type: ignore[arg-type]
            _enter(clock, inner)  # type: ignore[arg-type]


@settings(max_examples=50)
@given(nested)
def test_parts_add_up_to_at_most_the_whole(blocks: list[tuple[str, list[object]]]) -> None:
    """However they are nested: what an inner part takes is not counted in the outer one again."""
    clock = StepClock()
    _enter(clock, blocks)
    parts, seconds = clock.take()
    assert set(parts) == set(PARTS) and min(parts.values()) >= 0.0
    assert sum(parts.values()) <= seconds


def test_an_inner_part_is_taken_out_of_the_outer_one_and_a_wait_is_one_whole() -> None:
    """A sleep of 20 ms in a collective within forward is the collective's; the same within a wait is the wait's."""
    clock = StepClock()
    with clock.part("forward"), clock.part("collective"):
        time.sleep(0.02)
    parts, _ = clock.take()
    assert parts["collective"] >= 0.02 > parts["forward"]
    with clock.part("wait"), clock.part("collective"):
        time.sleep(0.02)
    parts, seconds = clock.take()
    assert parts["wait"] >= 0.02 and parts["collective"] == 0.0 and seconds >= 0.02


def test_a_failed_part_is_left() -> None:
    clock = StepClock()
    try:
        with clock.part("backward"):
            raise ValueError
    except ValueError:
        pass
    with clock.part("save"):
        time.sleep(0.005)
    parts, _ = clock.take()
    assert parts["save"] >= 0.005 > parts["backward"]


def test_each_interval_is_counted_once() -> None:
    clock = StepClock()
    clock.start(torch.device("cpu"))
    with clock.part("data"):
        time.sleep(0.002)
    assert clock.take()[0]["data"] > 0.0
    assert clock.take()[0]["data"] == 0.0

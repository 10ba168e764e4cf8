"""Accumulation, ranks, micro-batches, packing and loss chunks never change loss or gradients: any cut of a step is one step.

`python -m tests.campaigns invariance` tries many more cuts.
"""

from dataclasses import asdict, replace

import pytest

from tests.lib.parallel.ranks import run_here, run_ranks
from tests.numerics.invariance import NAMED_CASES, RAGGED, Case, broken_limits, check_cases, random_case

RANDOM_CASES = {1: range(6), 2: range(6, 11), 4: range(11, 16)}
"""Number of ranks -> numbers of the random cases tried here."""


def _broken(cases: dict[str, Case], num_ranks: int) -> dict[str, list[str]]:
    values = [asdict(case) for case in cases.values()]
    found = run_here(check_cases, values) if num_ranks == 1 else run_ranks(check_cases, num_ranks, values)[0]
    problems = {name: broken_limits(case, result) for (name, case), result in zip(cases.items(), found, strict=True)}
    return {name: broken for name, broken in problems.items() if broken}


@pytest.mark.numerics
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_any_cut_of_a_step_is_one_step(num_ranks: int) -> None:
    """[C1, C2, C4, C10, B7, B9] What a step reports is what one process computes over all documents: loss and accuracy to
    1e-6, gradients and their norm to 1e-5 in float32 and 1e-10 in float64; on ranks with as few as 10 of 1,000 targets, with
    no targets, and with no documents at all. What MFU is made of, documents and pairs of tokens, is counted once."""
    cases = {str(random_case(number)): random_case(number) for number in RANDOM_CASES[num_ranks]}
    named = {1: {}, 2: {"ragged": RAGGED}, 4: NAMED_CASES}
    assert _broken(cases | named[num_ranks], num_ranks) == {}


def test_a_figure_beyond_its_limit_is_named() -> None:
    """Loss, gradient and count, and anything but zero where nothing is trained; a NaN is beyond every limit."""
    right = dict.fromkeys(("loss", "loss_itself", "gradient", "greatest_gradient", "norm", "accuracy"), 0.0)
    right |= dict.fromkeys(("num_targets", "expected_targets", "num_tokens"), 0)
    case = random_case(0)
    assert broken_limits(case, right) == []
    wrong = [{"loss": 2e-6}, {"gradient": float("nan")}, {"norm": 1e-4}, {"accuracy": 1e-5}, {"num_tokens": 1}]
    for change in (*wrong, {"num_targets": 1}, {"greatest_gradient": 1e-9}):
        assert len(broken_limits(case, right | change)) == 1
    assert broken_limits(replace(case, dtype="float32"), right | {"gradient": 1e-6}) == []
    assert len(broken_limits(replace(case, dtype="float64"), right | {"gradient": 1e-6})) == 1

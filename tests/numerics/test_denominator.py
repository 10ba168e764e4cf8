"""One denominator: accumulation and packing never change loss or gradients; ranks neither, see test_invariance.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lib.data.batch import PackedRow
from lib.models.flops import FlopCounter
from lib.train.step import NextToken, count_step
from tests.numerics.rows import TARGETS, accumulated, gradients, loss_module, micro_batches, packed_rows

NUM_TARGETS = sum(TARGETS) + sum(1 for number, targets in enumerate(TARGETS) if number % 2 and targets < 50)
"""A row's first document, and in every other short row a second one of two tokens with one target."""

Result = tuple[float, int, dict[str, torch.Tensor]]


def _single(rows: list[PackedRow], size: int, dtype: torch.dtype = torch.float32) -> Result:
    module = loss_module(dtype)
    micro = micro_batches(rows, size)
    sums = accumulated(module, micro, NUM_TARGETS)
    return sums["loss"], int(sums["num_correct"]), gradients(module)


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float) -> None:
    """Relative to the greatest entry of each gradient."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= limit * gradient.abs().max(), name


@pytest.fixture(scope="module")
def one_batch() -> Result:
    return _single(packed_rows(), 8)


def test_the_count_is_of_all_rows() -> None:
    assert sum(micro.batch.num_targets for micro in micro_batches(packed_rows(), 3)) == NUM_TARGETS


@pytest.mark.numerics
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_accumulation_is_the_big_batch(one_batch: Result, size: int) -> None:
    """[C1] 8 rows as 8 x 1, 4 x 2, 3 + 3 + 2 and 2 x 4 with 1 to 60 targets a row: loss to 1e-6, gradients to 1e-5."""
    total, correct, grads = _single(packed_rows(), size)
    assert total / NUM_TARGETS == pytest.approx(one_batch[0] / NUM_TARGETS, abs=1e-6)
    assert correct == one_batch[1]
    _assert_same(grads, one_batch[2], 1e-5)


@pytest.mark.numerics
def test_no_micro_batch_is_thrown_away() -> None:
    """[C3] In float64 the gradient is, to the last bit, the sum of the gradients of the micro-batches in their order."""
    rows = packed_rows()
    accumulated = _single(rows, 2, torch.float64)[2]
    added: dict[str, torch.Tensor] = {}
    for start in range(0, len(rows), 2):
        for name, gradient in _single(rows[start : start + 2], 2, torch.float64)[2].items():
            added[name] = added[name] + gradient if name in added else gradient
    for name, gradient in added.items():
        assert torch.equal(accumulated[name], gradient), name


@pytest.mark.numerics
def test_packed_is_unpacked(one_batch: Result) -> None:
    """[B7] Each document alone in a row: the same loss to 1e-6 a target, the same gradients to 1e-5."""
    alone = [PackedRow((document,)) for row in packed_rows() for document in row.documents]
    total, correct, grads = _single(alone, 1)
    assert total / NUM_TARGETS == pytest.approx(one_batch[0] / NUM_TARGETS, abs=1e-6)
    assert correct == one_batch[1]
    _assert_same(grads, one_batch[2], 1e-5)


def test_a_step_without_targets_is_exactly_zero() -> None:
    """[C4] All labels ignored: loss 0, every gradient exists and is 0."""
    module = loss_module()
    (micro,) = micro_batches(packed_rows()[:2], 2)
    micro.batch.labels.fill_(-100)
    assert accumulated(module, [micro], 0.0) == {"loss": 0.0, "num_correct": 0}
    assert not any(gradient.any() for gradient in gradients(module).values())


@pytest.mark.numerics
def test_a_weight_of_two_is_the_row_given_twice() -> None:
    """Rows of which every second one weighs 2 train as the same rows with every second one there twice, all of weight 1:
    the same loss and gradients once each is divided by its own sum of weights. In float64, to rounding."""
    rows = packed_rows()
    weighted = [_weighted(row, 2.0 if number % 2 else 1.0) for number, row in enumerate(rows)]
    repeated = [row for number, row in enumerate(rows) for _ in range(2 if number % 2 else 1)]
    results = []
    for given in (weighted, repeated):
        module = loss_module(torch.float64)
        micro = micro_batches(given, 3)
        counts = count_step(micro, NextToken(), FlopCounter(module.decoder.spec), part_written=False)
        total = accumulated(module, micro, counts.divisors["loss"])["loss"]
        results.append((counts.divisors["loss"], total, gradients(module)))
    (count, loss, grads), (expected_count, expected_loss, expected_grads) = results
    assert count == expected_count
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    _assert_same(grads, expected_grads, 1e-10)


def _weighted(row: PackedRow, weight: float) -> PackedRow:
    return PackedRow(
        tuple(
            replace(document, weights=np.where(document.loss_mask, weight, 0.0).astype(np.float32))
            for document in row.documents
        )
    )

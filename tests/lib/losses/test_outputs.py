"""Laws of the losses of numbers and labels: the plain definition, over the kept targets alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.core.examples import IGNORE_INDEX
from lib.losses.outputs import class_cross_entropy_sum, logistic_sum, squared_error_sum


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(0, 12))
def test_sums_are_their_definitions_and_what_is_left_out_is_never_read(seed: int, size: int) -> None:
    """Every term written out in float64; outputs, targets and labels without a factor are NaN or out of range."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(size, generator=generator, dtype=torch.float64)
    targets = torch.rand(size, generator=generator, dtype=torch.float64)
    factors = torch.rand(size, generator=generator, dtype=torch.float64) * (torch.rand(size, generator=generator) < 0.6)
    logits, labels = (
        torch.randn(size, 4, generator=generator, dtype=torch.float64),
        torch.randint(4, (size,), generator=generator),
    )
    left_out = factors == 0
    terms = [
        (float(f), float(x), float(y), row, int(c))
        for f, x, y, row, c in zip(factors, outputs, targets, logits, labels)
        if f > 0
    ]
    squared = sum(f * (x - y) ** 2 for f, x, y, _, _ in terms)
    logistic = sum(-f * (y * _log_sigmoid(x) + (1 - y) * _log_sigmoid(-x)) for f, x, y, _, _ in terms)
    classes = sum(f * float(row.exp().sum().log() - row[c]) for f, _, _, row, c in terms)
    outputs[left_out] = targets[left_out] = float("nan")
    logits[left_out], labels[left_out] = float("nan"), 9
    for loss, expected in (
        (squared_error_sum(outputs, targets, factors), squared),
        (logistic_sum(outputs, targets, factors), logistic),
        (class_cross_entropy_sum(logits, labels, factors), classes),
    ):
        assert loss.num_tokens == len(terms)
        assert float(loss.total) == pytest.approx(expected, abs=1e-12)


def _log_sigmoid(x: float) -> float:
    return float(torch.nn.functional.logsigmoid(torch.tensor(x, dtype=torch.float64)))


def test_nothing_to_train_is_zero_with_zero_gradients() -> None:
    """A rank may have no target of a head; its gradients must be there for the others to add to."""
    scores, logits = torch.randn(3, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    nothing = torch.zeros(3)
    losses = [
        squared_error_sum(scores, nothing, nothing),
        logistic_sum(scores, nothing, nothing),
        class_cross_entropy_sum(logits, torch.full((3,), IGNORE_INDEX), torch.ones(3)),
    ]
    torch.stack([loss.total for loss in losses]).sum().backward()
    assert all(float(loss.total) == 0.0 and loss.num_tokens == 0 for loss in losses)
    assert scores.grad is not None and logits.grad is not None
    assert not scores.grad.any() and not logits.grad.any()


def test_right_answers_are_counted() -> None:
    """Sides of zero: right, wrong, right. Greatest logits: right, wrong, left out."""
    ones = torch.ones(3)
    loss = logistic_sum(torch.tensor([2.0, 1.0, -1.0]), torch.tensor([1.0, 0.0, 0.2]), ones)
    assert int(loss.metrics["num_correct"]) == 2
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss = class_cross_entropy_sum(logits, torch.tensor([0, 1, IGNORE_INDEX]), ones)
    assert int(loss.metrics["num_correct"]) == 1


def test_bfloat16_outputs_are_summed_in_float32() -> None:
    outputs = torch.randn(64).bfloat16()
    found = squared_error_sum(outputs, torch.zeros(64), torch.ones(64)).total
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(outputs.double().square().sum()), rel=1e-6)


def test_targets_that_do_not_fit_are_refused() -> None:
    ones = torch.ones(2)
    with pytest.raises(ValueError, match="shapes differ"):
        squared_error_sum(ones, torch.ones(3), ones)
    with pytest.raises(ValueError, match=r"span 0\.5\.\.1\.5"):
        logistic_sum(ones, torch.tensor([0.5, 1.5]), ones)
    with pytest.raises(ValueError, match="there are 2 classes"):
        class_cross_entropy_sum(torch.ones(2, 2), torch.tensor([0, 2]), ones)
    with pytest.raises(ValueError, match="shapes don't fit"):
        class_cross_entropy_sum(torch.ones(2, 2), torch.tensor([0, 1, 1]), ones)

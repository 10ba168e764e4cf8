"""Laws of the chunked cross-entropy: it is the plain one, at a fraction of the memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.core.examples import IGNORE_INDEX
from lib.losses.cross_entropy import cross_entropy_sum, token_logprobs

pytestmark = pytest.mark.usefixtures("new_memory_is_nan")

T, D, V = 23, 16, 101
LIMITS = {torch.float32: 1e-6, torch.float64: 1e-12}


def _inputs(dtype: torch.dtype, *, kept: float = 0.6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(V, D, generator=generator, dtype=torch.float64) / D**0.5).to(dtype)
    labels = torch.randint(V, (T,), generator=generator)
    labels[torch.rand(T, generator=generator) >= kept] = IGNORE_INDEX
    return hidden, weight, labels


def _close(found: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """Absolute, relative to the greatest entry (1 at least)."""
    assert (found.double() - expected.double()).abs().max() <= limit * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("chunk", [1, 7, T, T + 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_loss_and_all_gradients_are_those_of_the_plain_loss(
    dtype: torch.dtype, chunk: int, tied: bool, softcap: float | None
) -> None:
    """[C6] With an upstream factor, and with the weight used as the embedding too (tied) or not; logits capped or not."""
    _, weight, labels = _inputs(dtype)
    token_ids = torch.randint(V, (T,), generator=torch.Generator().manual_seed(3))
    mixer = torch.eye(D, dtype=dtype) * 0.7

    def run(chunked: bool) -> tuple[torch.Tensor, ...]:
        head = weight.clone().requires_grad_()
        embedding = head if tied else weight.flip(0).clone().requires_grad_()
        mix = mixer.clone().requires_grad_()
        hidden = torch.tanh(embedding[token_ids] @ mix)
        if chunked:
            total = cross_entropy_sum(hidden, head, labels, chunk, softcap=softcap).total
        else:
            logits = hidden @ head.T
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
        (total * 0.37).backward()
        return (total.detach(), *(leaf.grad for leaf in (head, embedding, mix) if leaf.grad is not None))

    for found, expected in zip(run(chunked=True), run(chunked=False), strict=True):
        _close(found, expected, LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("chunk", [1, 7, T + 1])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("frozen", [True, False])
def test_an_adapter_of_the_head_adds_to_the_logits(dtype: torch.dtype, chunk: int, softcap: float | None, frozen: bool) -> None:
    """[C6] Loss, log-probabilities and gradients are those of hidden @ (W + B A).T; a frozen W gets none."""
    hidden, weight, labels = _inputs(dtype)
    generator = torch.Generator().manual_seed(6)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3 for shape in ((3, D), (V, 3)))

    def run(chunked: bool) -> tuple[torch.Tensor, ...]:
        leaf, low, out = (tensor.clone().requires_grad_() for tensor in (hidden, a, b))
        head = weight.clone().requires_grad_(not frozen)
        if chunked:
            adapter = (leaf @ low.T, out)
            total = cross_entropy_sum(leaf, head, labels, chunk, softcap=softcap, adapter=adapter).total
            logprobs = token_logprobs(leaf, head, labels, chunk, softcap=softcap, adapter=adapter)
        else:
            logits = leaf @ (head + out @ low).T
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            kept = labels != IGNORE_INDEX
            logprobs = torch.log_softmax(logits, -1)[kept].gather(-1, labels[kept, None])[:, 0]
            total = -logprobs.sum()
        (total * 0.37).backward()
        assert (head.grad is None) == frozen
        leaves = (leaf, low, out, *([] if frozen else [head]))
        return (total.detach(), logprobs.detach(), *(tensor.grad for tensor in leaves if tensor.grad is not None))

    for found, expected in zip(run(chunked=True), run(chunked=False), strict=True):
        _close(found, expected, LIMITS[dtype])


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_each_position_counts_by_its_factor(dtype: torch.dtype, softcap: float | None) -> None:
    """[C6] Loss and gradients are those of sum f * ce written out; a NaN factor where there is no label is never read."""
    hidden, weight, labels = _inputs(dtype)
    factors = torch.rand(T, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    kept = labels != IGNORE_INDEX

    def run(chunked: bool) -> tuple[torch.Tensor, ...]:
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            given = torch.where(kept, factors, float("nan"))
            total = cross_entropy_sum(leaf, head, labels, 3, softcap=softcap, factors=given).total
        else:
            logits = leaf[kept] @ head.T
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            total = (factors[kept] * torch.nn.functional.cross_entropy(logits, labels[kept], reduction="none")).sum()
        total.backward()
        assert leaf.grad is not None and head.grad is not None
        return total.detach(), leaf.grad, head.grad

    for found, expected in zip(run(chunked=True), run(chunked=False), strict=True):
        _close(found, expected, LIMITS[dtype])


@settings(max_examples=25, deadline=None)
@given(chunk=st.integers(1, 40), kept=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
def test_chunks_change_nothing(chunk: int, kept: float, seed: int) -> None:
    hidden, weight, labels = _inputs(torch.float64, kept=kept, seed=seed)
    whole, pieces = (cross_entropy_sum(hidden, weight, labels, size) for size in (1000, chunk))
    assert whole.num_tokens == pieces.num_tokens == int((labels != IGNORE_INDEX).sum())
    assert whole.metrics["num_correct"] == pieces.metrics["num_correct"]
    _close(pieces.total, whole.total, 1e-12)


def test_no_target_gives_zero_and_zero_gradients() -> None:
    """[C4] And the gradients exist, so that a sharded model's hooks still fire."""
    hidden, weight, labels = _inputs(torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = cross_entropy_sum(hidden, weight, torch.full_like(labels, IGNORE_INDEX), 4)
    loss.total.backward()
    assert loss.total.item() == 0.0 and loss.num_tokens == 0
    for leaf in (hidden, weight):
        assert leaf.grad is not None and not leaf.grad.any()


def test_what_is_not_trained_never_reaches_loss_or_gradient() -> None:
    """[C4] NaN and inf are planted on every position without a target."""
    hidden, weight, labels = _inputs(torch.float32)
    planted = hidden.clone()
    planted[labels == IGNORE_INDEX] = float("nan")
    planted[(labels == IGNORE_INDEX).nonzero()[0]] = float("inf")
    results = []
    for values in (hidden, planted):
        leaf, head = values.clone().requires_grad_(), weight.clone().requires_grad_()
        total = cross_entropy_sum(leaf, head, labels, 5).total
        total.backward()
        results.append((total, leaf.grad, head.grad))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_bfloat16_inputs_have_float32_statistics_and_accumulator() -> None:
    """Against float32 arithmetic on the same rounded logits the loss is exact to 1e-6; the gradients to bf16's rounding.

    The weight's gradient is summed over chunks in float32: one token a chunk is as good as one chunk.
    """
    hidden, weight, labels = _inputs(torch.bfloat16, kept=1.0)
    logits = (hidden @ weight.T).float()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    exact = torch.softmax(logits, -1)
    exact[torch.arange(T), labels] -= 1
    for chunk in (1, T):
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total = cross_entropy_sum(leaf, head, labels, chunk).total
        assert total.dtype == torch.float32
        total.backward()
        _close(total.detach(), expected, 1e-6)
        assert head.grad is not None and leaf.grad is not None
        _close(head.grad.float(), exact.T @ hidden.float(), 2e-2)
        _close(leaf.grad.float(), exact @ weight.float(), 2e-2)


def test_extreme_logits_stay_finite() -> None:
    """Logits of +-1e4: the greatest is subtracted first. Row 0 is right (loss 0), row 1 is wrong by 2e4."""
    hidden = torch.tensor([[1e4, -1e4], [1e4, -1e4]], requires_grad=True)
    loss = cross_entropy_sum(hidden, torch.eye(2), torch.tensor([0, 1]), 8)
    loss.total.backward()
    assert loss.total.item() == 2e4 and loss.metrics["num_correct"].item() == 1
    assert hidden.grad is not None and torch.equal(hidden.grad, torch.tensor([[0.0, 0.0], [1.0, -1.0]]))


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_token_logprobs_are_the_plain_ones_in_order(chunk: int) -> None:
    hidden, weight, labels = _inputs(torch.float64)
    kept = labels != IGNORE_INDEX
    expected = torch.log_softmax(hidden @ weight.T, -1)[kept].gather(-1, labels[kept][:, None]).squeeze(-1)
    found = token_logprobs(hidden.reshape(1, T, D), weight, labels.reshape(1, T), chunk)
    _close(found, expected, 1e-12)
    assert not found.requires_grad
    _close(-found.sum(), cross_entropy_sum(hidden, weight, labels, chunk).total, 1e-12)


def test_inputs_that_do_not_fit_are_refused() -> None:
    hidden, weight, labels = _inputs(torch.float32, kept=1.0)
    with pytest.raises(ValueError, match="vocabulary is 101"):
        cross_entropy_sum(hidden, weight, labels + V, 4)
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        cross_entropy_sum(hidden, weight, labels, 0)
    with pytest.raises(ValueError, match="don't fit"):
        cross_entropy_sum(hidden, weight, labels[:-1], 4)


def test_a_second_backward_is_refused() -> None:
    hidden, weight, labels = _inputs(torch.float32)
    total = cross_entropy_sum(hidden.requires_grad_(), weight, labels, 4).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        total.backward()

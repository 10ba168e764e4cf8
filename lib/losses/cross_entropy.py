"""Cross-entropy of a language-model head that never holds more than a chunk of logits.

Three things make it small and fast. Positions without a target are dropped before the projection. The rest is projected
a chunk of tokens at a time. And the gradients are computed in the forward pass, while a chunk's logits exist, so that
nothing is kept and nothing is projected twice; the backward pass only scales them.

Letters: N trained tokens, D model, V vocabulary, R rows of the head (V and padding), C tokens of a chunk, L rank of an
adapter. The softmax runs over a few tokens at a time, so that its four passes over them stay in the processor's cache.
Statistics and the weight's gradient are float32 whatever the dtype of the inputs (float64 for float64 inputs).
"""

from typing import Any

import torch

from lib.core.examples import IGNORE_INDEX
from lib.losses.types import LossSum
from lib.losses.vocabulary_part import VocabularyPart, tokens_at_once

Adapter = tuple[torch.Tensor, torch.Tensor]
"""(x [..., L], weight [R, L]) of a head's low-rank adapter, for the same positions as the hidden states."""
_VOCAB_TILE = 1 << 14
"""Vocabulary rows of a low-precision gradient product; bounds the temporary that is added to the accumulator."""


def cross_entropy_sum(
    hidden: torch.Tensor,
    head_weight_RD: torch.Tensor,
    labels: torch.Tensor,
    chunk_tokens: int,
    *,
    vocab_size: int | VocabularyPart | None = None,
    softcap: float | None = None,
    factors: torch.Tensor | None = None,
    adapter: Adapter | None = None,
) -> LossSum:
    """Sum of `-log softmax(hidden @ head_weight.T)[label]` over the positions that have a label.

    The softmax is over the first vocab_size rows of the head (all by default): the others have no probability and their
    gradient is exactly zero.

    With a softcap the logits are `softcap * tanh(hidden @ head_weight.T / softcap)`; with factors each position's loss is
    multiplied by its own before the sum. An adapter (x, weight) adds x @ weight.T to the logits before all that.

    With a VocabularyPart for vocab_size, head_weight_RD and the adapter's weight are its rows of a head that several
    processes hold together. The loss is that of the whole head. The gradients of these rows are whole, those of hidden and
    the adapter's x are addends: their sum over the parts is the gradient.

    Shapes: hidden [..., D]; head_weight_RD [R, D], of the same dtype; labels [...] int64, IGNORE_INDEX where no loss;
        factors [...] float32, read only where there is a label; adapter ([..., L], [R, L]).
    Returns: total, count, and `num_correct` (targets that have the greatest logit). The result can be differentiated
        once with respect to hidden, head_weight_RD and the adapter. What needs no gradient costs none.
    Raises:
        ValueError: a label is outside [0, V), or shapes or chunk_tokens don't fit.
    """
    vocab_size = head_weight_RD.shape[0] if vocab_size is None else vocab_size
    hidden_ND, labels_N, kept_N = _trained(hidden, head_weight_RD, labels, chunk_tokens, vocab_size)
    if factors is not None and factors.shape != labels.shape:
        raise ValueError(f"factors have shape {list(factors.shape)}, labels {list(labels.shape)}")
    factors_N = None if factors is None else factors.reshape(-1)[kept_N]
    low_NL, low_weight_RL = _selected(adapter, kept_N)
    options = (chunk_tokens, vocab_size, softcap)
    inputs = (hidden_ND, head_weight_RD, low_NL, low_weight_RL, labels_N, factors_N, options)
    total, num_correct = _ChunkedCrossEntropy.apply(*inputs)  # type: ignore[no-untyped-call]
    return LossSum(total=total, num_tokens=labels_N.numel(), metrics={"num_correct": num_correct})


@torch.no_grad()
def token_logprobs(
    hidden: torch.Tensor,
    head_weight_RD: torch.Tensor,
    labels: torch.Tensor,
    chunk_tokens: int,
    *,
    vocab_size: int | None = None,
    softcap: float | None = None,
    adapter: Adapter | None = None,
) -> torch.Tensor:
    """[N] log-probabilities of the labels that are not IGNORE_INDEX, in order, without gradients.

    Shapes, vocab_size, softcap, adapter and errors as in `cross_entropy_sum`.
    """
    vocab_size = head_weight_RD.shape[0] if vocab_size is None else vocab_size
    hidden_ND, labels_N, kept_N = _trained(hidden, head_weight_RD, labels, chunk_tokens, vocab_size)
    low_NL, low_weight_RL = _selected(adapter, kept_N)
    pieces = [torch.zeros(0, dtype=_statistics_dtype(hidden.dtype), device=hidden.device)]
    for start in range(0, labels_N.numel(), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits_CR = _logits(part, hidden_ND, head_weight_RD, low_NL, low_weight_RL)
        logits_CV = _capped(logits_CR[:, :vocab_size], softcap)
        nll_C, _ = _softmax_minus_one_hot(logits_CV, labels_N[part], want_grad=False)
        pieces.append(-nll_C)
    return torch.cat(pieces)


def _trained(
    hidden: torch.Tensor,
    head_weight_RD: torch.Tensor,
    labels: torch.Tensor,
    chunk_tokens: int,
    vocabulary: int | VocabularyPart,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The positions that have a label: hidden [N, D], labels [N], and where they are among the flattened, [N].

    Selected, so that a NaN elsewhere can't get in.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != head_weight_RD.shape[1]:
        shapes = [list(tensor.shape) for tensor in (hidden, head_weight_RD, labels)]
        raise ValueError(f"shapes of hidden, weight and labels don't fit: {shapes}")
    if isinstance(vocabulary, VocabularyPart):
        vocab_size, num_rows = vocabulary.vocab_size, head_weight_RD.shape[0] * vocabulary.num_parts
    else:
        vocab_size, num_rows = vocabulary, head_weight_RD.shape[0]
    if not 0 < vocab_size <= num_rows:
        raise ValueError(f"vocab_size is {vocab_size}, the head has {num_rows} rows")
    labels_T = labels.reshape(-1)
    kept_N = (labels_T != IGNORE_INDEX).nonzero().squeeze(-1)
    labels_N = labels_T[kept_N]
    if labels_N.numel() and (int(labels_N.min()) < 0 or int(labels_N.max()) >= vocab_size):
        span = f"{int(labels_N.min())}..{int(labels_N.max())}"
        raise ValueError(f"labels span {span}, the vocabulary is {vocab_size}")
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, kept_N), labels_N, kept_N


def _selected(adapter: Adapter | None, kept_N: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if adapter is None:
        return None, None
    low, weight_RL = adapter
    return low.reshape(-1, low.shape[-1]).index_select(0, kept_N), weight_RL


def _logits(
    part: slice,
    hidden_ND: torch.Tensor,
    weight_RD: torch.Tensor,
    low_NL: torch.Tensor | None,
    low_weight_RL: torch.Tensor | None,
) -> torch.Tensor:
    logits_CR = hidden_ND[part] @ weight_RD.T
    if low_NL is not None and low_weight_RL is not None:
        logits_CR += low_NL[part] @ low_weight_RL.T
    return logits_CR


def _capped(logits_CV: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """In place."""
    return logits_CV if softcap is None else logits_CV.div_(softcap).tanh_().mul_(softcap)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _softmax_minus_one_hot(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, *, want_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood [C] and whether the label has the greatest logit [C].

    Overwrites logits_CV: with the gradient of the negative log-likelihood with respect to it if `want_grad`.
    """
    dtype = _statistics_dtype(logits_CV.dtype)
    num_tokens, rows = logits_CV.shape[0], tokens_at_once(logits_CV)
    nll_C = torch.empty(num_tokens, dtype=dtype, device=logits_CV.device)
    correct_C = torch.empty(num_tokens, dtype=torch.bool, device=logits_CV.device)
    for start in range(0, num_tokens, rows):
        part = slice(start, start + rows)
        label_R1 = labels_C[part, None]
        values_RV = logits_CV[part].to(dtype)
        greatest_R1 = values_RV.amax(-1, keepdim=True)
        target_R1 = values_RV.gather(-1, label_R1)
        exp_RV = values_RV.sub_(greatest_R1).exp_()
        sum_R1 = exp_RV.sum(-1, keepdim=True)
        nll_C[part] = (sum_R1.log() + greatest_R1 - target_R1).squeeze(-1)
        correct_C[part] = (target_R1 == greatest_R1).squeeze(-1)
        if want_grad:
            grad_RV = exp_RV.div_(sum_R1)
            grad_RV.scatter_add_(-1, label_R1, torch.full_like(sum_R1, -1.0))
            if logits_CV.dtype != dtype:
                logits_CV[part].copy_(grad_RV)
    return nll_C, correct_C


def _accumulate_weight_grad(
    grad_RD: torch.Tensor, grad_logits_CR: torch.Tensor, hidden_CD: torch.Tensor, *, first: bool
) -> None:
    """grad_RD += grad_logits_CR.T @ hidden_CD, with the sum over chunks in grad_RD's dtype; the first one begins it."""
    if grad_RD.dtype == hidden_CD.dtype:
        grad_RD.addmm_(grad_logits_CR.T, hidden_CD, beta=0 if first else 1)
        return
    for start in range(0, grad_RD.shape[0], _VOCAB_TILE):
        tile = slice(start, start + _VOCAB_TILE)
        product = grad_logits_CR[:, tile].T @ hidden_CD
        _ = grad_RD[tile].copy_(product) if first else grad_RD[tile].add_(product)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the negative log-likelihoods times their factors, with all gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_RD: torch.Tensor,
        low_NL: torch.Tensor | None,
        low_weight_RL: torch.Tensor | None,
        labels_N: torch.Tensor,
        factors_N: torch.Tensor | None,
        options: tuple[int, int | VocabularyPart, float | None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunk_tokens, vocabulary, softcap = options
        if isinstance(vocabulary, VocabularyPart):
            first_row, softmax = vocabulary.first_row(weight_RD.shape[0]), vocabulary.softmax_minus_one_hot
            vocab_size, labels_N = max(0, vocabulary.vocab_size - first_row), labels_N - first_row
        else:
            vocab_size, softmax = vocabulary, _softmax_minus_one_hot
        dtype = _statistics_dtype(hidden_ND.dtype)
        # (input, weight, gradient of the input, gradient of the weight) of each product that the logits are the sum of.
        products = [
            _with_gradients(x, weight, wanted, dtype)
            for x, weight, wanted in (
                (hidden_ND, weight_RD, ctx.needs_input_grad[:2]),
                (low_NL, low_weight_RL, ctx.needs_input_grad[2:4]),
            )
            if x is not None and weight is not None
        ]
        nll_N = torch.empty(labels_N.numel(), dtype=dtype, device=hidden_ND.device)
        num_correct = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
        for start in range(0, labels_N.numel(), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits_CR = _logits(part, hidden_ND, weight_RD, low_NL, low_weight_RL)
            logits_CV = _capped(logits_CR[:, :vocab_size], softcap)
            slope_CV = 1 - (logits_CV / softcap).square() if softcap is not None else None
            wanted = any(ctx.needs_input_grad[:4])
            nll_N[part], correct_C = softmax(logits_CV, labels_N[part], want_grad=wanted)
            num_correct += correct_C.sum()
            if slope_CV is not None:
                logits_CV.mul_(slope_CV)  # the derivative of cap * tanh(x / cap) is 1 - tanh(x / cap) ** 2
            if factors_N is not None:
                nll_N[part] *= factors_N[part]
                logits_CV.mul_(factors_N[part, None].to(logits_CV.dtype))
            logits_CR[:, vocab_size:] = 0.0  # padding was no part of the softmax
            for x, weight, grad_x, grad_weight in products:
                if grad_x is not None:
                    torch.mm(logits_CR, weight, out=grad_x[part])
                if grad_weight is not None:
                    _accumulate_weight_grad(grad_weight, logits_CR, x[part], first=start == 0)
        ctx.grads = [grad for product in products for grad in product[2:]] + [None] * (4 - 2 * len(products))
        ctx.mark_non_differentiable(num_correct)
        # Added up in float64, so that the sum doesn't depend on how many tokens come together.
        return nll_N.sum(dtype=torch.float64).to(dtype), num_correct

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("this loss can be differentiated only once: its gradients are made in the forward pass")
        grads, ctx.grads = ctx.grads, None
        for grad in grads:
            if grad is not None:
                grad.mul_(upstream[0].to(grad.dtype))
        return *grads, None, None, None


def _with_gradients(
    x: torch.Tensor, weight: torch.Tensor, wanted: tuple[bool, bool], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """A product and room for the two gradients; the weight's is a sum over chunks, of the given dtype, and zero of none."""
    grad_x = torch.empty_like(x) if wanted[0] else None
    room = torch.empty_like if len(x) else torch.zeros_like
    return x, weight, grad_x, room(weight, dtype=dtype) if wanted[1] else None

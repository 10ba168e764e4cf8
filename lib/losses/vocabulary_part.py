"""The loss of a head of which this process has some of the rows: what the others must know of their logits are three numbers a
token.

Letters as in lib/losses/cross_entropy.py; here V is the vocabulary rows of this part, P the parts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

_CACHE_ELEMENTS = 1 << 19
"""Logits that go through the softmax together on CPU: 2 MiB of float32, which a core's cache holds."""


def tokens_at_once(logits_CV: torch.Tensor) -> int:
    """Rows of logits that go through the softmax together."""
    num_tokens, num_ids = logits_CV.shape
    return max(1, num_tokens if logits_CV.is_cuda else _CACHE_ELEMENTS // max(1, num_ids))


@dataclass(frozen=True)
class VocabularyPart:
    """One of several equal cuts of a head's rows."""

    vocab_size: int
    """Of the whole head, without padding."""
    index: int
    num_parts: int
    gather: Callable[[torch.Tensor], torch.Tensor]
    """[...] of each part -> [P, ...] of all, the same on all."""

    def first_row(self, num_rows: int) -> int:
        """Of this part, if each has `num_rows`."""
        return self.index * num_rows

    def softmax_minus_one_hot(
        self, logits_CV: torch.Tensor, labels_C: torch.Tensor, *, want_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood [C] and whether the label has the greatest logit [C], over the rows of all parts.

        Overwrites logits_CV: with the gradient of the negative log-likelihood with respect to it if `want_grad`. The
        labels count from this part's first row; most lie outside of it.
        """
        dtype = torch.float64 if logits_CV.dtype == torch.float64 else torch.float32
        is_own_C = (labels_C >= 0) & (labels_C < logits_CV.shape[1])
        label_C = labels_C.where(is_own_C, 0)
        rows = tokens_at_once(logits_CV)
        pieces = [slice(start, start + rows) for start in range(0, len(labels_C), rows)]
        none_3 = torch.tensor([-torch.inf, 0.0, -torch.inf], dtype=dtype, device=logits_CV.device)
        own_3C = none_3[:, None].repeat(1, len(labels_C))
        for piece in pieces if logits_CV.shape[1] else ():
            values_RV = logits_CV[piece].to(dtype)
            target_R = values_RV.gather(-1, label_C[piece, None]).squeeze(-1)
            greatest_R1 = values_RV.amax(-1, keepdim=True)
            own_3C[2, piece] = target_R.where(is_own_C[piece], -torch.inf)
            own_3C[0, piece] = greatest_R1.squeeze(-1)
            own_3C[1, piece] = (values_RV - greatest_R1).exp_().sum(-1)
        greatest_PC, sum_PC, target_PC = self.gather(own_3C).unbind(1)
        greatest_C, target_C = greatest_PC.amax(0), target_PC.amax(0)
        sum_C = (sum_PC * (greatest_PC - greatest_C).exp()).sum(0)
        for piece in pieces if want_grad else ():
            grad_RV = (logits_CV[piece].to(dtype) - greatest_C[piece, None]).exp_().div_(sum_C[piece, None])
            if logits_CV.shape[1]:
                grad_RV.scatter_add_(-1, label_C[piece, None], -is_own_C[piece, None].to(dtype))
            logits_CV[piece] = grad_RV
        return sum_C.log() + greatest_C - target_C, target_C == greatest_C

"""What a loss returns: a sum and its count. Whoever knows the global count divides, once."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class LossSum:
    """The loss of some tokens, not yet divided by anything."""

    total: torch.Tensor
    """Scalar, float32 (float64 for float64 inputs), differentiable: the sum of the loss over the counted tokens."""
    num_tokens: int
    """Tokens that `total` sums over; 0 is a valid count, and then `total` is exactly 0 with zero gradients."""
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Further sums over the same tokens (scalars without gradient); they add up over micro-batches and ranks."""

"""What the attention kernels share: how scores are made of queries and keys."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scores:
    """softmax over the seen keys of softcap(q . k * scale), with a sink's score beside them."""

    scale: float
    window: int | None = None
    """A query sees at most this many keys of its document, its own included; None: all up to its own."""
    softcap: float | None = None
    """Scores become cap * tanh(score / cap)."""
    sinks_N: torch.Tensor | None = None
    """[N] a score for each head that takes its share of the softmax and gives nothing."""

"""Losses of heads that put out a number or a logit for each label; sums, as everywhere.

Letters: N kept targets, O labels. Positions without a target are left out before anything is computed, so that what stands
there, a NaN too, can't get in. Statistics are float32 (float64 for float64 outputs).
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from lib.config.heads import HeadConfig
from lib.core.examples import IGNORE_INDEX
from lib.losses.types import LossSum


@dataclass(frozen=True)
class HeadTargets:
    """What one head should put out for a batch. N documents, B rows, T tokens."""

    values: torch.Tensor
    """[N] or [B, T], as the head puts out: numbers, or labels (int64, IGNORE_INDEX where there is none)."""
    factors: torch.Tensor
    """Same shape, float32: factor on the loss of each; 0 where there is no target, and then the value is not read."""

    @property
    def weight_sum(self) -> float:
        """Of the factors that count: what divides the head's loss."""
        counted = self.factors if self.values.is_floating_point() else self.factors[self.values != IGNORE_INDEX]
        return float(counted.clamp(min=0).sum(dtype=torch.float64))

    def to(self, device: torch.device) -> "HeadTargets":
        return HeadTargets(self.values.to(device, non_blocking=True), self.factors.to(device, non_blocking=True))

    @staticmethod
    def told(values: torch.Tensor, head: HeadConfig) -> "HeadTargets":
        """From numbers, or numbers of labels, that are NaN where nothing is told; each that is told counts once."""
        factors = (~values.isnan()).float()
        if head.kind == "classification":
            values = values.nan_to_num(float(IGNORE_INDEX)).long()
        return HeadTargets(values, factors)


def head_loss(head: HeadConfig, outputs: torch.Tensor, targets: HeadTargets) -> LossSum:
    """The loss that the configuration names for a head that isn't the language model's."""
    losses = {"cross_entropy": class_cross_entropy_sum, "squared_error": squared_error_sum, "logistic": logistic_sum}
    return losses[head.trained_by](outputs, targets.values, targets.factors)


def squared_error_sum(outputs: torch.Tensor, targets: torch.Tensor, factors: torch.Tensor) -> LossSum:
    """Sum of `factor * (output - target)**2` over the positions whose factor is above 0.

    Shapes: outputs, targets and factors [...].
    Returns: total and count.
    Raises:
        ValueError: the shapes differ.
    """
    output_N, target_N, factor_N = _kept(outputs, targets, factors)
    return LossSum(total=(factor_N * (output_N - target_N).square()).sum(), num_tokens=factor_N.numel())


def logistic_sum(outputs: torch.Tensor, targets: torch.Tensor, factors: torch.Tensor) -> LossSum:
    """Sum of `factor * cross-entropy of sigmoid(output) to target` over the positions whose factor is above 0.

    Shapes as in `squared_error_sum`; targets are in [0, 1], shares of clicks or 0 and 1.
    Returns: total, count, and `num_correct` (outputs on the side of 0 where the target lies of 0.5).
    Raises:
        ValueError: the shapes differ, or a target is outside [0, 1].
    """
    output_N, target_N, factor_N = _kept(outputs, targets, factors)
    if target_N.numel() and not 0.0 <= float(target_N.min()) <= float(target_N.max()) <= 1.0:
        raise ValueError(f"logistic targets span {float(target_N.min())}..{float(target_N.max())}; they must lie in [0, 1]")
    loss_N = functional.binary_cross_entropy_with_logits(output_N, target_N, reduction="none")
    num_correct = ((output_N > 0) == (target_N > 0.5)).sum()
    return LossSum(total=(factor_N * loss_N).sum(), num_tokens=factor_N.numel(), metrics={"num_correct": num_correct})


def class_cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor, factors: torch.Tensor) -> LossSum:
    """Sum of `-factor * log softmax(logits)[label]` over the positions whose factor is above 0 and that have a label.

    Shapes: logits [..., O]; labels [...] int64, IGNORE_INDEX where there is none; factors [...].
    Returns: total, count, and `num_correct` (labels that have the greatest logit).
    Raises:
        ValueError: shapes don't fit, or a label is outside [0, O).
    """
    if logits.shape[:-1] != labels.shape or labels.shape != factors.shape:
        raise ValueError(f"shapes don't fit: {[list(tensor.shape) for tensor in (logits, labels, factors)]}")
    kept = (labels != IGNORE_INDEX) & (factors > 0)
    logits_NO, label_N, factor_N = logits[kept].to(_statistics(logits)), labels[kept], factors[kept]
    if label_N.numel() and not 0 <= int(label_N.min()) <= int(label_N.max()) < logits.shape[-1]:
        raise ValueError(f"labels span {int(label_N.min())}..{int(label_N.max())}, there are {logits.shape[-1]} classes")
    loss_N = functional.cross_entropy(logits_NO, label_N, reduction="none")
    num_correct = (logits_NO.argmax(-1) == label_N).sum()
    return LossSum(total=(factor_N * loss_N).sum(), num_tokens=label_N.numel(), metrics={"num_correct": num_correct})


def _kept(
    outputs: torch.Tensor, targets: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not outputs.shape == targets.shape == factors.shape:
        raise ValueError(f"shapes differ: {[list(tensor.shape) for tensor in (outputs, targets, factors)]}")
    kept, dtype = factors > 0, _statistics(outputs)
    return outputs[kept].to(dtype), targets[kept].to(dtype), factors[kept].to(dtype)


def _statistics(outputs: torch.Tensor) -> torch.dtype:
    return torch.float64 if outputs.dtype == torch.float64 else torch.float32

"""Several outputs trained at once: each head's loss is a sum, divided once by its own global count, times its weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib.config.heads import HeadConfig, HeadsConfig
from lib.core.examples import IGNORE_INDEX
from lib.losses.cross_entropy import cross_entropy_sum
from lib.losses.outputs import class_cross_entropy_sum, logistic_sum, squared_error_sum
from lib.losses.types import LossSum
from lib.models.heads import HeadedDecoder
from lib.models.layers.documents import DocumentLayout
from lib.parallel.reduce import all_reduce_sum


@dataclass(frozen=True)
class HeadTargets:
    """What one head should put out for a micro-batch. N documents, B rows, T tokens."""

    values: torch.Tensor
    """[N] or [B, T], as the head puts out: numbers, or labels (int64, IGNORE_INDEX where there is none)."""
    factors: torch.Tensor
    """Same shape, float32: factor on the loss of each; 0 where there is no target, and then the value is not read."""

    @property
    def weight_sum(self) -> float:
        """Of the factors that count: what divides the head's loss."""
        counted = self.factors if self.values.is_floating_point() else self.factors[self.values != IGNORE_INDEX]
        return float(counted.clamp(min=0).sum(dtype=torch.float64))


class HeadsLossModule(nn.Module):
    """A decoder with heads and their losses as one module, so that every sharded weight is whole where it is used."""

    def __init__(self, headed: HeadedDecoder, chunk_tokens: int) -> None:
        super().__init__()
        self.headed = headed
        self.chunk_tokens = chunk_tokens

    def forward(
        self,
        token_ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        layout: DocumentLayout,
        targets: Mapping[str, HeadTargets],
    ) -> dict[str, torch.Tensor]:
        """Name -> sum of the head's loss, not divided, for every head of the configuration.

        Raises:
            ValueError: targets are missing for a head, or are there for none.
        """
        config, decoder = self.headed.config, self.headed.decoder
        names = {head.name for head in config.heads}
        if targets.keys() != names:
            raise ValueError(f"targets are for {sorted(targets)}, the heads are {sorted(names)}")
        hidden_BTD = decoder(token_ids_BT, positions_BT, layout)
        outputs = self.headed.outputs(hidden_BTD, layout)
        totals = {head.name: head_loss(head, outputs[head.name], targets[head.name]).total for head in config.outputs}
        if config.lm is not None:
            target = targets[config.lm.name]
            totals[config.lm.name] = cross_entropy_sum(
                hidden_BTD,
                decoder.head_weight,
                torch.where(target.factors > 0, target.values, IGNORE_INDEX),
                self.chunk_tokens,
                vocab_size=decoder.spec.vocab_size,
                softcap=decoder.spec.logit_softcap,
                factors=target.factors,
                adapter=decoder.head_adapter(hidden_BTD),
            ).total
        return totals


def head_loss(head: HeadConfig, outputs: torch.Tensor, targets: HeadTargets) -> LossSum:
    """The loss that the configuration names for a head that isn't the language model's."""
    losses = {"cross_entropy": class_cross_entropy_sum, "squared_error": squared_error_sum, "logistic": logistic_sum}
    return losses[head.trained_by](outputs, targets.values, targets.factors)


def count_targets(micro_batches: Sequence[Mapping[str, HeadTargets]], config: HeadsConfig) -> dict[str, float]:
    """Name -> what divides the head's loss: the factors of all ranks' micro-batches of a step. One collective."""
    sums = {head.name: sum(targets[head.name].weight_sum for targets in micro_batches) for head in config.heads}
    return all_reduce_sum({name: float(value) for name, value in sums.items()})


def weighted_loss(totals: Mapping[str, torch.Tensor], denominators: Mapping[str, float], config: HeadsConfig) -> torch.Tensor:
    """Sum over the heads of weight * total / denominator; a head without any target in the step adds exactly 0."""
    parts = [head.weight * totals[head.name] / (denominators[head.name] or 1.0) for head in config.heads]
    return torch.stack(parts).sum()

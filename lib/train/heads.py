"""Several outputs trained at once: each head's loss is a sum, divided once by its own global count, times its weight."""

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lib.config.heads import HeadsConfig
from lib.core.examples import IGNORE_INDEX
from lib.data.batch import PackedBatch, collate
from lib.data.document import PackedRow
from lib.data.labels import collate_labels
from lib.losses.cross_entropy import cross_entropy_sum
from lib.losses.outputs import HeadTargets, head_loss
from lib.losses.vocabulary_part import VocabularyPart
from lib.models.heads import HeadedDecoder
from lib.models.layers.documents import DocumentLayout
from lib.train.step import MicroBatch, Sum

_CORRECT = "correct/"


class HeadsLossModule(nn.Module):
    """A decoder with heads and their losses as one module, so that every sharded weight is whole where it is used."""

    def __init__(self, headed: HeadedDecoder, chunk_tokens: int) -> None:
        super().__init__()
        self.headed = headed
        self.chunk_tokens = chunk_tokens
        self.vocabulary: int | VocabularyPart = headed.decoder.spec.vocab_size
        """Whose logits the language model's head gives: all, or a part of them, once it is cut over ranks."""

    def forward(
        self,
        token_ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        layout: DocumentLayout,
        targets: Mapping[str, HeadTargets],
    ) -> dict[str, torch.Tensor]:
        """Name -> sum of the head's loss, not divided, for every head of the configuration; and "correct/<name>" -> number of
        targets that were met, where a head's loss has such.

        Raises:
            ValueError: targets are missing for a head, or are there for none.
        """
        config, decoder = self.headed.config, self.headed.decoder
        names = {head.name for head in config.heads}
        if targets.keys() != names:
            raise ValueError(f"targets are for {sorted(targets)}, the heads are {sorted(names)}")
        hidden_BTD = decoder(token_ids_BT, positions_BT, layout)
        outputs = self.headed.outputs(hidden_BTD, layout)
        losses = {head.name: head_loss(head, outputs[head.name], targets[head.name]) for head in config.outputs}
        if config.lm is not None:
            target = targets[config.lm.name]
            losses[config.lm.name] = cross_entropy_sum(
                hidden_BTD,
                decoder.head_weight,
                torch.where(target.factors > 0, target.values, IGNORE_INDEX),
                self.chunk_tokens,
                vocab_size=self.vocabulary,
                softcap=decoder.spec.logit_softcap,
                factors=target.factors,
                adapter=decoder.head_adapter(hidden_BTD),
            )
        correct = {f"{_CORRECT}{name}": loss.metrics["num_correct"] for name, loss in losses.items() if loss.metrics}
        return {name: loss.total for name, loss in losses.items()} | correct


class HeadsObjective:
    """The weighted sum of the heads' mean losses, each over its own targets."""

    def __init__(self, config: HeadsConfig) -> None:
        self.config = config

    def divisors(self, micro: MicroBatch) -> dict[str, float]:
        """What divides each head's loss: its targets by their factors."""
        return {head.name: micro.targets[head.name].weight_sum for head in self.config.heads}

    def sums(self, module: nn.Module, micro: MicroBatch, device: torch.device) -> dict[str, torch.Tensor]:
        batch = micro.batch
        targets = {name: target.to(device) for name, target in micro.targets.items()}
        token_ids, positions = (tensor.to(device, non_blocking=True) for tensor in (batch.token_ids, batch.positions))
        found: dict[str, torch.Tensor] = module(token_ids, positions, micro.layout, targets)
        return found

    def loss(self, sums: Mapping[str, Sum], divisors: Mapping[str, float]) -> Sum:
        """Sum over the heads of weight * total / divisor; a head without any target in the step adds exactly 0."""
        parts = [head.weight * sums[head.name] / (divisors[head.name] or 1.0) for head in self.config.heads]
        return functools.reduce(operator.add, parts)

    def figures(self, sums: Mapping[str, float], divisors: Mapping[str, float], *, num_targets: int) -> dict[str, float]:
        """Of each head the mean loss, its targets by their factors, and the share that was met where its loss has such; 0 in
        a step without any."""
        found: dict[str, float] = {}
        for name, divisor in divisors.items():
            found |= {f"loss/{name}": sums[name] / (divisor or 1.0), f"targets/{name}": divisor}
            if f"{_CORRECT}{name}" in sums:
                is_lm = self.config.lm is not None and name == self.config.lm.name
                found[f"accuracy/{name}"] = sums[f"{_CORRECT}{name}"] / ((num_targets if is_lm else divisor) or 1.0)
        return found


def heads_micro_batch(rows: Sequence[PackedRow], sequence_length: int, pad_id: int, config: HeadsConfig) -> MicroBatch:
    """Packed rows with what every head should put out. Without a language model no token is a target.

    Raises:
        DataError: a row's labels don't fit the heads.
    """
    batch = collate(rows, sequence_length, pad_id)
    labels = collate_labels(rows, sequence_length, config)
    targets = {head.name: HeadTargets.told(labels[head.name], head) for head in config.outputs}
    if config.lm is None:
        batch = replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX), num_targets=0, weights=None, weight_sum=0.0)
    else:
        targets[config.lm.name] = _next_tokens(batch)
    return MicroBatch.of(batch, targets)


def _next_tokens(batch: PackedBatch) -> HeadTargets:
    return HeadTargets(batch.labels, (batch.labels != IGNORE_INDEX).float() if batch.weights is None else batch.weights)

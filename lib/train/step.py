"""One optimizer step: count, accumulate, guard, clip, update.

A loss is a sum, divided once by the number of its targets in the whole step, or by the sum of their weights where they have
any: over all ranks and all micro-batches. That divisor is known before the first backward pass, so neither ranks, nor
accumulation, nor packing change loss or gradients.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lib.config.train import ReduceGradients
from lib.core.errors import NonFiniteLossError
from lib.data.batch import PackedBatch
from lib.losses.cross_entropy import cross_entropy_sum
from lib.losses.outputs import HeadTargets
from lib.losses.vocabulary_part import VocabularyPart
from lib.models.decoder import Decoder
from lib.models.flops import FlopCounter
from lib.models.layers.documents import DocumentLayout
from lib.parallel.clock import CLOCK
from lib.parallel.reduce import all_reduce_sum, clip_grad_norm
from lib.train.collect import gather_texts
from lib.train.meters import StepReport
from lib.train.optim import set_learning_rate

_MAX_IDS_SHOWN = 64
Sum = TypeVar("Sum", torch.Tensor, float)


class LossModule(nn.Module):
    """The decoder and its loss as one module, so that a sharded head's weight is whole where the loss uses it."""

    def __init__(self, decoder: Decoder, chunk_tokens: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.chunk_tokens = chunk_tokens
        self.vocabulary: int | VocabularyPart = decoder.spec.vocab_size
        """Whose logits the head gives: all, or a part of them, once it is cut over ranks."""

    def forward(
        self,
        token_ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        layout: DocumentLayout,
        weights_BT: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the weighted loss, number of targets with the greatest logit) over the labels that aren't IGNORE_INDEX."""
        hidden_BTD = self.decoder(token_ids_BT, positions_BT, layout)
        loss = cross_entropy_sum(
            hidden_BTD,
            self.decoder.head_weight,
            labels_BT,
            self.chunk_tokens,
            vocab_size=self.vocabulary,
            softcap=self.decoder.spec.logit_softcap,
            factors=weights_BT,
            adapter=self.decoder.head_adapter(hidden_BTD),
        )
        return loss.total, loss.metrics["num_correct"]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass of a rank takes."""

    batch: PackedBatch
    layout: DocumentLayout
    targets: Mapping[str, HeadTargets] = field(default_factory=dict)
    """Of output heads, by name."""

    @staticmethod
    def of(batch: PackedBatch, targets: Mapping[str, HeadTargets] | None = None) -> "MicroBatch":
        return MicroBatch(batch, DocumentLayout.from_document_ids(batch.document_ids), targets or {})


@dataclass(frozen=True)
class StepCounts:
    """What is counted over all ranks and micro-batches before a step begins."""

    num_targets: int
    """Tokens that are predicted."""
    num_tokens: int
    num_documents: int
    num_slots: int
    num_attention_products: int
    """Over all documents and layers; see lib/models/flops.py."""
    num_parts_written: int
    """Ranks whose part of the pending checkpoint is on the disk."""
    num_stopping: int
    """Ranks that were asked to stop."""
    counted: bool
    """This rank's rows are counted here: of several ranks with the same rows, one's are."""
    divisors: Mapping[str, float]
    """Of the objective."""


class Objective(Protocol):
    """What a recipe minimises: its loss as sums, what divides them, and what is reported of a step."""

    def divisors(self, micro: MicroBatch) -> dict[str, float]:
        """Name -> a micro-batch's part of what divides the sum of that name; the same names for every micro-batch."""
        ...

    def sums(self, module: nn.Module, micro: MicroBatch, device: torch.device) -> dict[str, torch.Tensor]:
        """Name -> sum over a micro-batch, from one forward pass; the same names for every micro-batch."""
        ...

    def loss(self, sums: Mapping[str, Sum], divisors: Mapping[str, float]) -> Sum:
        """Of some micro-batches, from their sums, in which it is linear, and the divisors of the whole step."""
        ...

    def figures(self, sums: Mapping[str, float], divisors: Mapping[str, float], *, num_targets: int) -> dict[str, float]:
        """Name -> what is reported of a step beside its loss; the same names for every step."""
        ...


class NextToken:
    """The cross-entropy of the next token, over all trained ones by their weights; the module gives what LossModule does."""

    def divisors(self, micro: MicroBatch) -> dict[str, float]:
        """Sum of the targets' weights; their number where none has a weight of its own."""
        return {"loss": micro.batch.weight_sum}

    def sums(self, module: nn.Module, micro: MicroBatch, device: torch.device) -> dict[str, torch.Tensor]:
        batch = micro.batch
        inputs = (batch.token_ids, batch.positions, batch.labels)
        weights = None if batch.weights is None else batch.weights.to(device, non_blocking=True)
        loss, correct = module(*(tensor.to(device, non_blocking=True) for tensor in inputs), micro.layout, weights)
        return {"loss": loss, "num_correct": correct}

    def loss(self, sums: Mapping[str, Sum], divisors: Mapping[str, float]) -> Sum:
        return sums["loss"] / (divisors["loss"] or 1.0)

    def figures(self, sums: Mapping[str, float], divisors: Mapping[str, float], *, num_targets: int) -> dict[str, float]:
        """Share of the targets that had the greatest logit."""
        return {"accuracy": sums["num_correct"] / max(num_targets, 1)}


@dataclass(frozen=True)
class Training:
    """What is trained, towards what, and what that costs."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    flops: FlopCounter
    reduce_gradients: ReduceGradients
    """See `TrainConfig.reduce_gradients`."""


def count_step(
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    flops: FlopCounter,
    *,
    part_written: bool,
    stopping: bool = False,
    counted: bool = True,
) -> StepCounts:
    """The one collective before the backward pass; takes at least one micro-batch. Of several ranks with the same rows one is
    `counted`."""
    parts = [objective.divisors(micro) for micro in micro_batches]
    divisors = {f"divisor/{name}": float(sum(part[name] for part in parts)) * counted for name in parts[0]}
    micro_batches = micro_batches if counted else ()
    lengths = [span.length for micro in micro_batches for span in micro.layout.spans]
    local = {
        "num_targets": sum(micro.batch.num_targets for micro in micro_batches),
        "num_tokens": sum(lengths),
        "num_documents": len(lengths),
        "num_slots": sum(micro.batch.token_ids.numel() for micro in micro_batches),
        "num_attention_products": flops.attention_products(lengths),
        "num_parts_written": int(part_written),
        "num_stopping": int(stopping),
    }
    with CLOCK.part("wait"):
        totals = all_reduce_sum({**local, **divisors})
    divided_by = {name.partition("/")[2]: float(totals[name]) for name in divisors}
    return StepCounts(**{key: int(totals[key]) for key in local}, counted=counted, divisors=divided_by)


def train_step(
    training: Training,
    micro_batches: Sequence[MicroBatch],
    counts: StepCounts,
    *,
    step: int,
    learning_rate: float,
    max_grad_norm: float,
    device: torch.device,
) -> StepReport:
    """Update the weights once from this rank's micro-batches (at least one) and those of the other ranks.

    Raises:
        NonFiniteLossError: on all ranks, before anything is updated; names the step and all its samples.
    """
    module, optimizer, objective = training.module, training.optimizer, training.objective
    optimizer.zero_grad(set_to_none=True)
    own = accumulate_gradients(
        module, micro_batches, objective, divisors=counts.divisors, device=device, reduced=training.reduce_gradients
    )
    sums = all_reduce_sum({name: value * counts.counted for name, value in own.items()})
    with CLOCK.part("optimizer"):
        grad_norm = clip_grad_norm(module.parameters(), max_grad_norm)
    counted = micro_batches if counts.counted else ()
    local_ids = [sample_id for micro in counted for row in micro.batch.sample_ids for sample_id in row]
    sample_ids = tuple(sample_id for text in gather_texts(json.dumps(local_ids)) for sample_id in json.loads(text))
    loss = objective.loss(sums, counts.divisors)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteLossError(_explain(step, loss, grad_norm, sample_ids))
    set_learning_rate(optimizer, learning_rate)
    with CLOCK.part("optimizer"):
        optimizer.step()
    return StepReport(
        step=step,
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_targets=counts.num_targets,
        num_tokens=counts.num_tokens,
        num_slots=counts.num_slots,
        sample_ids=sample_ids,
        figures=objective.figures(sums, counts.divisors, num_targets=counts.num_targets),
    )


def accumulate_gradients(
    module: nn.Module,
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    *,
    divisors: Mapping[str, float],
    device: torch.device,
    reduced: ReduceGradients = "each_step",
) -> dict[str, float]:
    """Add the gradients of the loss of all micro-batches, and of all ranks.

    Copies of the model (the replicate axis) are summed up in the last micro-batch, whenever the shards of a copy are: until
    then a rank's piece is its own copy's.

    Returns: this rank's sums, not divided.
    """
    totals: dict[str, float] = {}
    for index, micro in enumerate(micro_batches):
        if isinstance(module, FSDPModule):
            is_last = index == len(micro_batches) - 1
            module.set_requires_gradient_sync(is_last or reduced == "each_micro_batch")
            module.set_requires_all_reduce(is_last)
        with CLOCK.part("forward"):
            sums = objective.sums(module, micro, device)
            loss = objective.loss(sums, divisors)
        with CLOCK.part("backward"):
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value.item()
    return totals


def _explain(step: int, loss: float, grad_norm: float, sample_ids: Sequence[str]) -> str:
    shown = ", ".join(sample_ids[:_MAX_IDS_SHOWN])
    more = f" and {len(sample_ids) - _MAX_IDS_SHOWN} more" if len(sample_ids) > _MAX_IDS_SHOWN else ""
    return (
        f"step {step}: loss {loss}, gradient norm {grad_norm}. Nothing was updated and the last checkpoint is untouched. "
        f"Samples of this step: {shown}{more}. Lower learning_rate or raise config.optim.warmup_steps; if the same samples "
        "come up again, look at them"
    )

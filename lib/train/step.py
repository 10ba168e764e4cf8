"""One optimizer step: count, accumulate, guard, clip, update.

The loss is a sum, divided once by the number of targets of the whole step, or by the sum of their weights where they have
any: over all ranks and all micro-batches. That divisor is known before the first backward pass, so neither ranks, nor
accumulation, nor packing change loss or gradients.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lib.core.errors import NonFiniteLossError
from lib.data.batch import PackedBatch
from lib.losses.cross_entropy import cross_entropy_sum
from lib.models.decoder import Decoder
from lib.models.flops import FlopCounter
from lib.models.layers.documents import DocumentLayout
from lib.parallel.reduce import all_reduce_sum, clip_grad_norm
from lib.train.collect import gather_texts
from lib.train.meters import StepReport
from lib.train.optim import set_learning_rate

_MAX_IDS_SHOWN = 64


class LossModule(nn.Module):
    """The decoder and its loss as one module, so that a sharded head's weight is whole where the loss uses it."""

    def __init__(self, decoder: Decoder, chunk_tokens: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.chunk_tokens = chunk_tokens

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
            vocab_size=self.decoder.spec.vocab_size,
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

    @staticmethod
    def of(batch: PackedBatch) -> "MicroBatch":
        return MicroBatch(batch, DocumentLayout.from_document_ids(batch.document_ids))


@dataclass(frozen=True)
class StepCounts:
    """What is counted over all ranks and micro-batches before a step begins."""

    num_targets: int
    weight_sum: float
    """Of the targets; their number where none has a weight of its own."""
    num_tokens: int
    num_slots: int
    num_attention_products: int
    """Over all documents and layers; see lib/models/flops.py."""
    num_parts_written: int
    """Ranks whose part of the pending checkpoint is on the disk."""
    counted: bool
    """This rank's rows are counted here: of several ranks with the same rows, one's are."""


def count_step(
    micro_batches: Sequence[MicroBatch], flops: FlopCounter, *, part_written: bool, counted: bool = True
) -> StepCounts:
    """The one collective before the backward pass. Of several ranks with the same rows one is `counted`."""
    written, micro_batches = int(part_written), micro_batches if counted else ()
    lengths = [span.length for micro in micro_batches for span in micro.layout.spans]
    local = {
        "num_targets": sum(micro.batch.num_targets for micro in micro_batches),
        "num_tokens": sum(lengths),
        "num_slots": sum(micro.batch.token_ids.numel() for micro in micro_batches),
        "num_attention_products": flops.attention_products(lengths),
        "num_parts_written": written,
    }
    weight_sum = sum(micro.batch.weight_sum for micro in micro_batches)
    totals = all_reduce_sum({**local, "weight_sum": float(weight_sum)})
    return StepCounts(**{key: int(totals[key]) for key in local}, weight_sum=totals["weight_sum"], counted=counted)


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
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
    optimizer.zero_grad(set_to_none=True)
    total, num_correct = accumulate_gradients(module, micro_batches, denominator=counts.weight_sum, device=device)
    sums = all_reduce_sum({"loss": total * counts.counted, "num_correct": num_correct * counts.counted})
    grad_norm = clip_grad_norm(module.parameters(), max_grad_norm)
    counted = micro_batches if counts.counted else ()
    local_ids = [sample_id for micro in counted for row in micro.batch.sample_ids for sample_id in row]
    sample_ids = tuple(sample_id for text in gather_texts(json.dumps(local_ids)) for sample_id in json.loads(text))
    loss = sums["loss"] / (counts.weight_sum or 1.0)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteLossError(_explain(step, loss, grad_norm, sample_ids))
    set_learning_rate(optimizer, learning_rate)
    optimizer.step()
    return StepReport(
        step=step,
        loss=loss,
        accuracy=sums["num_correct"] / max(counts.num_targets, 1),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_targets=counts.num_targets,
        num_tokens=counts.num_tokens,
        num_slots=counts.num_slots,
        sample_ids=sample_ids,
    )


def accumulate_gradients(
    module: nn.Module,
    micro_batches: Sequence[MicroBatch],
    *,
    denominator: float,
    device: torch.device,
) -> tuple[float, int]:
    """Add the gradients of sum / denominator of all micro-batches; the ranks' are added up in the last one's backward.

    Returns: this rank's loss sum (not divided) and its number of right targets.
    """
    total, num_correct = 0.0, 0
    for index, micro in enumerate(micro_batches):
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(index == len(micro_batches) - 1)
        batch = micro.batch
        inputs = (batch.token_ids, batch.positions, batch.labels)
        weights = None if batch.weights is None else batch.weights.to(device, non_blocking=True)
        loss, correct = module(*(tensor.to(device, non_blocking=True) for tensor in inputs), micro.layout, weights)
        (loss / (denominator or 1.0)).backward()
        total += loss.item()
        num_correct += int(correct.item())
    return total, num_correct


def _explain(step: int, loss: float, grad_norm: float, sample_ids: Sequence[str]) -> str:
    shown = ", ".join(sample_ids[:_MAX_IDS_SHOWN])
    more = f" and {len(sample_ids) - _MAX_IDS_SHOWN} more" if len(sample_ids) > _MAX_IDS_SHOWN else ""
    return (
        f"step {step}: loss {loss}, gradient norm {grad_norm}. Nothing was updated and the last checkpoint is untouched. "
        f"Samples of this step: {shown}{more}. Lower learning_rate or raise config.optim.warmup_steps; if the same samples "
        "come up again, look at them"
    )

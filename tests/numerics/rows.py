"""Rows with very different numbers of targets, a small model, and its gradients."""

import numpy as np
import torch

from lib.data.batch import Document, PackedRow, collate
from lib.models.decoder import Decoder
from lib.models.spec import DecoderSpec, Rope
from lib.train.step import LossModule, MicroBatch, NextToken, accumulate_gradients

SEQUENCE_LENGTH = 64
SPEC = DecoderSpec(
    family="llama",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=256,
    rope=Rope(1e4),
    norm_eps=1e-5,
    tied=True,
)
TARGETS = (1, 60, 2, 45, 3, 50, 1, 1)
"""Trained tokens of each of the 8 rows: the ranks' shares are as unequal as can be."""


def packed_rows() -> list[PackedRow]:
    """Eight rows of one to three documents; the first document of a row carries its targets."""
    generator = np.random.default_rng(0)
    rows = []
    for number, num_targets in enumerate(TARGETS):
        lengths = [num_targets + 1, *([2] * (number % 2) if num_targets < 50 else [])]
        documents = []
        for index, length in enumerate(lengths):
            token_ids = generator.integers(0, SPEC.vocab_size, length).astype(np.int32)
            mask = np.ones(length, dtype=np.bool_)
            documents.append(Document(f"{number}-{index}", token_ids, mask))
        rows.append(PackedRow(tuple(documents)))
    return rows


def micro_batches(rows: list[PackedRow], size: int) -> list[MicroBatch]:
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [MicroBatch.of(collate(group, SEQUENCE_LENGTH, 0)) for group in groups]


def loss_module(dtype: torch.dtype = torch.float32) -> LossModule:
    """The same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = LossModule(Decoder(SPEC), chunk_tokens=16)
        with torch.no_grad():
            module.decoder.embed.weight.mul_(0.1)  # logits of a size that a loss of about log(vocab_size) has
        return module.to(dtype)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """[parameter name] gradients."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.detach().clone()
    return found


def accumulated(module: LossModule, micro: list[MicroBatch], divisor: float) -> dict[str, float]:
    """Sums of this rank's micro-batches; their gradients are those of the loss divided by `divisor`."""
    return accumulate_gradients(module, micro, NextToken(), divisors={"loss": divisor}, device=torch.device("cpu"))

"""The FLOP count is the one that torch counts."""

from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.models.decoder import Decoder
from lib.models.flops import flops_per_step
from lib.models.spec import DecoderSpec
from tests.lib.models.batches import logits, packed

SPEC = DecoderSpec("llama", 64, 32, 48, 3, 4, 2, 16, 128, 1e4, None, 1e-5, True)


def test_products_of_the_layers_and_the_head_are_counted() -> None:
    """torch counts whole squares in attention, forward 2 products and backward 5; a causal document is half of 2 and 4.
    So attention is left out by comparing models with and without a second layer's share of it."""
    decoder = Decoder(SPEC)
    token_ids, positions, layout = packed([[10, 6], [16]], 16, 64)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(logits(decoder, token_ids, positions, layout).sum())
    products = sum(
        counter.get_flop_counts()["Global"].get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
    )
    assert products == flops_per_step(SPEC, num_tokens=32, sum_sq_document_lengths=0, num_targets=32)


def test_attention_costs_half_of_each_documents_square() -> None:
    """One document of 8 tokens, one layer, 4 heads of 16: 2 products x 8*8/2 pairs x 16 channels x 2 x 3 passes x 4 heads."""
    spec = replace(SPEC, num_layers=1)
    with_scores = flops_per_step(spec, num_tokens=0, sum_sq_document_lengths=64, num_targets=0)
    assert with_scores == 2 * 32 * 16 * 2 * 3 * 4

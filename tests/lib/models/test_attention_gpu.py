"""The GPU kernel obeys the laws of the CPU kernel: documents alone, causal, padding zero."""

from pathlib import Path

import pytest
import torch

from lib.models.decoder import Decoder
from lib.models.hf_io import load_full, read_spec
from lib.models.layers.attention_cpu import document_attention_cpu
from lib.models.layers.attention_gpu import document_attention_gpu
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.scores import Scores
from tests.lib.models.batches import logits, packed
from tests.tiny import VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROWS = [[90, 1, 170, 50], [230, 90], [300]]
NUM_COLUMNS = 384


def gpu_decoder(folder: Path, dtype: torch.dtype) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder, dtype)
    return decoder.to("cuda")


@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks"), [(None, None, False), (40, None, False), (None, 2.0, False), (40, None, True)]
)
def test_it_computes_what_the_cpu_kernel_computes(window: int | None, softcap: float | None, with_sinks: bool) -> None:
    """Outputs and gradients of q, k and v within 1e-5 in float32; padding is exactly zero."""
    sinks = torch.linspace(-2.0, 2.0, 6) if with_sinks else None
    on_host = Scores(32**-0.5, window, softcap, sinks)
    on_gpu = Scores(32**-0.5, window, softcap, None if sinks is None else sinks.cuda())
    _, _, layout = packed(ROWS, NUM_COLUMNS, VOCAB_SIZE)
    generator = torch.Generator().manual_seed(0)
    on_cpu = [torch.randn(3, NUM_COLUMNS, heads, 32, generator=generator).requires_grad_() for heads in (6, 2, 2)]
    on_device = [x.detach().cuda().requires_grad_() for x in on_cpu]
    expected = document_attention_cpu(on_cpu[0], on_cpu[1], on_cpu[2], layout, on_host)
    found = document_attention_gpu(on_device[0], on_device[1], on_device[2], layout, on_gpu)
    torch.autograd.backward([expected.square().sum(), found.square().sum()])
    assert (found.detach().cpu() - expected.detach()).abs().max() <= 1e-5
    assert (found.detach().cpu()[layout.document_ids_BT < 0] == 0).all()
    for ours, theirs in zip(on_device, on_cpu):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad.cpu() - theirs.grad).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_changing_a_document_changes_no_bit_of_another_on_gpu(tmp_path: Path, dtype: torch.dtype) -> None:
    """[B1] As on CPU, on the device."""
    decoder = gpu_decoder(tiny_model(tmp_path), dtype)
    token_ids, positions, layout = packed(ROWS, NUM_COLUMNS, VOCAB_SIZE)
    before = logits(decoder, token_ids.cuda(), positions.cuda(), layout).cpu()
    for span in layout.spans:
        inside = torch.zeros_like(token_ids, dtype=torch.bool)
        inside[span.row, span.start : span.end] = True
        changed = torch.where(inside, (token_ids + 1) % VOCAB_SIZE, token_ids).cuda()
        again = DocumentLayout.from_document_ids(layout.document_ids_BT)
        after = logits(decoder, changed, positions.cuda(), again).cpu()
        kept = (layout.document_ids_BT >= 0) & ~inside
        assert torch.equal(before[kept], after[kept])
        assert (before[inside] != after[inside]).any()


@torch.no_grad()
def test_the_decoder_on_gpu_is_the_decoder_on_cpu(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    token_ids, positions, layout = packed(ROWS, NUM_COLUMNS, VOCAB_SIZE)
    found = logits(gpu_decoder(folder, torch.float32), token_ids.cuda(), positions.cuda(), layout).cpu()
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder)
    is_document = layout.document_ids_BT >= 0
    expected = logits(decoder, token_ids, positions, layout)
    assert (found - expected)[is_document].abs().max() <= 1e-4

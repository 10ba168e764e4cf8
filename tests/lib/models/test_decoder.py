"""Laws of the decoder: documents are alone, padding is harmless, positions are exact, nothing hides in buffers."""

from pathlib import Path

import pytest
import torch

from lib.models.decoder import Decoder
from lib.models.hf_io import load_full, read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.rotary import rotary_tables, rotate
from tests.lib.models.batches import logits, packed
from tests.tiny import VOCAB_SIZE, tiny_model

ROWS = [[9, 1, 17, 5], [23, 9], [30]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", dtype="float32")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder, dtype)
    return decoder


def test_packed_equals_alone(folder: Path) -> None:
    """[B1] Logits and gradients of packed documents are those of each document alone."""
    token_ids, positions, layout = packed(ROWS, 36, VOCAB_SIZE)
    together, apart = load(folder), load(folder)
    all_logits = logits(together, token_ids, positions, layout)
    worst = 0.0
    for span in layout.spans:
        part = (slice(span.row, span.row + 1), slice(span.start, span.end))
        alone = logits(apart, token_ids[part], positions[part], DocumentLayout.from_document_ids(torch.zeros(1, span.length)))
        worst = max(worst, float((all_logits[part] - alone).detach().abs().max()))
        torch.autograd.backward([all_logits[part].square().sum(), alone.square().sum()], retain_graph=True)
    assert worst <= 1e-5
    for ours, theirs in zip(together.parameters(), apart.parameters()):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", range(7))
@torch.no_grad()
def test_changing_a_document_changes_no_bit_of_another(folder: Path, changed: int, dtype: torch.dtype) -> None:
    """[B1] Every token of one document is replaced; every logit of every other document keeps its bits."""
    decoder = load(folder, dtype)
    token_ids, positions, layout = packed(ROWS, 36, VOCAB_SIZE)
    before = logits(decoder, token_ids, positions, layout)
    span = layout.spans[changed]
    inside = torch.zeros_like(token_ids, dtype=torch.bool)
    inside[span.row, span.start : span.end] = True
    after = logits(decoder, torch.where(inside, (token_ids + 1) % VOCAB_SIZE, token_ids), positions, layout)
    is_document = layout.document_ids_BT >= 0
    assert torch.equal(before[is_document & ~inside], after[is_document & ~inside])
    assert (before[inside] != after[inside]).any()


def test_a_document_sees_only_its_past(folder: Path) -> None:
    """The gradient of a logit is zero on every input but the document's earlier tokens."""
    decoder = load(folder)
    token_ids, positions, layout = packed(ROWS, 36, VOCAB_SIZE)
    inputs: list[torch.Tensor] = []
    hook = decoder.embed.register_forward_hook(lambda _m, _a, out: inputs.append(out.retain_grad() or out))
    decoder(token_ids, positions, layout)[0, 15].sum().backward()
    hook.remove()
    touched = inputs[0].grad.abs().sum(-1) > 0 if inputs[0].grad is not None else torch.empty(0)
    expected = torch.zeros_like(touched)
    expected[0, 10:16] = True
    assert torch.equal(touched, expected)


def test_padding_is_finite_and_gives_no_gradient_of_its_own(folder: Path) -> None:
    decoder = load(folder)
    token_ids, positions, layout = packed([[4], []], 8, VOCAB_SIZE)
    hidden = decoder(token_ids, positions, layout)
    assert torch.isfinite(hidden).all()
    hidden[0, :4].sum().backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in decoder.parameters())


def test_positions_come_from_the_caller(folder: Path) -> None:
    """Rotary attention depends on distances only: shifting all positions of a document keeps its logits (to rounding)."""
    decoder = load(folder)
    token_ids, positions, layout = packed([[20]], 20, VOCAB_SIZE)
    shifted = logits(decoder, token_ids, positions + 100, layout)
    assert (shifted - logits(decoder, token_ids, positions, layout)).abs().max() <= 1e-4
    stretched = logits(decoder, token_ids, positions * 2, layout)
    assert (stretched - logits(decoder, token_ids, positions, layout)).abs().max() > 1e-2


def test_rotary_is_float32_in_every_dtype(folder: Path) -> None:
    """[C8] At position 30,000 a bfloat16 angle would be off by up to 64 radians; the rotation of a bfloat16 vector is within
    its own rounding (2^-8) of the float64 rotation."""
    spec = load(folder).spec
    positions = torch.tensor([[0, 1, 4095, 30000]])
    tables = rotary_tables(spec.rope, spec.head_dim, positions)
    assert {table.dtype for table in tables} == {torch.float32}
    x = torch.randn(1, 4, 2, spec.head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float64) / spec.head_dim
    angles = positions[..., None, None].double() * spec.rope.theta**-exponents
    first, second = x.double().chunk(2, dim=-1)
    exact = torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)
    assert (rotate(x, tables).double() - exact).abs().max() <= 2**-8 * x.abs().max() + 3e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_as_declared(folder: Path, dtype: torch.dtype) -> None:
    """[C8] There are no buffers that a blanket cast could spoil; weights and hidden states have the dtype asked for."""
    decoder = load(folder, dtype)
    assert not list(decoder.buffers())
    assert {parameter.dtype for parameter in decoder.parameters()} == {dtype}
    assert decoder(*packed(ROWS, 36, VOCAB_SIZE)).dtype == dtype


def test_a_tied_head_is_the_embedding(folder: Path, tmp_path: Path) -> None:
    """[E8] One storage, one gradient; an untied head is its own."""
    decoder = load(folder)
    assert decoder.head_weight.data_ptr() == decoder.embed.weight.data_ptr()
    assert not any("head" in name for name, _ in decoder.named_parameters())
    untied = load(tiny_model(tmp_path, tie_word_embeddings=False))
    assert untied.head_weight.data_ptr() != untied.embed.weight.data_ptr()

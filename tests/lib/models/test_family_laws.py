"""Laws of every family: documents are alone, checkpoints come and go without losing a bit, parameters are as declared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lib.models.decoder import Decoder
from lib.models.families import FAMILIES
from lib.models.hf_io import load_full, read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.verify_configs import DRAWS
from tests.conftest import REPOSITORY
from tests.families import SMALL
from tests.lib.models.batches import logits, packed
from tests.lib.models.checkpoints import family_model
from tests.lib.models.mutants import MUTANTS
from tests.lib.models.test_hf_io import all_tensors, export
from tests.tiny import VOCAB_SIZE

ROWS = [[9, 1, 17, 5], [23, 9], [36]]
LARGE: dict[str, dict[str, Any]] = {
    "tied": {"num_hidden_layers": 11, "hidden_size": 32},
    "untied, sharded": {"num_hidden_layers": 12, "tie_word_embeddings": False, "max_shard_size": "200KB", "hidden_size": 32},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: family_model(root / family, family, dtype="float32") for family in FAMILIES}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder, dtype)
    return decoder


def test_every_family_is_drawn_and_tried_from_end_to_end() -> None:
    assert set(DRAWS) == set(FAMILIES) == set(SMALL) == {family for family, *_ in MUTANTS.values()}


@pytest.mark.parametrize("family", ["qwen2", "olmo2", "mistral"])
def test_a_family_costs_what_the_guide_says(family: str) -> None:
    """Lines of its file, in docs/add-a-model.md."""
    page = (REPOSITORY / "docs" / "add-a-model.md").read_text(encoding="utf-8")
    file = REPOSITORY / "lib" / "models" / f"{family}.py"
    assert f"| `{family}` | {len(file.read_text(encoding='utf-8').splitlines())} |" in page


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family: str, folders: dict[str, Path]) -> None:
    """[B1, E7] Logits and gradients of packed documents, and padding, are those of each document alone."""
    token_ids, positions, layout = packed(ROWS, 38, VOCAB_SIZE)
    together, apart = load(folders[family]), load(folders[family])
    all_logits = logits(together, token_ids, positions, layout)
    worst, losses = 0.0, []
    for span in layout.spans:
        part = (slice(span.row, span.row + 1), slice(span.start, span.end))
        alone = logits(apart, token_ids[part], positions[part], DocumentLayout.from_document_ids(torch.zeros(1, span.length)))
        worst = max(worst, float((all_logits[part] - alone).detach().abs().max()))
        losses += [all_logits[part].square().sum(), alone.square().sum()]
    torch.autograd.backward(losses)
    assert worst <= 1e-5
    greatest = max(float(parameter.grad.abs().max()) for parameter in apart.parameters() if parameter.grad is not None)
    for ours, theirs in zip(together.parameters(), apart.parameters()):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * max(float(theirs.grad.abs().max()), 0.05 * greatest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_changing_a_document_changes_no_bit_of_another(family: str, folders: dict[str, Path], dtype: torch.dtype) -> None:
    """[B1] Every token of one document is replaced; every logit of every other document keeps its bits. In experts too,
    though other documents then fill them otherwise."""
    decoder = load(folders[family], dtype)
    token_ids, positions, layout = packed(ROWS, 38, VOCAB_SIZE)
    before = logits(decoder, token_ids, positions, layout)
    for span in layout.spans:
        inside = torch.zeros_like(token_ids, dtype=torch.bool)
        inside[span.row, span.start : span.end] = True
        after = logits(decoder, torch.where(inside, (token_ids + 1) % VOCAB_SIZE, token_ids), positions, layout)
        kept = (layout.document_ids_BT >= 0) & ~inside
        assert torch.equal(before[kept], after[kept])
        assert (before[inside] != after[inside]).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_with_nothing_but_padding_has_all_gradients(family: str, folders: dict[str, Path]) -> None:
    """[B9] Zeros, but there: another rank waits for them."""
    decoder = load(folders[family])
    token_ids, positions, layout = packed([[], []], 8, VOCAB_SIZE)
    hidden = decoder(token_ids, positions, layout)
    assert torch.isfinite(hidden).all()
    logits(decoder, token_ids, positions, layout).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_dtypes_are_as_declared(family: str, folders: dict[str, Path]) -> None:
    """[C8] Weights have the dtype asked for; what must stay float32, the experts' biases, does; the count is right."""
    decoder = load(folders[family], torch.bfloat16)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}
    assert all(name.endswith("expert_bias") and buffer.dtype == torch.float32 for name, buffer in decoder.named_buffers())
    assert decoder.spec.num_parameters == sum(parameter.numel() for parameter in decoder.parameters())
    assert decoder(*packed(ROWS, 38, VOCAB_SIZE)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_keeps_every_bit(family: str, kind: str, tmp_path: Path) -> None:
    """[D2, D5] Eleven and twelve layers, twelve experts: all names, dtypes and bits, and transformers opens it to the same."""
    source = family_model(tmp_path / "source", family, **LARGE[kind])
    out = export(source, tmp_path / "out", max_shard_bytes=150_000 if "sharded" in kind else 4 << 30)
    before, after = all_tensors(source), all_tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert len(list(out.glob("*.safetensors"))) > ("sharded" in kind)
    if kind == "tied":
        token_ids = torch.arange(20)[None]
        ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, source))
        assert torch.equal(ours(token_ids, use_cache=False).logits, theirs(token_ids, use_cache=False).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_key_is_refused(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """[D8] Nothing in a config is ignored."""
    config = json.loads((folders[family] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"logit_scale": 0.5}))
    with pytest.raises(Exception, match=r"unknown key\(s\) \['logit_scale'\]"):
        read_spec(tmp_path)

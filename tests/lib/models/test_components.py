"""Parts of a decoder are found and swapped by one set of names in every family."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lib.config.heads import HeadsConfig
from lib.core.errors import ModelError
from lib.models.components import find, swap
from lib.models.decoder import Decoder
from lib.models.families import FAMILIES
from lib.models.heads import HeadedDecoder
from lib.models.hf_io import load_full, read_spec
from lib.parallel.load import load_sharded
from tests.conftest import REPOSITORY
from tests.lib.models.batches import logits, packed
from tests.lib.models.checkpoints import family_model
from tests.tiny import VOCAB_SIZE

BATCH = packed([[7, 4]], 12, VOCAB_SIZE)


def load(folder: Path) -> Decoder:
    decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder)
    return decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_names(tmp_path: Path, family: str) -> None:
    """An attention and an MLP for each layer; every norm, those of queries and keys too; the head where it has weights."""
    spec = read_spec(family_model(tmp_path, family, tie_word_embeddings=False))[1]
    model = Decoder(spec)
    layers = [f"layers.{number}" for number in range(spec.num_layers)]
    assert list(find(model, "Attention")) == [f"{layer}.attn" for layer in layers]
    assert list(find(model, "MLP")) == [f"{layer}.mlp" for layer in layers]
    norms = {name.removesuffix(".weight") for name, _ in model.named_parameters() if "norm" in name}
    assert find(model, "Norm").keys() == norms
    assert list(find(model, "Head")) == ["head"]
    config = HeadsConfig.parse({"heads": [{"name": "a", "kind": "scalar"}, {"name": "text", "kind": "lm"}]}, where="test")
    assert list(find(HeadedDecoder(spec, config), "Head")) == ["decoder.head", "heads.a_head"]


class OwnNorm(nn.Module):
    """RMSNorm written out."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.weight + self.offset)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_swapped_part_is_the_one_that_computes(tmp_path: Path, family: str) -> None:
    """A norm of one's own with the same formula changes logits by rounding; an MLP that gives nothing, in one layer, is the
    same as that layer without its MLP."""
    folder = family_model(tmp_path, family, dtype="float32")
    before = logits(load(folder), *BATCH)
    own = load(folder)
    assert len(swap(own, "Norm", lambda _, norm: OwnNorm(norm.weight, norm.eps, norm.offset))) == len(
        find(load(folder), "Norm")
    )
    assert not find(own, "Norm")
    assert own.state_dict().keys() == load(folder).state_dict().keys()
    assert (logits(own, *BATCH) - before).abs().max() <= 1e-5

    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    without = load(folder)
    assert swap(without, "MLP", lambda name, mlp: Nothing(), names=r"layers\.1\.mlp") == ["layers.1.mlp"]
    silenced = load(folder)
    silenced.layers[1].mlp.down.weight.zero_()
    assert torch.equal(logits(without, *BATCH), logits(silenced, *BATCH))


@torch.no_grad()
def test_the_documented_recipe_works_as_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its three lines, run on a decoder on the meta device as a run builds it: the norms before attention are others, filled
    from the checkpoint under their old names, and the model computes what it did."""
    page = (REPOSITORY / "docs" / "add-an-output-head.md").read_text(encoding="utf-8")
    code = page.partition("## Swap a part")[2].partition("```python\n")[2].partition("```")[0]
    assert sum(bool(line) for line in code.splitlines()) == 3
    folder = family_model(tmp_path, "llama", dtype="float32")
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    exec(compile(code, "docs/add-an-output-head.md", "exec"), {"decoder": decoder, "MyNorm": OwnNorm})
    assert capsys.readouterr().out.split() == [*find(load(folder), "Norm")]
    own = [name for name, part in decoder.named_modules() if isinstance(part, OwnNorm)]
    assert own == ["layers.0.attn_norm", "layers.1.attn_norm"]
    load_sharded(decoder, folder)
    assert (logits(decoder, *BATCH) - logits(load(folder), *BATCH)).abs().max() <= 1e-5


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    model = load(family_model(tmp_path, "llama"))
    with pytest.raises(ModelError, match=r"no MLP has a name like 'layer\.1'; there are layers\.0\.mlp"):
        swap(model, "MLP", lambda name, part: part, names="layer.1")
    with pytest.raises(ModelError, match=r"no Head has a name like '\.\*'; there are none"):
        swap(model, "Head", lambda name, part: part)
    with pytest.raises(ModelError, match="component 'Mlp' is unknown"):
        find(model, "Mlp")  # type: ignore[arg-type]

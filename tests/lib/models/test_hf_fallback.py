"""A model without family here: what transformers computes for a document alone is what it is trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lib.config.model import LoraConfig
from lib.config.vocabulary import VocabularyConfig
from lib.core.artifact import read_manifest, stage_artifact
from lib.core.errors import ModelError
from lib.data.batch import IGNORE_INDEX
from lib.models.admit import admit_model, prepare_model
from lib.models.fallback_lora import adapter_problem, linear_layers, put_fallback_adapters
from lib.models.hf_fallback import (
    check_fallback,
    compare_documents,
    difference_to_plain,
    is_fallback,
    load_fallback,
    lost_in_round_trip,
    packing_problem,
    write_fallback_folder,
)
from lib.models.hf_io import CheckpointReader, read_json
from lib.models.layers.documents import DocumentLayout
from lib.models.layers.lora import AdaptedLinear
from lib.models.verify_fallback import verify_folder
from lib.tokens.tokenizer import Tokenizer
from lib.train.fallback import FallbackLossModule
from tests.lib.models.batches import packed
from tests.lib.models.checkpoints import family_model
from tests.tiny import VOCAB_SIZE, tiny_tokenizer

_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "phi": _SMALL,
    "cohere": _SMALL,
    "starcoder2": {**_SMALL, "sliding_window": 8, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gemma2": {
        **_SMALL,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": None,
    },
}
LAYERS_WITH_ADAPTERS = {"gpt2": 4, "phi": 6, "cohere": 7, "starcoder2": 6, "bloom": 4, "gemma2": 7}
"""Linear layers of one layer of the model."""
PACKS = ("gpt2", "phi", "cohere")
"""Those whose documents are the same packed as alone."""


def fallback_model(folder: Path, kind: str, *, dtype: str = "float32") -> Path:
    """A tiny random model of a type without family here, with the tiny tokenizer."""
    tiny_tokenizer(folder)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = AutoConfig.for_model(kind, vocab_size=VOCAB_SIZE, **special, **SIZES[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.1
    model.generation_config = GenerationConfig(**special)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fallback")
    return {kind: fallback_model(root / kind, kind) for kind in SIZES}


@pytest.mark.parametrize("kind", SIZES)
def test_a_model_without_family_is_admitted_by_its_documents(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """[B1] A document in a row of its own, padded, is as alone; no bit of it depends on other rows or on padding; no tensor is
    lost on the way through. Several in a row are proven where they are the same, and the reason is given where not."""
    with stage_artifact(tmp_path / "model", "model") as staged:
        admit_model(folders[kind], staged)
    assert read_manifest(tmp_path / "model").meta["family"] == "transformers"
    report = verify_folder(tmp_path / "model")
    assert report.passed, report.problems
    assert report.family == "transformers" and report.packed_diff <= 1e-5
    assert bool(report.packing_problem) == (kind not in PACKS), report.packing_problem


@pytest.mark.parametrize(("rows", "dim"), [([[5], [3]], 2), ([[5, 2], [3]], 4)], ids=["padded", "packed"])
def test_nothing_about_documents_is_left_to_guess(folders: dict[str, Path], rows: list[list[int]], dim: int) -> None:
    """[B1] A mask and positions go with every batch, and no cache, which takes the place of documents found by positions."""
    model, given = load_fallback(folders["phi"]), list[dict[str, Any]]()
    model.model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    token_ids, positions, layout = packed(rows, 8, VOCAB_SIZE)
    model(token_ids, positions, layout)
    (kwargs,) = given
    assert kwargs["use_cache"] is False and torch.equal(kwargs["position_ids"], positions)
    mask, ids = kwargs["attention_mask"], layout.document_ids_BT
    sees = (ids[:, :, None] == ids[:, None, :]).tril()
    assert mask.dim() == dim and torch.equal(mask.bool() if dim == 2 else mask[:, 0] == 0, ids >= 0 if dim == 2 else sees)


@pytest.mark.parametrize("kind", SIZES)
def test_adapters_of_it_are_proven_by_their_merged_weights(folders: dict[str, Path], kind: str) -> None:
    """[D4] Every linear layer but the head has one, of every kind of linear layer there is."""
    assert adapter_problem(folders[kind]) == ""
    model = load_fallback(folders[kind])
    layers = linear_layers(model)
    put_fallback_adapters(model, LoraConfig(rank=2), seed=0)
    trained = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{layer}.lora.{factor}" for layer in layers for factor in "ab"}
    assert len(layers) == 2 * LAYERS_WITH_ADAPTERS[kind]


def test_a_layer_that_is_passed_by_is_noticed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that multiplies by a layer's weight itself, without calling the layer, would leave its adapter out."""
    monkeypatch.setattr(AdaptedLinear, "forward", lambda self, x: torch.nn.functional.linear(x, self.weight, self.bias))
    assert "logits of adapters and of merged weights differ" in adapter_problem(folders["phi"])


@pytest.mark.parametrize("kind", SIZES)
@torch.no_grad()
def test_tokens_are_added_to_it(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """[D6] The old tokens' logits stay; a new one's, whose rows and bias are means, is the mean of theirs. Tied and not, with a
    bias of the head and without; the grown model passes the gate."""
    vocabulary = VocabularyConfig(special=("<|a|>",), semantic=("<item>",), descriptions={"<item>": "sum"})
    with stage_artifact(tmp_path / "model", "model") as staged:
        prepare_model(folders[kind], vocabulary, staged)
    assert staged.counts["tokens_added"] == 2
    old, new = load_fallback(folders[kind]).model, load_fallback(tmp_path / "model").model
    ids = torch.arange(3, 40)[None]
    before, after = old(ids, use_cache=False).logits[0], new(ids, use_cache=False).logits[0]
    assert after.shape[-1] == VOCAB_SIZE + 2
    assert (after[:, :VOCAB_SIZE] - before).abs().max() <= 1e-6 * before.abs().max()
    assert (after[:, VOCAB_SIZE] - before.mean(-1)).abs().max() <= 1e-5 * before.abs().max()
    described = Tokenizer.load(folders[kind]).encode_text("sum")
    assert (after[:, VOCAB_SIZE + 1] - before[:, described].mean(-1)).abs().max() <= 1e-5 * before.abs().max()
    assert verify_folder(tmp_path / "model").passed


def test_tokens_are_not_added_where_a_weight_may_be_missed(tmp_path: Path) -> None:
    """A hidden layer as wide as there are ids could be a table of them."""
    folder = fallback_model(tmp_path / "source", "phi")
    config = AutoConfig.for_model("phi", vocab_size=VOCAB_SIZE, **{**_SMALL, "intermediate_size": VOCAB_SIZE})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with (
        pytest.raises(ModelError, match=r"fc1\.weight.*no tokens can be added"),
        stage_artifact(tmp_path / "out", "model") as staged,
    ):
        prepare_model(folder, VocabularyConfig(special=("<|a|>",)), staged)


def test_windows_are_why_packing_is_not_proven(folders: dict[str, Path], tmp_path: Path) -> None:
    """[B6] A mask of one's own takes the place of the window, which short documents don't show and long ones do."""
    assert "sliding_window" in packing_problem(folders["starcoder2"])
    assert "sliding_window" in packing_problem(family_model(tmp_path, "gpt_oss"))
    model = load_fallback(folders["starcoder2"])
    documents = [torch.randint(VOCAB_SIZE, (30,), generator=torch.Generator().manual_seed(number)) for number in range(3)]
    assert compare_documents(model, documents, packed=False)[0] <= 1e-5
    assert compare_documents(model, documents, packed=True)[0] > 1e-3
    assert "positions" in packing_problem(folders["bloom"])
    values = read_json(folders["phi"] / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(values | {"layer_types": ["full_attention", "linear_attention"]}))
    assert "layer_types" in packing_problem(tmp_path)


@torch.no_grad()
def test_a_cap_of_the_scores_is_not_left_out(folders: dict[str, Path]) -> None:
    """[D8] PyTorch's fused attention, which transformers takes by itself, has none: the plain code computes such models."""
    ids = torch.randint(VOCAB_SIZE, (1, 30), generator=torch.Generator().manual_seed(0))
    ours, plain, fused = (
        load_fallback(folders["gemma2"], attention=attention).model(input_ids=ids, use_cache=False).logits
        for attention in (None, "eager", "sdpa")
    )
    assert torch.equal(ours, plain) and (fused - plain).abs().max() > 1e-3 * plain.abs().max()
    assert difference_to_plain(load_fallback(folders["gemma2"], attention="sdpa"), folders["gemma2"], [ids[0]]) > 1e-3


@pytest.mark.parametrize("kind", ["phi", "cohere"])
def test_the_loss_and_gradients_are_those_of_transformers(folders: dict[str, Path], kind: str) -> None:
    """Two padded documents with weights 1: the sum that transformers' own labels give document by document. Heads with a bias
    and scaled logits too, since the logits are its own."""
    module = FallbackLossModule.load(folders[kind], torch.device("cpu"))
    reference = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
    generator, lengths = torch.Generator().manual_seed(0), (9, 14)
    token_ids, labels = torch.zeros(2, 14, dtype=torch.int64), torch.full((2, 14), IGNORE_INDEX)
    positions, ids = torch.zeros(2, 14, dtype=torch.int64), torch.full((2, 14), -1)
    expected = torch.zeros(())
    for row, length in enumerate(lengths):
        token_ids[row, :length] = torch.randint(VOCAB_SIZE, (length,), generator=generator)
        labels[row, : length - 1] = token_ids[row, 1:length]
        positions[row, :length], ids[row, :length] = torch.arange(length), 0
        alone = token_ids[row : row + 1, :length].clone()
        expected = expected + reference(alone, labels=alone, use_cache=False).loss * (length - 1)
    total, _ = module(token_ids, positions, labels, DocumentLayout.from_document_ids(ids))
    torch.autograd.backward([total, expected])
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for (name, ours), theirs in zip(module.decoder.model.named_parameters(), reference.parameters()):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max().clamp(min=1.0), name


@torch.no_grad()
def test_the_loss_of_each_token_is_multiplied_by_its_weight(folders: dict[str, Path]) -> None:
    """[C1] Where rows weigh their turns; what stands where there is no label is not read."""
    module = FallbackLossModule.load(folders["phi"], torch.device("cpu"))
    token_ids, positions, layout = packed([[9], [6]], 10, VOCAB_SIZE)
    labels = torch.where(layout.document_ids_BT >= 0, token_ids.roll(-1, 1), IGNORE_INDEX)
    weights = torch.rand(2, 10, generator=torch.Generator().manual_seed(1)).where(labels != IGNORE_INDEX, torch.nan)
    total, _ = module(token_ids, positions, labels, layout, weights)
    kept = labels != IGNORE_INDEX
    logprobs = module.decoder(token_ids, positions, layout)[kept].double().log_softmax(-1)
    expected = -(logprobs.gather(-1, labels[kept][:, None])[:, 0] * weights[kept]).sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-5)


def test_bfloat16_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert lost_in_round_trip(fallback_model(tmp_path / "source", "gpt2", dtype="bfloat16"), tmp_path / "out") == []


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_weights_are_written_in_the_dtype_that_was_asked_for(tmp_path: Path, name: str) -> None:
    """[C9] A bfloat16 model: each tensor rounded once, and the config says so."""
    source, out, dtype = fallback_model(tmp_path / "source", "gpt2", dtype="bfloat16"), tmp_path / "out", getattr(torch, name)
    out.mkdir()
    write_fallback_folder(out, dict(load_fallback(source).model.named_parameters()), source, dtype=dtype)
    before, after = CheckpointReader(source), CheckpointReader(out)
    assert read_json(out / "config.json")["dtype"] == name and before.names() == after.names()
    for tensor in after.names():
        assert after.dtype(tensor) == dtype and torch.equal(after.get(tensor), before.get(tensor).to(dtype)), tensor


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}},
            r"config\.json: .*no trust_remote_code\. .*delete auto_map",
        ),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "of no family here"),
        ({"model_type": "unheard_of"}, "of no family here"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"n_layer": 3}, "not those of the model"),
    ],
)
def test_what_cannot_be_trusted_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """[L3] Code in the folder never runs, whatever the config asks for."""
    folder = fallback_model(tmp_path, "gpt2")
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    assert is_fallback(folder)
    with pytest.raises(ModelError, match=words):
        check_fallback(folder)
        load_fallback(folder)
    assert not (tmp_path / "ran").exists()

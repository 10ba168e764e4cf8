"""Weights in MXFP4 are decoded to the numbers they stand for: those of the format's definition, and transformers' bits."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lib.config.vocabulary import VocabularyConfig
from lib.core.artifact import stage_artifact
from lib.core.errors import ModelError
from lib.models.admit import prepare_model
from lib.models.decoder import Decoder
from lib.models.hf_io import INDEX_FILE, SINGLE_FILE, CheckpointReader, load_full, read_json, read_spec
from lib.models.layers.documents import DocumentLayout
from lib.models.mxfp4 import VALUES, decode_folder, dequantize, is_mxfp4
from tests.lib.models.checkpoints import family_model


def _packed(shape: tuple[int, ...], seed: int, *, exponents: tuple[int, int] = (120, 126)) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks and scales of a weight [E, out, in]."""
    generator = torch.Generator().manual_seed(seed)
    num_experts, num_rows, num_columns = shape
    groups = (num_experts, num_rows, num_columns // 32)
    blocks = torch.randint(0, 256, (*groups, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(*exponents, groups, generator=generator, dtype=torch.uint8)


def test_every_code_is_its_number() -> None:
    """By the definition: sign, two exponent bits with a bias of 1, one bit of fraction, times 2 ** (scale - 127); the lower
    half of a byte comes first. All 16 codes at all scales whose numbers bfloat16 holds, subnormal ones too."""
    codes = bytes(range(16)) * 2
    packed = bytes(low | high << 4 for low, high in zip(codes[::2], codes[1::2]))
    scales = torch.arange(0, 252, dtype=torch.uint8)
    blocks = torch.tensor(list(packed), dtype=torch.uint8).expand(1, len(scales), 1, 16)
    decoded = dequantize(blocks, scales.view(1, -1, 1))
    for scale, row in zip(scales.tolist(), decoded[0].T.double()):
        for code, found in zip(codes, row.tolist()):
            exponent, fraction = code >> 1 & 3, code & 1
            number = (1 + fraction / 2) * 2.0 ** (exponent - 1) if exponent else fraction / 2
            expected = (-number if code & 8 else number) * 2.0 ** (scale - 127)
            assert struct.pack("d", found) == struct.pack("d", expected)
    assert VALUES == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def test_bits_are_those_of_transformers() -> None:
    blocks, scales = _packed((3, 10, 96), seed=0, exponents=(100, 140))
    theirs = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(dequantize(blocks, scales).view(torch.int16), theirs.view(torch.int16))


@pytest.fixture
def packed_folder(tmp_path: Path) -> Path:
    """A gpt-oss checkpoint as it is published: experts in blocks and scales, here in different files."""
    folder = family_model(tmp_path / "model", "gpt_oss", intermediate_size=64, tie_word_embeddings=False)
    tensors = load_file(folder / SINGLE_FILE)
    files: dict[str, dict[str, torch.Tensor]] = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    first, second = files.values()
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if name.endswith(("gate_up_proj", "down_proj")):
            num_experts, num_in, num_out = tensor.shape
            first[f"{name}_blocks"], second[f"{name}_scales"] = _packed((num_experts, num_out, num_in), number)
        else:
            (first, second)[number % 2][name] = tensor
    (folder / SINGLE_FILE).unlink()
    for file, held in files.items():
        save_file(held, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = read_json(folder / "config.json")
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_a_published_folder_computes_what_transformers_computes(packed_folder: Path, tmp_path: Path) -> None:
    """Prepared as a run prepares it; transformers decodes the same folder by itself where there is no GPU."""
    assert is_mxfp4(packed_folder)
    with stage_artifact(tmp_path / "prepared", "model") as staged:
        prepare_model(packed_folder, VocabularyConfig(), staged)
    prepared = tmp_path / "prepared"
    assert not is_mxfp4(prepared)
    reference = AutoModelForCausalLM.from_pretrained(packed_folder, attn_implementation="eager", local_files_only=True)
    ids = torch.randint(0, 100, (1, 40), generator=torch.Generator().manual_seed(1))
    expected = reference.float().eval()(input_ids=ids, use_cache=False).logits
    with torch.device("meta"):
        decoder = Decoder(read_spec(prepared)[1])
    load_full(decoder, prepared)
    layout = DocumentLayout.from_document_ids(torch.zeros(1, 40, dtype=torch.int64))
    logits = decoder.logits(decoder(ids, torch.arange(40)[None], layout))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_tokens_can_be_added_to_it(packed_folder: Path, tmp_path: Path) -> None:
    """Decoded first: the token has a row, and none of the others changed."""
    folders = {}
    for name, vocabulary in (("plain", VocabularyConfig()), ("grown", VocabularyConfig(special=("<|new|>",)))):
        folders[name] = tmp_path / name
        with stage_artifact(folders[name], "model") as staged:
            prepare_model(packed_folder, vocabulary, staged)
    plain, grown = (CheckpointReader(folder).get("model.embed_tokens.weight") for folder in folders.values())
    assert len(grown) > len(plain)
    assert torch.equal(grown[: len(plain)], plain)


def test_damage_is_refused_by_name(packed_folder: Path, tmp_path: Path) -> None:
    """A scale that is no number; blocks that lost their scales; shapes that don't fit."""
    path = packed_folder / "model-00002-of-00002.safetensors"
    held = load_file(path)
    name = next(name for name in held if name.endswith("_scales"))
    (tmp_path / "out").mkdir()
    save_file({**held, name: torch.full_like(held[name], 255)}, path)
    with pytest.raises(ModelError, match=rf"{name.removesuffix('_scales')}: a scale is not a number"):
        decode_folder(packed_folder, tmp_path / "out")
    save_file({**held, name: held[name][:, :-1].contiguous()}, path)
    with pytest.raises(ModelError, match=r"don't fit; expected \[experts, rows, groups, 16\]"):
        decode_folder(packed_folder, tmp_path / "out")
    index = json.loads((packed_folder / INDEX_FILE).read_text())
    del index["weight_map"][name]
    (packed_folder / INDEX_FILE).write_text(json.dumps(index))
    save_file({key: value for key, value in held.items() if key != name}, path)
    with pytest.raises(ModelError, match=f"has no {name} beside it"):
        decode_folder(packed_folder, tmp_path / "out")

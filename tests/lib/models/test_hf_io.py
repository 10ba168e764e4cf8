"""Checkpoints come in and go out without losing a bit, and a folder that isn't exactly right is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lib.core.errors import ModelError
from lib.models.decoder import Decoder
from lib.models.hf_export import write_hf_folder
from lib.models.hf_io import CheckpointReader, checked_weight_map, load_full, read_spec
from tests.tiny import tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "tied": {"num_hidden_layers": 11},
    "untied": {"num_hidden_layers": 12, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "sharded": {"num_hidden_layers": 11, "tie_word_embeddings": False, "max_shard_size": "200KB"},
    "float16": {"dtype": "float16", "head_dim": 8},
    "float32": {"dtype": "float32"},
}


def load(folder: Path) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(read_spec(folder)[1])
    load_full(decoder, folder)
    return decoder


def export(source: Path, out: Path, **options: Any) -> Path:
    family, spec = read_spec(source)
    out.mkdir()
    write_hf_folder(out, family.weight_map(spec).to_checkpoint(load(source).named_parameters()), source, **options)
    return out


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_shard_bytes", [4 << 30, 100_000])
def test_a_round_trip_through_float32_masters_keeps_every_bit(tmp_path: Path, kind: str, max_shard_bytes: int) -> None:
    """[D2] Same names, dtypes and bits, whatever the sharding on either side; every file opens and the index is whole."""
    source = tiny_model(tmp_path / "source", **KINDS[kind])
    out = export(source, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    before, after = all_tensors(source), all_tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    if len(shards) > 1:
        index = read_json(out / "model.safetensors.index.json")
        contents = {name: file for file in shards for name in load_file(out / file)}
        assert index["weight_map"] == contents
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
        assert max((out / file).stat().st_size for file in shards) <= max_shard_bytes + 20_000
    else:
        assert shards == ["model.safetensors"] and not (out / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("kind", ["tied", "sharded"])
def test_transformers_opens_the_export(tmp_path: Path, kind: str) -> None:
    """[D2] Plain from_pretrained gives the logits of the source, bit for bit, and the right dtype."""
    source = tiny_model(tmp_path / "source", **KINDS[kind])
    out = export(source, tmp_path / "out", max_shard_bytes=100_000)
    token_ids = torch.arange(20)[None]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, source))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours(token_ids, use_cache=False).logits, theirs(token_ids, use_cache=False).logits)


def test_generation_stops_at_the_templates_end_and_padding_is_no_stop(tmp_path: Path) -> None:
    """[D7] Wrong ids in the source follow the tokenizer: <|im_end|> is 2; the padding equals it, so none is written."""
    source = tiny_model(tmp_path / "source")
    for name in ("config.json", "generation_config.json"):
        (source / name).write_text(json.dumps(read_json(source / name) | {"eos_token_id": 0, "pad_token_id": 0}))
    out = export(source, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert read_json(out / name)["eos_token_id"] == 2
        assert read_json(out / name)["pad_token_id"] is None


def test_config_and_tokenizer_are_taken_over_and_nothing_else(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "source")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "training_args.bin").write_bytes(b"\x80\x04.")
    out = export(source, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not list(out.glob("*.py")) and not list(out.glob("*.bin"))
    assert read_spec(out) == read_spec(source)


def test_an_export_in_another_dtype_says_so(tmp_path: Path) -> None:
    out = export(tiny_model(tmp_path / "source"), tmp_path / "out", dtype=torch.float32)
    assert read_json(out / "config.json")["dtype"] == "float32"
    assert {tensor.dtype for tensor in all_tensors(out).values()} == {torch.float32}


def test_only_the_bytes_of_a_slice_are_counted(tmp_path: Path) -> None:
    reader = CheckpointReader(tiny_model(tmp_path))
    whole = reader.get("model.embed_tokens.weight")
    assert reader.bytes_read == whole.nbytes
    part = reader.get_slice("model.embed_tokens.weight", (slice(10, 20), slice(0, 64)))
    assert torch.equal(part, whole[10:20]) and reader.bytes_read == whole.nbytes + part.nbytes


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_stored_copy_of_a_tied_head_is_accepted_only_if_it_is_one(tmp_path: Path) -> None:
    """[D2] Some tools write the tied head too. The same bits are fine; other bits would be dropped in silence."""
    source = tiny_model(tmp_path / "source")
    rewrite(source, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    out = export(source, tmp_path / "out")
    assert "lm_head.weight" not in all_tensors(out)
    rewrite(source, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(ModelError, match=r"lm_head\.weight differs"):
        load(source)


def test_old_checkpoints_with_rotary_buffers_load(tmp_path: Path) -> None:
    source = tiny_model(tmp_path)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite(source, lambda tensors: tensors.update({name: torch.ones(8)}))
    load(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"1 tensor\(s\) missing, the first is model\.norm\.weight"),
        (lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}), r"unknown tensor.*layers\.2"),
        (lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "unknown tensor"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}), r"model\.norm\.weight has shape \(65,\)"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}), "stored as I64"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    rewrite(tiny_model(tmp_path), change)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    """[L1] The payload would write a file; the error says what to do."""
    tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    payload = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    (tmp_path / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(ModelError, match="never opened: convert it to safetensors"):
        load(tmp_path)
    shutil.copyfile(tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelError, match=r"not a readable safetensors file: .*; copy it again, whole"):
        load(tmp_path)


def test_an_index_must_tell_the_truth(tmp_path: Path) -> None:
    """Missing files, files outside the folder, tensors that are elsewhere or in two files."""
    tiny_model(tmp_path, max_shard_size="100KB")
    index_path = tmp_path / "model.safetensors.index.json"
    index = read_json(index_path)
    names = sorted(index["weight_map"])
    files = sorted(set(index["weight_map"].values()))

    def refused(weight_map: Any, message: str) -> None:
        index_path.write_text(json.dumps(index | {"weight_map": weight_map}))
        with pytest.raises(ModelError, match=message):
            CheckpointReader(tmp_path)

    refused(index["weight_map"] | {names[0]: "../outside.safetensors"}, "aren't safetensors files of this folder")
    refused(index["weight_map"] | {names[0]: "/etc/passwd"}, "aren't safetensors files of this folder")
    refused(index["weight_map"] | {names[0]: "model-9.safetensors"}, "missing; copy the whole folder")
    refused(index["weight_map"] | {"extra": files[0]}, "extra is only in the index")
    refused({name: file for name, file in index["weight_map"].items() if name != names[0]}, "is only in the files")
    refused([], "no weight_map")
    moved = next(file for file in files if file != index["weight_map"][names[0]])
    refused(index["weight_map"] | {names[0]: moved}, f"is in {index['weight_map'][names[0]]}, not in {moved}")
    shutil.copyfile(tmp_path / files[0], tmp_path / "model-copy.safetensors")
    refused(index["weight_map"] | {names[0]: "model-copy.safetensors"}, "is in model-")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not readable as JSON"), ("[]", "expected an object"), (None, "no such file")]
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_spec(tmp_path)


def test_a_disk_that_fails_is_no_mistake_of_the_user(tmp_path: Path) -> None:
    """[I10] The system refuses to read the first bytes of any process's memory with EIO, as of a broken disk."""
    (tmp_path / "config.json").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        read_spec(tmp_path)


def test_a_decoder_of_other_numbers_is_not_filled(tmp_path: Path) -> None:
    small, large = tiny_model(tmp_path / "small"), tiny_model(tmp_path / "large", num_hidden_layers=3)
    with pytest.raises(ModelError, match="the model was built for"):
        load_full(load(small), large)


def test_the_names_are_those_of_the_folder(tmp_path: Path) -> None:
    reader = CheckpointReader(tiny_model(tmp_path, tie_word_embeddings=False))
    assert sorted(checked_weight_map(reader, *read_spec(tmp_path)).stored_shapes()) == reader.names()

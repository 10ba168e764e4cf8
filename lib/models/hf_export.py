"""Writing a Hugging Face checkpoint folder that transformers and vLLM open."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lib.core.errors import ModelError
from lib.models.hf_io import INDEX_FILE, SINGLE_FILE, CheckpointReader, read_json
from lib.tokens.chat import ChatEncoder
from lib.tokens.tokenizer import Tokenizer

COPIED_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json"),
    *("vocab_plan.json", "LICENSE", "LICENSE.txt"),
)
"""Files taken over byte for byte where the source folder has them; anything else (code above all) stays behind."""
HEAD_FILES = ("heads/heads.json", "heads/heads.safetensors")
"""Output heads beside the model, likewise; see lib/models/head_io.py."""


def write_hf_folder(
    out: Path,
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    source_folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 4 << 30,
    chat: ChatEncoder | None = None,
) -> None:
    """Write weights, config and tokenizer.

    Args:
        out: an existing folder, empty of model files.
        named_tensors: (name in the checkpoint, full tensor); taken one at a time, at most one shard is in memory.
        source_folder: the model that was trained; its config and tokenizer are taken over.
        dtype: of all tensors; None stores each as the source folder does, and those it lacks in its widest.
        max_shard_bytes: a file holds at most this, or a single larger tensor.
        chat: what the model was trained with: its rules are written beside the weights, and generation stops where its
            turns end; None: as the source folder's tokenizer says.
    Raises:
        ModelError: a number is too great for the dtype.
    """
    reader = CheckpointReader(source_folder)
    known = frozenset(reader.names())
    new_dtype = max((reader.dtype(name) for name in known), key=lambda dtype: dtype.itemsize)
    stored = (
        (name, to_store(name, tensor, dtype or (reader.dtype(name) if name in known else new_dtype)))
        for name, tensor in named_tensors
    )
    dtypes = write_shards(out, stored, max_shard_bytes)
    for name in (*COPIED_FILES, *HEAD_FILES):
        if (source_folder / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source_folder / name, out / name)
    if chat is not None:
        chat.rules.save(out)
    _write_configs(out, source_folder, dtypes, generation_ends(source_folder, chat))


def to_store(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on CPU in the dtype that it is written in.

    Raises:
        ModelError: a number is too great for the dtype.
    """
    stored = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    if not stored.isfinite().all() and tensor.isfinite().all():
        raise ModelError(
            f"{name} holds {float(tensor.abs().max()):g}, and {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:g}; write bfloat16 or float32 instead (config.train.export_dtype)"
        )
    return stored


def write_shards(out: Path, tensors: Iterator[tuple[str, torch.Tensor]], max_shard_bytes: int) -> set[torch.dtype]:
    """Write tensors into safetensors files of at most `max_shard_bytes`, with an index where there are several.

    Fills shard after shard; their number is known, and the files get their names, at the end. Returns the dtypes.
    """
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    size_bytes = total_bytes = total_parameters = 0
    dtypes: set[torch.dtype] = set()

    def flush() -> None:
        save_file(shard, out / f"shard-{len(shards):05d}.part", metadata={"format": "pt"})
        shards.append(sorted(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            size_bytes = 0
        shard[name] = tensor
        size_bytes, total_bytes = size_bytes + tensor.nbytes, total_bytes + tensor.nbytes
        total_parameters += tensor.numel()
        dtypes.add(tensor.dtype)
    flush()
    _name_shards(out, shards, {"total_parameters": total_parameters, "total_size": total_bytes})
    return dtypes


def _name_shards(out: Path, shards: list[list[str]], totals: dict[str, int]) -> None:
    weight_map = {}
    for number, names in enumerate(shards):
        file_name = SINGLE_FILE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(out / f"shard-{number:05d}.part", out / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    if len(shards) > 1:
        write_json(out / INDEX_FILE, {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))})


def _write_configs(out: Path, source_folder: Path, dtypes: set[torch.dtype], ends: dict[str, Any]) -> None:
    """Take over config and generation config, with the dtype and the token ids that end generation written."""
    config = read_json(source_folder / "config.json")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(
        max(dtypes, key=lambda dtype: dtype.itemsize)
    ).removeprefix("torch.")
    write_json(out / "config.json", config | ends)
    if (source_folder / "generation_config.json").is_file():
        write_json(out / "generation_config.json", read_json(source_folder / "generation_config.json") | ends)


def generation_ends(folder: Path, chat: ChatEncoder | None = None) -> dict[str, Any]:
    """Token ids of a config, so that generation stops where turns end and padding is not a stop token.

    Turns end as the chat format says, or where none is given, as the folder's tokenizer does; empty where it has none.
    """
    if chat is None and not (folder / "tokenizer.json").is_file():
        return {}
    tokenizer = Tokenizer.load(folder) if chat is None else chat.tokenizer
    stops, pad = sorted(tokenizer.stop_ids if chat is None else chat.stop_ids), tokenizer.pad_id
    return {"eos_token_id": stops[0] if len(stops) == 1 else stops, "pad_token_id": None if pad in stops else pad}


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

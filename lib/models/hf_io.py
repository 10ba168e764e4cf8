"""Reading and writing plain Hugging Face checkpoint folders: safetensors only, slices at a time, bit for bit."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from lib.core.errors import ModelError
from lib.core.transient import is_transient
from lib.models.decoder import Decoder
from lib.models.families import CLASSIFIER_HEAD, Family, family_of
from lib.models.spec import DecoderSpec
from lib.models.weights import TensorSource, WeightMap

SINGLE_FILE = "model.safetensors"
INDEX_FILE = f"{SINGLE_FILE}.index.json"
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Stored dtypes that a fp32 master holds without loss."""
MAPPED_BYTES = 8 << 20
"""Files are opened anew after so much was read: what was read of a file counts as the process's memory until it is closed."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; a model folder has config.json and safetensors weights") from error
    except (ValueError, OSError) as error:
        if is_transient(error):
            raise
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def read_spec(folder: Path) -> tuple[Family, DecoderSpec]:
    """Family and numbers of a model folder; a sequence classifier is a decoder without language-model head.

    Raises:
        ModelError: no config, or one that isn't supported; the message names the file.
    """
    return spec_of(read_json(folder / "config.json"), folder)


def spec_of(config: dict[str, Any], folder: Path) -> tuple[Family, DecoderSpec]:
    """The same of the values of a folder's config."""
    try:
        family = family_of(config)
        spec = family.spec_from_config(config)
        return family, replace(spec, lm_head=config["architectures"] != [family.classifier])
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


class CheckpointReader:
    """The tensors of a checkpoint folder, in one file or in shards with an index; reads only what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        """Bytes of tensor data asked for so far."""
        self._opened: dict[str, Any] = {}
        self._mapped_bytes = 0
        self._file_names = _shard_files(folder)
        self._file_of: dict[str, str] = {}
        for file_name in self._file_names:
            for name in sorted(self._file(file_name).keys()):
                if name in self._file_of:
                    raise ModelError(f"{folder}: tensor {name} is in {self._file_of[name]} and in {file_name}")
                self._file_of[name] = file_name
        self._check_index()

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def files(self) -> dict[str, list[str]]:
        """Name of each file -> its tensors."""
        return {file: sorted(name for name, other in self._file_of.items() if other == file) for file in self._file_names}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises ModelError for a stored dtype that isn't float32, float16 or bfloat16."""
        stored = self._slice(name).get_dtype()
        if stored not in FLOAT_DTYPES:
            raise ModelError(
                f"{self.folder / self._file_of[name]}: {name} is stored as {stored}; supported: {', '.join(FLOAT_DTYPES)}"
            )
        return FLOAT_DTYPES[stored]

    def get(self, name: str) -> torch.Tensor:
        """The whole tensor, in its stored dtype."""
        return self.get_slice(name, tuple(slice(0, size) for size in self.shape(name)))

    def get_bytes(self, name: str) -> torch.Tensor:
        """The whole of a tensor that is stored as unsigned bytes. Raises ModelError for any other."""
        if (stored := self._slice(name).get_dtype()) != "U8":
            raise ModelError(f"{self.folder / self._file_of[name]}: {name} is stored as {stored}, expected U8")
        return cast(torch.Tensor, self._file(self._file_of[name]).get_tensor(name))

    def get_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A part of a tensor in its stored dtype; only its bytes are read."""
        dtype = self.dtype(name)
        part = cast(torch.Tensor, self._slice(name)[slices] if slices else self._file(self._file_of[name]).get_tensor(name))
        num_bytes = math.prod(part.shape) * dtype.itemsize
        self.bytes_read += num_bytes
        self._mapped_bytes += num_bytes
        if self._mapped_bytes > MAPPED_BYTES:
            self._opened, self._mapped_bytes = {}, 0
        return part

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ModelError(f"{self.folder}: no tensor {name}")
        return self._file(self._file_of[name]).get_slice(name)

    def _file(self, file_name: str) -> Any:
        if file_name not in self._opened:
            self._opened[file_name] = self._open(file_name)
        return self._opened[file_name]

    def _open(self, file_name: str) -> Any:
        path = self.folder / file_name
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError as error:
            raise ModelError(f"{path}: named in {INDEX_FILE} but missing; copy the whole folder") from error
        except (SafetensorError, OSError) as error:
            if is_transient(error):
                raise
            raise ModelError(f"{path}: not a readable safetensors file: {error}; copy it again, whole") from error

    def _check_index(self) -> None:
        if not (self.folder / INDEX_FILE).is_file():
            return
        index = read_json(self.folder / INDEX_FILE)["weight_map"]
        for name in sorted(index.keys() ^ self._file_of.keys()):
            raise ModelError(
                f"{self.folder / INDEX_FILE}: tensor {name} is only in the {'index' if name in index else 'files'}"
            )
        for name, file_name in index.items():
            if self._file_of[name] != file_name:
                raise ModelError(f"{self.folder / INDEX_FILE}: tensor {name} is in {self._file_of[name]}, not in {file_name}")


def checked_weight_map(reader: CheckpointReader, family: Family, spec: DecoderSpec) -> WeightMap:
    """Where our parameters lie, after the folder proved to hold exactly the tensors of the spec.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape, or a tied model has a head of its own.
    """
    weights = family.weight_map(spec)
    present, expected = set(reader.names()), weights.stored_shapes()
    derived = {pattern.format(i=i) for pattern in family.derived_weights for i in range(spec.num_layers)}
    if missing := sorted(expected.keys() - present):
        raise ModelError(
            f"{reader.folder}: {len(missing)} tensor(s) missing, the first is {missing[0]}; the config asks for it"
        )
    head_names = {stored for stored, ours in family.weight_names.items() if ours == "head.weight"} - expected.keys()
    beside = head_names if spec.lm_head else head_names | {CLASSIFIER_HEAD}
    if unexpected := sorted(present - expected.keys() - derived - beside):
        raise ModelError(
            f"{reader.folder}: {len(unexpected)} unknown tensor(s), the first is {unexpected[0]}; config and weights differ"
        )
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise ModelError(f"{reader.folder}: {name} has shape {reader.shape(name)}, the config gives {shape}")
    for name in head_names & present if spec.lm_head else ():
        if not torch.equal(reader.get(name), weights.read(reader, "embed.weight")):
            raise ModelError(f"{reader.folder}: the config ties the head to the embedding, but {name} differs from it")
    return weights


def load_full(model: Decoder, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Fill a decoder (on any device, meta too) with a folder's weights, on CPU in `dtype`."""
    family, spec = read_spec(folder)
    if spec != model.spec:
        raise ModelError(f"{folder}: its config gives {spec}, the model was built for {model.spec}")
    reader = CheckpointReader(folder)
    fill(model, checked_weight_map(reader, family, spec), reader, dtype)


def fill(model: Decoder, weights: WeightMap, source: TensorSource, dtype: torch.dtype = torch.float32) -> None:
    """Give a decoder the weights of a checkpoint, on CPU in `dtype`, and buffers that are zero."""
    state = {name: weights.read(source, name).to(dtype) for name in weights.entries}
    zeros = {name: torch.zeros(buffer.shape, dtype=buffer.dtype) for name, buffer in model.named_buffers()}
    model.load_state_dict({**state, **zeros}, strict=True, assign=True)


def _shard_files(folder: Path) -> list[str]:
    if (folder / INDEX_FILE).is_file():
        index = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise ModelError(f"{folder / INDEX_FILE}: no weight_map of tensor names to file names")
        files = sorted(set(index.values()))
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in files):
            raise ModelError(f"{folder / INDEX_FILE}: names files that aren't safetensors files of this folder")
        return files
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    found = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    hint = f"; {found[0]} is a pickle, which is never opened: convert it to safetensors" if found else ""
    raise ModelError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")

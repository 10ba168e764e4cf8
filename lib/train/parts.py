"""A rank's part of a checkpoint: tensors in a safetensors file whose header places each in its whole, plain values in JSON.

A part holds boxes with any number of dimensions; a reader puts together whatever box it needs from all parts.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lib.core.artifact import write_durably, write_hashed
from lib.core.errors import ArtifactCorruptError
from lib.core.manifest import Json, canonical_json
from lib.train.boxes import Box
from lib.train.snapshot import Snapshot


def tensors_name(rank: int, num_ranks: int) -> str:
    return f"state-{rank:05d}-of-{num_ranks:05d}.safetensors"


def values_name(rank: int, num_ranks: int) -> str:
    return f"values-{rank:05d}-of-{num_ranks:05d}.json"


def write_part(staging: Path, snapshot: Snapshot, values: Json, *, rank: int, num_ranks: int) -> None:
    """Write one rank's two files into `staging` and flush them to the disk."""
    staging.mkdir(parents=True, exist_ok=True)
    sha256 = write_hashed(staging / tensors_name(rank, num_ranks), memoryview(snapshot.header), snapshot.data)
    record = {"sha256": sha256, "values": values}
    write_durably(staging / values_name(rank, num_ranks), canonical_json(record))


def read_record(folder: Path, rank: int, num_ranks: int) -> Json:
    """{"sha256": of the rank's tensors, "values": its plain values}"""
    record: Json = json.loads((folder / values_name(rank, num_ranks)).read_text(encoding="utf-8"))
    return record


@dataclass(frozen=True)
class _Part:
    """An open safetensors file."""

    stream: Any
    boxes: dict[str, Box]
    wholes: dict[str, tuple[int, ...]]
    """Shapes of the tensors that the boxes are of."""

    @staticmethod
    def open(path: Path) -> "_Part":
        stream: Any = safe_open(path, framework="pt")
        placed = json.loads(stream.metadata()["boxes"])
        boxes = {name: Box(tuple(at["offset"]), tuple(stream.get_slice(name).get_shape())) for name, at in placed.items()}
        return _Part(stream, boxes, {name: tuple(at["shape"]) for name, at in placed.items()})

    def read(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        tensor: torch.Tensor = self.stream.get_slice(name)[slices] if slices else self.stream.get_tensor(name)
        return tensor


class PartsReader:
    """Boxes of whole tensors, put together from the parts of all ranks; files are opened when they are needed."""

    def __init__(self, folder: Path, *, rank: int, num_ranks: int) -> None:
        """Read what `num_ranks` ranks wrote, first the part that `rank` wrote: a reader's own, or one likely to serve it."""
        self.folder = folder
        self.bytes_read = 0
        """Bytes of tensor data asked for so far."""
        order = [(rank + number) % num_ranks for number in range(num_ranks)]
        self._paths = [folder / tensors_name(number, num_ranks) for number in order]
        self._open: dict[Path, _Part] = {}

    def close(self) -> None:
        self._open.clear()

    def whole_shape(self, name: str) -> tuple[int, ...] | None:
        """Of a saved tensor; None if no part holds any of it."""
        return next((part.wholes[name] for part in map(self._part, self._paths) if name in part.wholes), None)

    def opened_names(self) -> set[str]:
        """Of all tensors in the files that have been opened."""
        return {name for part in self._open.values() for name in part.wholes}

    def fetch(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The box at `offset` with `shape`; no byte outside of it is read, and each once.

        Raises:
            ArtifactCorruptError: no part holds some of it, or the parts differ in dtype.
        """
        wanted = Box(offset, shape)
        found = self._found(name, wanted)
        if len(found) == 1 and found[0][0] == wanted:
            return found[0][1]
        result = torch.empty(shape, dtype=found[0][1].dtype)
        for box, piece in found:
            if piece.dtype != result.dtype:
                raise ArtifactCorruptError(f"{self.folder}: parts of {name!r} are {result.dtype} and {piece.dtype}")
            result[box.within(wanted)] = piece
        return result

    def _found(self, name: str, wanted: Box) -> list[tuple[Box, torch.Tensor]]:
        """Boxes that make up the wanted one, and what they hold; of an empty one, itself."""
        found: list[tuple[Box, torch.Tensor]] = []
        missing = [wanted]
        for part in (self._part(path) for path in self._paths):
            saved = part.boxes.get(name)
            if saved is None:
                continue
            if wanted.is_empty:
                dtype = part.read(name, tuple(slice(0, 0) for _ in saved.shape)).dtype
                return [(wanted, torch.empty(wanted.shape, dtype=dtype))]
            for hole, common in [(hole, saved.overlap(hole)) for hole in missing]:
                if common is not None:
                    found.append((common, part.read(name, common.within(saved))))
                    self.bytes_read += found[-1][1].nbytes
                    missing.remove(hole)
                    missing += hole.minus(common)
            if not missing:
                return found
        place = f"at {list(missing[0].offset)} with shape {list(missing[0].shape)}"
        raise ArtifactCorruptError(f"{self.folder}: no part holds the box of {name!r} {place}")

    def _part(self, path: Path) -> _Part:
        if path not in self._open:
            self._open[path] = _Part.open(path)
        return self._open[path]

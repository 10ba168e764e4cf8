"""A rank's part of a checkpoint: tensors in a safetensors file whose header places each in its whole, plain values in JSON.

A part holds boxes with any number of dimensions; a reader puts together whatever box it needs from all parts.
"""

import json
from dataclasses import dataclass

import torch

from lib.core.errors import ArtifactCorruptError
from lib.core.manifest import Json, canonical_json
from lib.models.hf_io import MAPPED_BYTES
from lib.train.boxes import Box
from lib.train.shelf import Draft, Stored
from lib.train.snapshot import Snapshot
from lib.train.tensor_file import TensorFile


def tensors_name(rank: int, num_ranks: int) -> str:
    return f"state-{rank:05d}-of-{num_ranks:05d}.safetensors"


def values_name(rank: int, num_ranks: int) -> str:
    return f"values-{rank:05d}-of-{num_ranks:05d}.json"


def write_part(draft: Draft, snapshot: Snapshot, values: Json, *, rank: int, num_ranks: int) -> None:
    """Write one rank's two files into a draft."""
    sha256 = draft.write(tensors_name(rank, num_ranks), snapshot.blocks())
    record = canonical_json({"sha256": sha256, "values": values})
    draft.write(values_name(rank, num_ranks), [memoryview(record.encode())])


def read_record(source: Draft | Stored, rank: int, num_ranks: int) -> Json:
    """{"sha256": of the rank's tensors, "values": its plain values}"""
    record: Json = json.loads(source.read_bytes(values_name(rank, num_ranks)))
    return record


@dataclass(frozen=True)
class _Part:
    """An open file of tensors."""

    file: TensorFile
    boxes: dict[str, Box]
    wholes: dict[str, tuple[int, ...]]
    """Shapes of the tensors that the boxes are of."""

    @staticmethod
    def of(file: TensorFile) -> "_Part":
        placed = json.loads(file.metadata()["boxes"])
        boxes = {name: Box(tuple(at["offset"]), file.shape(name)) for name, at in placed.items()}
        return _Part(file, boxes, {name: tuple(at["shape"]) for name, at in placed.items()})


class PartsReader:
    """Boxes of whole tensors, put together from the parts of all ranks; files are opened when they are needed."""

    def __init__(self, stored: Stored, *, rank: int, num_ranks: int) -> None:
        """Read what `num_ranks` ranks wrote, first the part that `rank` wrote: a reader's own, or one likely to serve it."""
        self._stored = stored
        self.bytes_read = 0
        """Bytes of tensor data asked for so far."""
        order = [(rank + number) % num_ranks for number in range(num_ranks)]
        self._names = [tensors_name(number, num_ranks) for number in order]
        self._open: dict[str, _Part] = {}
        self._held_bytes = 0

    def close(self) -> None:
        self._open.clear()

    def whole_shape(self, name: str) -> tuple[int, ...] | None:
        """Of a saved tensor; None if no part holds any of it."""
        return next((part.wholes[name] for part in map(self._part, self._names) if name in part.wholes), None)

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
        self._hold([piece for _, piece in found])
        if len(found) == 1 and found[0][0] == wanted:
            return found[0][1]
        result = torch.empty(shape, dtype=found[0][1].dtype)
        for box, piece in found:
            if piece.dtype != result.dtype:
                raise ArtifactCorruptError(f"{self._stored}: parts of {name!r} are {result.dtype} and {piece.dtype}")
            result[box.within(wanted)] = piece
        return result

    def _found(self, name: str, wanted: Box) -> list[tuple[Box, torch.Tensor]]:
        """Boxes that make up the wanted one, and what they hold; of an empty one, itself."""
        found: list[tuple[Box, torch.Tensor]] = []
        missing = [wanted]
        for part in map(self._part, self._names):
            saved = part.boxes.get(name)
            if saved is None:
                continue
            if wanted.is_empty:
                dtype = part.file.read(name, tuple(slice(0, 0) for _ in saved.shape)).dtype
                return [(wanted, torch.empty(wanted.shape, dtype=dtype))]
            for hole, common in [(hole, saved.overlap(hole)) for hole in missing]:
                if common is not None:
                    found.append((common, part.file.read(name, common.within(saved))))
                    missing.remove(hole)
                    missing += hole.minus(common)
            if not missing:
                return found
        place = f"at {list(missing[0].offset)} with shape {list(missing[0].shape)}"
        raise ArtifactCorruptError(f"{self._stored}: no part holds the box of {name!r} {place}")

    def _hold(self, pieces: list[torch.Tensor]) -> None:
        """Count what was read; now and then all files let go of it, so that a reader needs the memory of what it takes."""
        self.bytes_read += sum(piece.nbytes for piece in pieces)
        self._held_bytes += sum(_span_bytes(piece) for piece in pieces)
        if self._held_bytes > MAPPED_BYTES:
            self._held_bytes = 0
            for part in self._open.values():
                part.file.let_go()

    def _part(self, name: str) -> _Part:
        if name not in self._open:
            self._open[name] = _Part.of(self._stored.open_tensors(name))
        return self._open[name]


def _span_bytes(piece: torch.Tensor) -> int:
    """From its first byte to its last: columns of a mapped tensor lie far apart, and whole pages are mapped."""
    last = sum((size - 1) * stride for size, stride in zip(piece.shape, piece.stride()))
    return (last + 1) * piece.itemsize if piece.numel() else 0

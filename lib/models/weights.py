"""Between the tensors of a checkpoint and ours: one table for a family, read and written bit for bit.

A table maps the pattern of a checkpoint's tensor name to the pattern of ours: `{i}` is the layer. `{e}`, in a checkpoint's
name only, is the expert: ours holds all of them in one tensor. `Fused` is the reverse, one of theirs for several of ours.

Embedding and head have more rows in memory than ids: a checkpoint has those of the ids alone, the others are zero.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from lib.models.decoder import Decoder
from lib.models.spec import DecoderSpec


@dataclass(frozen=True)
class Fused:
    """Tensors of ours that a checkpoint holds as one: element j of part k at j * len(parts) + k of its last dimension."""

    parts: tuple[str, ...]
    transposed: bool = False
    """Their last two dimensions are exchanged before that."""


WeightTable = Mapping[str, str | Fused]
VOCABULARY_WEIGHTS = ("embed.weight", "head.weight")
"""Our tensors that have a row for each id, and padding."""


class TensorSource(Protocol):
    """A checkpoint, on disk or in memory."""

    def dtype(self, name: str) -> torch.dtype: ...

    def get_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Entry:
    """Where one tensor of ours lies in a checkpoint."""

    names: tuple[str, ...]
    """Of the tensors there: one, or one for each expert where `stacked`."""
    stacked: bool = False
    part: int = 0
    num_parts: int = 1
    transposed: bool = False

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of each tensor there, from the shape of ours."""
        stored = list(shape[1:] if self.stacked else shape)
        if self.transposed:
            stored[-2:] = stored[:-3:-1]
        stored[-1] *= self.num_parts
        return tuple(stored)


class WeightMap:
    """The table of a family, written out for one decoder."""

    def __init__(self, table: WeightTable, spec: DecoderSpec) -> None:
        self.shapes = parameter_shapes(spec)
        self.vocab_size = spec.vocab_size
        self.entries = {name: entry for name, entry in _entries(table, spec) if name in self.shapes}
        nameless = sorted(self.shapes.keys() - self.entries.keys())
        assert not nameless, f"WEIGHT_NAMES of {spec.family} has no name in a checkpoint for {nameless}"
        self._blocks: dict[str, tuple[tuple[slice, ...], torch.Tensor, int]] = {}

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that a checkpoint holds."""
        whole = {name: self._without_padding(name, self.shapes[name]) for name in self.entries}
        return {name: entry.stored_shape(whole[ours]) for ours, entry in self.entries.items() for name in entry.names}

    def _without_padding(self, ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.vocab_size, *shape[1:]) if ours in VOCABULARY_WEIGHTS else shape

    def read(self, source: TensorSource, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        """Our tensor `name`, or a box of it, in its stored dtype; only the bytes of the box are read.

        Of a fused tensor the box of all parts is read, and kept until each part was asked for.
        """
        entry = self.entries[name]
        slices = slices or tuple(slice(0, size) for size in self.shapes[name])
        if name in VOCABULARY_WEIGHTS:
            return self._read_rows(source, entry.names[0], slices)
        if entry.stacked:
            empty = torch.empty([part.stop - part.start for part in slices], dtype=source.dtype(entry.names[0]))
            chosen = [source.get_slice(stored, slices[1:]) for stored in entry.names[slices[0]]]
            return torch.stack(chosen) if chosen else empty
        if entry.num_parts == 1 and not entry.transposed:
            return source.get_slice(entry.names[0], slices)
        box = [*slices[:-2], slices[-1], slices[-2]] if entry.transposed else list(slices)
        box[-1] = slice(box[-1].start * entry.num_parts, box[-1].stop * entry.num_parts)
        block = self._block(source, entry, tuple(box))[..., entry.part :: entry.num_parts]
        return (block.mT if entry.transposed else block).contiguous()

    def _read_rows(self, source: TensorSource, stored: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A box of embedding or head; rows without an id are zero."""
        rows, *others = slices
        there = slice(min(rows.start, self.vocab_size), min(rows.stop, self.vocab_size))
        if there == rows:
            return source.get_slice(stored, slices)
        box = torch.zeros([part.stop - part.start for part in slices], dtype=source.dtype(stored))
        if there.stop > there.start:
            box[: there.stop - there.start] = source.get_slice(stored, (there, *others))
        return box

    def _block(self, source: TensorSource, entry: Entry, box: tuple[slice, ...]) -> torch.Tensor:
        name = entry.names[0]
        kept = self._blocks.pop(name, None)
        block, num_left = kept[1:] if kept and kept[0] == box else (source.get_slice(name, box), entry.num_parts)
        if num_left > 1:
            self._blocks[name] = (box, block, num_left - 1)
        return block

    def to_checkpoint(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name there, tensor) for our tensors (name, whole), in their order; parts of a fused one are held until all came."""
        waiting: dict[str, dict[int, torch.Tensor]] = {}
        for ours, tensor in named_tensors:
            entry = self.entries[ours]
            if ours in VOCABULARY_WEIGHTS:
                yield entry.names[0], tensor[: self.vocab_size]
                continue
            if entry.stacked:
                yield from ((name, expert.clone()) for name, expert in zip(entry.names, tensor))
                continue
            stored = tensor.mT if entry.transposed else tensor
            parts = waiting.setdefault(entry.names[0], {})
            parts[entry.part] = stored
            if len(parts) == entry.num_parts:
                del waiting[entry.names[0]]
                whole = torch.stack([parts[number] for number in range(entry.num_parts)], dim=-1).flatten(-2)
                yield entry.names[0], stored if entry.num_parts == 1 else whole
        assert not waiting, f"parts are missing of {sorted(waiting)}"


@lru_cache(maxsize=32)
def parameter_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of a decoder."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Decoder(spec).named_parameters()}


def _entries(table: WeightTable, spec: DecoderSpec) -> Iterator[tuple[str, Entry]]:
    experts = range(spec.moe.num_experts if spec.moe else 0)
    for stored, ours in table.items():
        fused = ours if isinstance(ours, Fused) else Fused((ours,))
        for i in range(spec.num_layers) if "{i}" in stored else (0,):
            stacked = "{e}" in stored
            names = tuple(stored.format(i=i, e=e) for e in (experts if stacked else (0,)))
            for part, pattern in enumerate(fused.parts):
                yield pattern.format(i=i), Entry(names, stacked, part, len(fused.parts), fused.transposed)

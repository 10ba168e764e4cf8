"""Tensors in a safetensors file, of which any block is read alone: from a disk, or by ranges of bytes from an object store."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from fsspec import AbstractFileSystem
from safetensors import safe_open

from lib.core.errors import ArtifactCorruptError
from lib.core.manifest import Json
from lib.train.snapshot import DTYPE_NAMES
from lib.train.store_errors import reading

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_LENGTH_BYTES = 8
_HEADER_GUESS_BYTES = 1 << 16
"""Of the first request; a longer header takes a second one."""
_GAP_BYTES = 1 << 18
"""Ranges that are no further apart are asked for as one: what lies between costs less than another request."""
_REQUEST_BYTES = 32 << 20
_REQUESTS_AT_ONCE = 8


class TensorFile(Protocol):
    """An open file of tensors."""

    def metadata(self) -> dict[str, str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """The block of a tensor; of a scalar, no slices. Each slice has a start and a stop."""
        ...

    def let_go(self) -> None:
        """Keep no memory for what has been read, but for blocks that are still in use."""
        ...


class MappedTensors:
    """A file of a disk; only the pages of a block are read. They count as this process's memory until they are let go."""

    def __init__(self, path: Path) -> None:
        """Raises ArtifactCorruptError where there is none."""
        if not path.is_file():
            raise ArtifactCorruptError(f"{path}: is missing")
        self._path = path
        self._opened: Any = None

    def metadata(self) -> dict[str, str]:
        found: dict[str, str] = self._stream.metadata()
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._stream.get_slice(name).get_shape())

    def read(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        tensor: torch.Tensor = self._stream.get_slice(name)[slices] if slices else self._stream.get_tensor(name)
        return tensor

    def let_go(self) -> None:
        self._opened = None

    @property
    def _stream(self) -> Any:
        if self._opened is None:
            self._opened = safe_open(self._path, framework="pt")
        return self._opened


@dataclass
class _Request:
    """A range of bytes, and the runs in it that are wanted."""

    begin: int
    end: int
    runs: list[tuple[int, int]] = field(default_factory=list)


class RangedTensors:
    """An object of a store; only the ranges of a block are asked for, several at once."""

    def __init__(self, store: AbstractFileSystem, path: str) -> None:
        self._store, self._path = store, path
        with reading(path):
            start = bytes(store.cat_file(path, start=0, end=_HEADER_GUESS_BYTES))
            length = int.from_bytes(start[:_LENGTH_BYTES], "little")
            if length + _LENGTH_BYTES > len(start):
                start += bytes(store.cat_file(path, start=len(start), end=length + _LENGTH_BYTES))
        self._entries: Json = json.loads(start[_LENGTH_BYTES : length + _LENGTH_BYTES])
        self._data_begin = length + _LENGTH_BYTES

    def metadata(self) -> dict[str, str]:
        found: dict[str, str] = self._entries["__metadata__"]
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def read(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        entry = self._entries[name]
        dtype, block = _DTYPES[entry["dtype"]], [part.stop - part.start for part in slices]
        begin = self._data_begin + entry["data_offsets"][0]
        content = torch.empty(math.prod(block) * dtype.itemsize, dtype=torch.uint8)
        target, filled = content.numpy().data, 0
        for batch in _batches(_requests(_runs(entry["shape"], slices, dtype.itemsize))):
            begins, ends = [begin + one.begin for one in batch], [begin + one.end for one in batch]
            with reading(self._path):
                contents = self._store.cat_ranges([self._path] * len(batch), begins, ends, on_error="raise")
            for one, got in zip(batch, contents):
                for low, high in one.runs:
                    target[filled : filled + high - low] = got[low - one.begin : high - one.begin]
                    filled += high - low
        return content.view(dtype).view(block)

    def let_go(self) -> None:
        """Nothing is kept."""


def _runs(shape: Sequence[int], slices: Sequence[slice], itemsize: int) -> Iterator[tuple[int, int]]:
    """(begin, end) in bytes of what the slices take from a tensor that lies row by row; none is longer than a request."""
    if any(part.stop <= part.start for part in slices):
        return
    strides = [math.prod(shape[dim + 1 :]) * itemsize for dim in range(len(shape))]
    whole = len(shape)
    while whole and (slices[whole - 1].start, slices[whole - 1].stop) == (0, shape[whole - 1]):
        whole -= 1  # all of the dimensions from here on is taken
    inner = slices[whole - 1] if whole else slice(0, 1)
    stride = strides[whole - 1] if whole else math.prod(shape) * itemsize
    outer = [range(part.start, part.stop) for part in slices[: max(0, whole - 1)]]
    for place in itertools.product(*outer):
        base = sum(index * step for index, step in zip(place, strides))
        begin, end = base + inner.start * stride, base + inner.stop * stride
        for low in range(begin, end, _REQUEST_BYTES):
            yield low, min(low + _REQUEST_BYTES, end)


def _requests(runs: Iterator[tuple[int, int]]) -> Iterator[_Request]:
    current: _Request | None = None
    for begin, end in runs:
        if current is not None and begin - current.end <= _GAP_BYTES and end - current.begin <= _REQUEST_BYTES:
            current.end = end
        else:
            if current is not None:
                yield current
            current = _Request(begin, end)
        current.runs.append((begin, end))
    if current is not None:
        yield current


def _batches(requests: Iterator[_Request]) -> Iterator[list[_Request]]:
    while batch := list(itertools.islice(requests, _REQUESTS_AT_ONCE)):
        yield batch

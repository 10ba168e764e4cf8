"""A copy of a rank's tensors in the layout of a safetensors file, so that it is written and hashed without another copy."""

import json
import math
from collections.abc import Mapping

import torch

from lib.core.manifest import Json, canonical_json
from lib.train.state import Piece

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As the safetensors format calls them."""
_ALIGNMENT = 8


class Snapshot:
    """Holds one moment's tensors. Its memory is kept for the next moment: the system hands out new memory slowly."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._num_bytes = 0
        self.header = b""
        """What a safetensors file begins with: the length of the JSON that says where each tensor lies in the file and, as
        "boxes" of its metadata, in the whole; and that JSON."""

    @property
    def data(self) -> memoryview:
        """All tensors, one after the other; valid until the next `take`."""
        return self._buffer.numpy().data[: self._num_bytes]

    def take(self, pieces: Mapping[str, Piece]) -> None:
        """Copy the pieces as they are now. The widest numbers come first, which aligns all."""
        order = sorted(pieces, key=lambda name: (-pieces[name].local.itemsize, name))
        sizes = [math.prod(pieces[name].local.shape) * pieces[name].local.itemsize for name in order]
        self._num_bytes = sum(sizes)
        if self._buffer.numel() < self._num_bytes:
            self._buffer = torch.empty(self._num_bytes, dtype=torch.uint8)
        boxes = {name: {"shape": piece.shape, "offset": piece.offset} for name, piece in pieces.items()}
        entries: Json = {"__metadata__": {"boxes": canonical_json(boxes)}}
        begin = 0
        for name, size in zip(order, sizes):
            local, end = pieces[name].local.detach(), begin + size
            place = {"shape": list(local.shape), "data_offsets": [begin, end]}
            entries[name] = {"dtype": DTYPE_NAMES[local.dtype], **place}
            self._buffer[begin:end].view(local.dtype).view(local.shape).copy_(local)
            begin = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self.header = len(text).to_bytes(8, "little") + text

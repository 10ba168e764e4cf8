"""A copy of a rank's tensors in the layout of a safetensors file, so that it is written and hashed without another copy."""

import json
import math
import threading
from collections.abc import Iterator, Mapping

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
_TELL_BYTES = 16 << 20
"""What waits for a copy hears of it in steps of so much."""


class Snapshot:
    """Holds one moment's tensors. Its memory is kept for the next moment: the system hands out new memory slowly.

    `lay_out`, then `copy` in the thread whose tensors they are; `blocks`, in another one, needn't wait for the end of it.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._header = b""
        self._places: list[tuple[torch.Tensor, int, int]] = []
        """[tensors] in the order of the file: the live one, and where its bytes begin and end among all."""
        self._num_bytes = self._num_copied = 0
        self._failed = False
        self._progress = threading.Condition()

    def lay_out(self, pieces: Mapping[str, Piece]) -> None:
        """Decide where each piece will lie. The widest numbers come first, which aligns all."""
        order = sorted(pieces, key=lambda name: (-pieces[name].local.itemsize, name))
        boxes = {name: {"shape": piece.shape, "offset": piece.offset} for name, piece in pieces.items()}
        entries: Json = {"__metadata__": {"boxes": canonical_json(boxes)}}
        self._places, self._num_bytes, self._num_copied, self._failed = [], 0, 0, False
        for name in order:
            local, begin = pieces[name].local.detach(), self._num_bytes
            self._num_bytes += math.prod(local.shape) * local.itemsize
            place = {"shape": list(local.shape), "data_offsets": [begin, self._num_bytes]}
            entries[name] = {"dtype": DTYPE_NAMES[local.dtype], **place}
            self._places.append((local, begin, self._num_bytes))
        if self._buffer.numel() < self._num_bytes:
            self._buffer = torch.empty(self._num_bytes, dtype=torch.uint8)
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._header = len(text).to_bytes(8, "little") + text

    def copy(self) -> None:
        """Copy the pieces as they are now."""
        try:
            for local, begin, end in self._places:
                self._buffer[begin:end].view(local.dtype).view(local.shape).copy_(local)
                if end - self._num_copied >= _TELL_BYTES or end == self._num_bytes:
                    self._tell(end)
        except BaseException:
            self._tell(self._num_copied, failed=True)
            raise
        self._places = []  # the live tensors aren't kept alive

    def blocks(self) -> Iterator[memoryview]:
        """The whole file, as it is copied: what a safetensors file begins with, which is the length of the JSON that says where
        each tensor lies in the file and, as "boxes" of its metadata, in the whole, and that JSON; and all tensors, one after
        the other. Valid until the next `lay_out`.

        Raises:
            RuntimeError: `copy` has failed.
        """
        yield memoryview(self._header)
        done = 0
        while done < self._num_bytes:
            with self._progress:
                while self._num_copied == done and not self._failed:
                    self._progress.wait()
                ready = self._num_copied
            if self._failed:
                raise RuntimeError("the tensors could not be copied")
            yield self._buffer.numpy().data[done:ready]
            done = ready

    def _tell(self, num_copied: int, *, failed: bool = False) -> None:
        with self._progress:
            self._num_copied, self._failed = num_copied, failed
            self._progress.notify_all()

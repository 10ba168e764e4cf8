"""Laws of a snapshot: a valid safetensors file, of one moment, in memory that is taken once."""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lib.core.artifact import write_hashed
from lib.train import snapshot as snapshot_module
from lib.train.snapshot import DTYPE_NAMES, Snapshot
from lib.train.state import Piece

TENSORS = st.lists(st.tuples(st.sampled_from(list(DTYPE_NAMES)), st.lists(st.integers(0, 4), max_size=3)), max_size=8)


def random_pieces(kinds: list[tuple[torch.dtype, list[int]]]) -> dict[str, Piece]:
    """Of random bytes, some of them transposed views."""
    pieces = {}
    for number, (dtype, shape) in enumerate(kinds):
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
        tensor = raw.view(dtype).view(shape)
        tensor = tensor.mT if len(shape) > 1 and number % 2 else tensor
        pieces[f"{number}/ü"] = Piece(tensor, tuple(tensor.shape), (0,) * tensor.ndim)
    return pieces


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@settings(max_examples=40, deadline=None)
@given(kinds=TENSORS, before=TENSORS)
def test_what_is_written_is_a_safetensors_file_of_that_moment(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[tuple[torch.dtype, list[int]]],
    before: list[tuple[torch.dtype, list[int]]],
) -> None:
    """All dtypes, layouts and shapes, bit for bit; what was in the memory before doesn't show, nor what comes after."""
    path = tmp_path_factory.mktemp("snapshot") / "state.safetensors"
    snapshot, pieces = Snapshot(), random_pieces(kinds)
    for moment in (random_pieces(before), pieces):
        snapshot.lay_out(moment)
        snapshot.copy()
    expected = {name: (piece.local.dtype, piece.local.shape, raw_bytes(piece.local)) for name, piece in pieces.items()}
    for piece in pieces.values():
        piece.local.zero_()
    digest = write_hashed(path, snapshot.blocks())
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, framework="pt") as stream:
        read = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
    assert {name: (tensor.dtype, tensor.shape, raw_bytes(tensor)) for name, tensor in read.items()} == expected


def test_memory_is_taken_once() -> None:
    """A second moment of the same size lies where the first one did."""
    snapshot, places = Snapshot(), []
    for _ in range(2):
        snapshot.lay_out(random_pieces([(torch.float32, [50, 50])]))
        snapshot.copy()
        places += [torch.frombuffer(block, dtype=torch.uint8).data_ptr() for block in list(snapshot.blocks())[1:]]
    assert len(places) == 2 and places[0] == places[1]


def test_writing_follows_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun before anything is copied, a block is written when its tensors are; a copy that fails ends the writing."""
    monkeypatch.setattr(snapshot_module, "_TELL_BYTES", 1000)
    snapshot, pieces = Snapshot(), random_pieces([(torch.float32, [50])] * 40)
    snapshot.lay_out(pieces)
    with ThreadPoolExecutor(max_workers=1) as pool:
        written = pool.submit(write_hashed, tmp_path / "follows", snapshot.blocks())
        with pytest.raises(TimeoutError):
            written.result(timeout=0.05)
        snapshot.copy()
        assert written.result(timeout=60.0) == write_hashed(tmp_path / "after", snapshot.blocks())
    assert (tmp_path / "follows").read_bytes() == (tmp_path / "after").read_bytes()
    broken = Piece(torch.empty(50, device="meta"), (50,), (0,))
    snapshot.lay_out({"0/ü": pieces["0/ü"], "1": broken})
    with ThreadPoolExecutor(max_workers=1) as pool:
        written = pool.submit(write_hashed, tmp_path / "broken", snapshot.blocks())
        with pytest.raises((NotImplementedError, RuntimeError)):
            snapshot.copy()
        with pytest.raises(RuntimeError, match="could not be copied"):
            written.result(timeout=60.0)


def test_a_dtype_that_the_format_lacks_is_an_error() -> None:
    with pytest.raises(KeyError, match="complex64"):
        Snapshot().lay_out({"one": Piece(torch.ones(1, dtype=torch.complex64), (1,), (0,))})

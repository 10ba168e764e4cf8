"""Laws of reading blocks of tensors from an object store: the bits of a mapped file, and few bytes beside them."""

import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lib.core.errors import ArtifactCorruptError, InfraError
from lib.train import tensor_file
from lib.train.tensor_file import MappedTensors, RangedTensors
from tests.faults.fragile_store import FragileStore, fragile_store

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn)
PATH = "/bucket/tensors"


def _in_both(folder: Path, tensors: dict[str, torch.Tensor]) -> tuple[MappedTensors, RangedTensors]:
    path, store = folder / "tensors.safetensors", fragile_store()
    save_file(tensors, path, metadata={"boxes": "{}"})
    store.pipe_file(PATH, path.read_bytes())
    return MappedTensors(path), RangedTensors(store, PATH)


def _block(shape: tuple[int, ...], rng: random.Random) -> tuple[slice, ...]:
    edges = [sorted((rng.randint(0, size), rng.randint(0, size))) if rng.random() < 0.7 else (0, size) for size in shape]
    return tuple(slice(low, high) for low, high in edges)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.lists(st.integers(0, 6), max_size=4).map(tuple),
    gap_bytes=st.sampled_from([0, 8, 1 << 18]),
    request_bytes=st.sampled_from([16, 64, 32 << 20]),
)
def test_any_block_is_the_same_by_ranges_and_mapped(
    tmp_path_factory: pytest.TempPathFactory, seed: int, shape: tuple[int, ...], gap_bytes: int, request_bytes: int
) -> None:
    """However requests are joined and cut. Without joining, exactly the block's bytes are fetched."""
    rng = random.Random(seed)
    whole = torch.randint(0, 2, shape).to(rng.choice(DTYPES))
    mapped, ranged = _in_both(tmp_path_factory.mktemp("tensors"), {"before": torch.ones(3), "it": whole})
    assert ranged.shape("it") == mapped.shape("it") == shape and ranged.metadata() == mapped.metadata()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "_GAP_BYTES", gap_bytes)
        patch.setattr(tensor_file, "_REQUEST_BYTES", request_bytes)
        for _ in range(5):
            block, FragileStore.num_bytes_read = _block(shape, rng), 0
            got, expected = ranged.read("it", block), mapped.read("it", block)
            assert got.dtype == expected.dtype and got.shape == expected.shape
            assert torch.equal(got.view(torch.uint8), expected.contiguous().view(torch.uint8)) if got.ndim else got == expected
            num_bytes = math.prod(part.stop - part.start for part in block) * whole.itemsize
            assert FragileStore.num_bytes_read >= num_bytes
            assert gap_bytes or FragileStore.num_bytes_read == num_bytes


def test_rows_are_read_without_their_neighbours(tmp_path: Path) -> None:
    """[F9] A quarter of 4 MB: 1 MB is fetched, whatever would be cheap to read on the way. Columns are joined."""
    whole = torch.randn(1000, 1000)
    _, ranged = _in_both(tmp_path, {"it": whole})
    FragileStore.num_bytes_read = 0
    assert torch.equal(ranged.read("it", (slice(250, 500), slice(0, 1000))), whole[250:500])
    assert FragileStore.num_bytes_read == 1_000_000
    assert torch.equal(ranged.read("it", (slice(0, 1000), slice(100, 200))), whole[:, 100:200])
    assert FragileStore.num_bytes_read < 5_000_000


def test_a_long_header_is_read_whole(tmp_path: Path) -> None:
    tensors = {f"layers.{number}.{'x' * 80}": torch.tensor([float(number)]) for number in range(1000)}
    _, ranged = _in_both(tmp_path, tensors)
    assert all(torch.equal(ranged.read(name, (slice(0, 1),)), tensor) for name, tensor in tensors.items())


def test_what_is_missing_and_what_fails_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ArtifactCorruptError, match=r"nothing\.safetensors: is missing"):
        MappedTensors(tmp_path / "nothing.safetensors")
    with pytest.raises(ArtifactCorruptError, match="/bucket/nothing: is missing"):
        RangedTensors(fragile_store(), "/bucket/nothing")
    _, ranged = _in_both(tmp_path, {"it": torch.ones(2, 2)})
    FragileStore.revive(kill_at=1)
    FragileStore.num_changes = 1
    with pytest.raises(InfraError, match="/bucket/tensors: can't be read: UserKilledError"):
        ranged.read("it", (slice(0, 1), slice(0, 2)))
    FragileStore.revive()

"""Laws of a checkpoint's parts: cut in any way and read back cut in any other, to the bit, and no byte too many."""

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.core.errors import ArtifactCorruptError
from lib.train.boxes import Box, boxes_to_write
from lib.train.folder_shelf import FolderDraft, StoredFolder
from lib.train.parts import PartsReader, write_part
from lib.train.snapshot import Snapshot
from lib.train.state import Piece
from tests.lib.parallel.ranks import run_ranks
from tests.lib.train.resume_memory import CUTS, NUM_TENSORS, resume, save

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)


def grid(shape: tuple[int, ...], rng: random.Random) -> list[Box]:
    """The blocks of a tensor that is cut at random places (also twice at one place) along each dimension."""
    cuts = [sorted([0, size, *(rng.randint(0, size) for _ in range(rng.randint(0, 2)))]) for size in shape]
    spans = [list(itertools.pairwise(places)) for places in cuts]
    return [Box(tuple(a for a, _ in block), tuple(b - a for a, b in block)) for block in itertools.product(*spans)]


def held_by_ranks(shape: tuple[int, ...], rng: random.Random) -> list[Box]:
    """[num_ranks] each block on at least one rank, some on several."""
    blocks = grid(shape, rng)
    ranks = blocks + [rng.choice(blocks) for _ in range(rng.randint(0, 3))]
    rng.shuffle(ranks)
    return ranks


def write_one(folder: Path, pieces: dict[str, Piece], rank: int, num_ranks: int) -> None:
    snapshot = Snapshot()
    snapshot.lay_out(pieces)
    snapshot.copy()
    write_part(FolderDraft(folder, folder), snapshot, {}, rank=rank, num_ranks=num_ranks)


def write(folder: Path, wholes: dict[str, torch.Tensor], held: list[dict[str, Box]]) -> None:
    for rank, boxes in enumerate(held):
        pieces = {
            name: Piece(
                wholes[name][box.within(Box((0,) * wholes[name].ndim, ()))].contiguous(), tuple(wholes[name].shape), box.offset
            )
            for name, box in boxes.items()
            if name in boxes_to_write(held, rank)
        }
        write_one(folder, pieces, rank, len(held))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), shapes=st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), min_size=1, max_size=3))
def test_any_cut_reads_back_as_any_other(
    tmp_path_factory: pytest.TempPathFactory, seed: int, shapes: list[tuple[int, ...]]
) -> None:
    """[F9] Blocks of a second grid, put together from those of the first, equal the same blocks of the whole, bit for bit.

    Every element that is asked for is read once: as many bytes as the block has.
    """
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("parts")
    wholes = {str(number): torch.randint(-100, 100, shape).to(rng.choice(DTYPES)) for number, shape in enumerate(shapes)}
    each = {name: held_by_ranks(tuple(whole.shape), rng) for name, whole in wholes.items()}
    num_ranks = max(map(len, each.values()))
    held = [{name: boxes[rank] for name, boxes in each.items() if rank < len(boxes)} for rank in range(num_ranks)]
    write(folder, wholes, held)
    for name, whole in wholes.items():
        for box in grid(tuple(whole.shape), rng):
            reader = PartsReader(StoredFolder(folder), rank=rng.randrange(num_ranks), num_ranks=num_ranks)
            got, expected = reader.fetch(name, box.offset, box.shape), whole[box.within(Box((0,) * whole.ndim, ()))]
            assert got.dtype == whole.dtype and got.shape == expected.shape and torch.equal(got, expected)
            assert reader.bytes_read == math.prod(box.shape) * whole.dtype.itemsize
            assert reader.whole_shape(name) == tuple(whole.shape)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
def test_each_box_is_written_once_and_a_lost_one_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, seed: int, shape: tuple[int, ...]
) -> None:
    """Replicas cost no bytes: the ranks together write what the tensor has. Without one block, what needs it is refused."""
    rng, folder = random.Random(seed), tmp_path_factory.mktemp("parts")
    whole = torch.randn(shape)
    held = [{"one": box} for box in held_by_ranks(shape, rng)]
    writers = [rank for rank in range(len(held)) if boxes_to_write(held, rank)]
    assert sum(math.prod(held[rank]["one"].shape) for rank in writers) == whole.numel()
    for rank, boxes in enumerate(held):
        same = [other for other, theirs in enumerate(held) if theirs == boxes]
        assert (rank in writers) == (rank == min(same))
    lost = rng.choice([rank for rank in writers if not held[rank]["one"].is_empty])
    write(folder, {"one": whole}, [{} if boxes == held[lost] else boxes for boxes in held])
    reader = PartsReader(StoredFolder(folder), rank=0, num_ranks=len(held))
    with pytest.raises(ArtifactCorruptError, match="no part holds the box of 'one'"):
        reader.fetch("one", (0,) * whole.ndim, shape)
    for boxes in held:
        if boxes != held[lost]:
            reader.fetch("one", boxes["one"].offset, boxes["one"].shape)


def test_a_tensor_that_nobody_wrote_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {"one": torch.ones(2, 2)}, [{"one": Box((0, 0), (2, 2))}])
    reader = PartsReader(StoredFolder(tmp_path), rank=0, num_ranks=1)
    assert reader.whole_shape("other") is None
    for shape in ((2, 2), (0, 2)):
        with pytest.raises(ArtifactCorruptError, match="no part holds the box of 'other'"):
            reader.fetch("other", (0, 0), shape)
    with pytest.raises(ArtifactCorruptError, match=r"at \[2, 0\] with shape \[1, 2\]"):
        reader.fetch("one", (0, 0), (3, 2))


def test_parts_of_other_dtypes_are_refused(tmp_path: Path) -> None:
    """Nothing is cast on the way."""
    for rank, dtype in enumerate((torch.float32, torch.float16)):
        write_one(tmp_path, {"one": Piece(torch.ones(1, dtype=dtype), (2,), (rank,))}, rank, 2)
    with pytest.raises(ArtifactCorruptError, match=r"parts of 'one' are torch\.float"):
        PartsReader(StoredFolder(tmp_path), rank=0, num_ranks=2).fetch("one", (0,), (2,))


def test_a_rank_goes_on_in_the_memory_of_its_share(tmp_path: Path) -> None:
    """[F13] One of two ranks takes its half, 128 MiB, of what four saved cut by rows: rows of two files, and columns of all
    four. It grows by at most .3 of the share while it reads, with all that it maps; with the files mapped to the end it would
    be all of the share, and twice that for columns, which lie in every page."""
    for folder, num_tensors in (("warm", 1), ("root", NUM_TENSORS)):
        save(tmp_path / folder, 4, num_tensors=num_tensors)
    (found,) = run_ranks(resume, 1, str(tmp_path / "warm"), str(tmp_path / "root"), 2)
    assert found.keys() == set(CUTS)
    for cut, sizes in found.items():
        assert sizes["share"] == 128 << 20 and sizes["beyond"] <= 0.3 * sizes["share"], cut

"""Laws of boxes on real meshes: each is written once, and every mesh reads what another wrote."""

from pathlib import Path

from lib.core.artifact import verify
from lib.train.checkpoint import checkpoint_folder
from lib.train.parts import PartsReader
from tests.lib.parallel.ranks import run_ranks
from tests.lib.train.mesh_work import WHOLE, save_and_read


def test_what_one_mesh_wrote_another_reads(tmp_path: Path) -> None:
    """[F9] Six layouts on 2 x 2 ranks, read on 4 x 1 and 1 x 4: the same numbers, and no number on the disk twice.

    The four ranks' bytes of tensors add up to those of six whole tensors.
    """
    assert run_ranks(save_and_read, 4, tmp_path) == [{}] * 4
    folder = checkpoint_folder(tmp_path, 2)
    verify(folder, "train_state")
    readers = [PartsReader(folder, rank=rank, num_ranks=4) for rank in range(4)]
    names = [f"tensors/{name}" for name in ("fsdp_and_columns", "fsdp_of_rows", "columns_replicated", "on_one_axis")]
    names += ["tensors/replicated", "tensors/plain"]
    for name in names:
        assert readers[0].fetch(name, (0, 0), (8, 6)).equal(WHOLE * 2)
    assert sum(_tensor_bytes(path) for path in folder.glob("*.safetensors")) == len(names) * WHOLE.nbytes


def _tensor_bytes(path: Path) -> int:
    """Size of a safetensors file without its header, whose length is in the first 8 bytes."""
    content = path.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")

"""Laws of boxes on real meshes: each is written once, and every mesh reads what another wrote."""

from pathlib import Path
from typing import Any

import pytest

from lib.core.artifact import verify
from lib.train.checkpoint import step_name
from lib.train.folder_shelf import StoredFolder
from lib.train.parts import PartsReader
from tests.lib.parallel.ranks import run_ranks
from tests.lib.train.mesh_work import WHOLE, save_and_race

NUM_SAVES = 14


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("ranks")
    return root, run_ranks(save_and_race, 4, root, NUM_SAVES)


def test_what_one_mesh_wrote_another_reads(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """[F9] Six layouts on 2 x 2 ranks, read on 4 x 1 and 1 x 4: the same numbers, and no number on the disk twice.

    The four ranks' bytes of tensors add up to those of six whole tensors.
    """
    assert [rank["wrong"] for rank in ranks[1]] == [{}] * 4
    folder = ranks[0] / "read" / step_name(2)
    verify(folder, "train_state")
    readers = [PartsReader(StoredFolder(folder), rank=rank, num_ranks=4) for rank in range(4)]
    names = [f"tensors/{name}" for name in ("fsdp_and_columns", "fsdp_of_rows", "columns_replicated", "on_one_axis")]
    names += ["tensors/replicated", "tensors/plain"]
    for name in names:
        assert readers[0].fetch(name, (0, 0), (8, 6)).equal(WHOLE * 2)
    assert sum(_tensor_bytes(path) for path in folder.glob("*.safetensors")) == len(names) * WHOLE.nbytes


def test_ranks_that_save_into_one_folder_do_not_disturb_each_other(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """[F10] [F13] Four processes, late by chance at each move; `python -m tests.campaigns checkpoints` makes 200 saves each.

    No error, the checkpoints that should stay and nothing else, and no rank keeps a save's memory: 4 MB each would be 15 %.
    """
    assert [rank["published"] for rank in ranks[1]] == [[14, 13, 10]] * 4
    assert {path.name for path in (ranks[0] / "race").iterdir()} == {f"step-000000{step}" for step in (10, 13, 14)}
    assert max(rank["growth"] for rank in ranks[1]) < 0.02


def _tensor_bytes(path: Path) -> int:
    """Size of a safetensors file without its header, whose length is in the first 8 bytes."""
    content = path.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")

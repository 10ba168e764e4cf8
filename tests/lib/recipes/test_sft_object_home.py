"""Laws of a run whose checkpoints are in an object store: the bits of a run in a folder, from any machine, on any ranks."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lib.cluster.local import LocalGroup
from lib.core.errors import InfraError
from lib.core.manifest import Manifest
from lib.core.store import keep
from lib.train.checkpoint import published_steps
from lib.train.run import Origins
from lib.train.run_home import open_shelf
from tests.faults.fragile_store import FragileStore, fragile_store
from tests.lib.recipes.conftest import Inputs, Shown, job, metrics, train
from tests.s3_server import s3_server

KILLED_AT = 12
"""Of the puts: 1 claims the home, 7 are step 2's (tensors, values, facts, two logs, manifest, marker), the others step 4's."""


@pytest.fixture(scope="module")
def uninterrupted(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    root = tmp_path_factory.mktemp("uninterrupted")
    return root / "checkpoint", train(inputs, job(), root)


@pytest.fixture
def fragile() -> Iterator[FragileStore]:
    yield fragile_store()
    FragileStore.revive()


@pytest.mark.usefixtures("fragile")
def test_another_machine_goes_on_where_one_was_lost(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path
) -> None:
    """[F1] [F5] The store can't be reached any more in the middle of step 4's save. A new driver with nothing but the home
    goes on after step 2 and ends in the bits of a run in a folder; its artifact has the metrics of all steps.
    """
    away = replace(inputs, home="fragile://bucket/run")
    FragileStore.revive(kill_at=KILLED_AT)
    with pytest.raises(InfraError, match=r"fragile://bucket/run/step-00000004/\w+: can't write the checkpoint of step 4"):
        train(away, job(), tmp_path, run="lost")
    FragileStore.revive()
    assert published_steps(open_shelf("fragile://bucket/run")) == [2]
    shown = Shown()
    assert train(away, job(), tmp_path, run="new", shown=shown).digest == uninterrupted[1].digest
    assert [count for count, figures in shown.calls if "loss" in figures] == [3, 4, 5, 6]
    assert published_steps(open_shelf("fragile://bucket/run")) == [6, 4]
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_a_node_without_model_and_data_fetches_them(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, fresh_home: Path, tmp_path: Path
) -> None:
    """What the driver has at their places in its store is gone before the rank starts, as on another machine."""
    folders, store = (keep(inputs.model), keep(inputs.data)), MemoryFileSystem()
    for folder in folders:
        store.put(f"{folder}/", f"/elsewhere/{folder.name}/", recursive=True)

    def elsewhere(*args: Any, **kwargs: Any) -> LocalGroup:
        for folder in folders:
            shutil.rmtree(folder)
        return LocalGroup(*args, in_process=True, **kwargs)

    origins = Origins(*(f"memory://elsewhere/{folder.name}" for folder in folders))
    away = replace(inputs, model=folders[0], data=folders[1], home="memory://elsewhere/run", origins=origins)
    assert train(away, job(), tmp_path, group_factory=elsewhere).digest == uninterrupted[1].digest


@pytest.mark.timeout(600)
def test_ranks_that_share_no_run_folder_go_on_from_the_home(
    uninterrupted: tuple[Path, Manifest], inputs: Inputs, tmp_path: Path
) -> None:
    """[C2] [F9] Through a server of S3: one rank's last checkpoint is taken away, and two ranks with another run folder go on
    from step 4 with the same samples and losses."""
    with s3_server("bucket"):
        away = replace(inputs, home="s3://bucket/runs/one")
        shelf = open_shelf("s3://bucket/runs/one")
        for number, ranks in enumerate((1, 2)):
            train(away, job(ranks=ranks), tmp_path, run=f"run-{number}", name=f"out-{number}")
            same = metrics(tmp_path / f"out-{number}")
            for row, other in zip(metrics(uninterrupted[0]), same, strict=True):
                assert row["samples"] == other["samples"]
                assert other["loss"] == pytest.approx(row["loss"], abs=1e-5)
            assert published_steps(shelf) == [6, 4]
            shelf.remove("step-00000006")

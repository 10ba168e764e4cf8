"""Equal content is one folder in the store, and a damaged one never stays."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lib.core.artifact import stage_artifact, verify
from lib.core.errors import ArtifactCorruptError, InfraError
from lib.core.paths import artifact_store
from lib.core.store import bring, keep, new_workspace


def _artifact(folder: Path, text: str) -> Path:
    with stage_artifact(folder / "thing", "note") as staged:
        (staged.path / "a.txt").write_text(text, encoding="utf-8")
    return folder / "thing"


def test_an_artifact_made_in_a_workspace_is_moved_to_its_digest(fresh_home: Path) -> None:
    made = _artifact(new_workspace(), "one")
    kept = keep(made)
    assert not made.exists()
    assert kept == artifact_store() / "note" / verify(kept).digest


def test_equal_content_is_kept_once(fresh_home: Path) -> None:
    assert (
        keep(_artifact(new_workspace(), "one"))
        == keep(_artifact(new_workspace(), "one"))
        != keep(_artifact(new_workspace(), "two"))
    )


def test_an_artifact_of_the_user_stays_where_it_is(fresh_home: Path, tmp_path: Path) -> None:
    mine = _artifact(tmp_path, "one")
    assert verify(keep(mine)) == verify(mine)


@pytest.mark.parametrize("damage", ["altered", "missing", "added"])
def test_a_damaged_artifact_in_the_store_is_replaced(fresh_home: Path, damage: str) -> None:
    """[I2] whatever happened to the store, what `keep` returns is whole."""
    kept = keep(_artifact(new_workspace(), "one"))
    if damage == "altered":
        (kept / "a.txt").write_text("two", encoding="utf-8")
    elif damage == "missing":
        (kept / "a.txt").unlink()
    else:
        (kept / "b.txt").write_text("", encoding="utf-8")
    assert keep(_artifact(new_workspace(), "one")) == kept
    verify(kept)


def test_a_damaged_source_never_enters(fresh_home: Path, tmp_path: Path) -> None:
    mine = _artifact(tmp_path, "one")
    (mine / "a.txt").write_text("two", encoding="utf-8")
    with pytest.raises(ArtifactCorruptError, match=r"a\.txt"):
        keep(mine)
    assert not (artifact_store() / "note").exists()


def test_workspaces_of_dead_processes_are_removed(fresh_home: Path) -> None:
    dead = artifact_store() / "incoming" / "999999999-x"
    dead.mkdir(parents=True)
    mine = new_workspace()
    assert not dead.exists()
    new_workspace()
    assert mine.exists()


def test_a_node_fetches_what_it_lacks_once_and_believes_it_only_whole(fresh_home: Path, tmp_path: Path) -> None:
    """[I2] Several ranks of a node ask at the same time. What is there isn't fetched; a damaged origin never enters."""
    kept, origin = keep(_artifact(tmp_path, "one")), "memory://elsewhere/thing"
    store, text = MemoryFileSystem(), (kept / "a.txt").read_bytes()
    for path in kept.iterdir():
        store.pipe_file(f"/elsewhere/thing/{path.name}", path.read_bytes())
    bring(kept, "memory://elsewhere/nothing")
    shutil.rmtree(kept)
    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(lambda _: bring(kept, origin), range(4)))
    assert verify(kept).kind == "note" and (kept / "a.txt").read_bytes() == text
    assert not list((artifact_store() / "incoming").glob("*/thing"))
    with pytest.raises(InfraError, match=r"belongs at .*, expected at .*other; give all nodes the same POSTFLYTE_HOME"):
        bring(kept.with_name("other"), origin)
    shutil.rmtree(kept)
    with pytest.raises(InfraError, match="memory://elsewhere/nothing: can't be fetched: FileNotFoundError"):
        bring(kept, "memory://elsewhere/nothing")
    store.pipe_file("/elsewhere/thing/a.txt", b"two")
    with pytest.raises(ArtifactCorruptError, match=r"a\.txt"):
        bring(kept, origin)
    assert not kept.exists()

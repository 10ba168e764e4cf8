"""Equal content is one folder in the store, and a damaged one never stays."""

from pathlib import Path

import pytest

from lib.core.artifact import stage_artifact, verify
from lib.core.errors import ArtifactCorruptError
from lib.core.paths import artifact_store
from lib.core.store import keep, new_workspace


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

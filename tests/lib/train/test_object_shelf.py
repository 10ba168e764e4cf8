"""Laws of checkpoints in object stores: published by a marker, believed when all is proven, nothing lost to a late writer."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lib.core.errors import ArtifactCorruptError, ConfigError, InfraError, RunInUseError, UserError
from lib.train.checkpoint import KIND, CheckpointStore, latest_valid, published_steps, step_name
from lib.train.folder_shelf import FolderShelf
from lib.train.object_shelf import ObjectShelf
from lib.train.retention import Retention
from lib.train.run_home import open_shelf
from tests.faults import victim
from tests.faults.fragile_store import FragileStore, fragile_store
from tests.lib.train.test_retention import GRID, check_retention
from tests.s3_server import s3_server

HOME = "fragile://bucket/run"


@pytest.fixture
def store() -> Iterator[FragileStore]:
    yield fragile_store()
    FragileStore.revive()


def _saved(shelf: ObjectShelf, step: int, start: str, *, claim: bool = True) -> None:
    if claim:
        shelf.claim(start)
    draft = shelf.draft(step_name(step), start)
    draft.publish(KIND, {"a": draft.write("a", [memoryview(b"first "), memoryview(b"second")])}, meta={})


def test_runs_on_other_numbers_of_ranks_end_in_the_same_bits(tmp_path: Path) -> None:
    """[F9] 1, 2, 1 and 4 ranks after one another through S3, against one run in a folder."""
    expected = victim.run(tmp_path)
    with s3_server("bucket"):
        home = "s3://bucket/some/run"
        for num_ranks, last_step in ((1, 2), (2, 3), (1, 4), (4, victim.STEPS)):
            last = victim.run(home, num_ranks, last_step)
        assert published_steps(open_shelf(home)) == [victim.STEPS, victim.STEPS - 1]
        assert isinstance(open_shelf(home), ObjectShelf)
    assert torch.equal(last, expected)


@pytest.mark.usefixtures("store")
def test_the_checkpoints_of_a_run_are_the_closed_form_set(tmp_path: Path) -> None:
    """[F11] As in a folder, for a sixth of the settings; and no object is left that no marker names."""
    for number, settings in enumerate(GRID[::6]):
        shelf = ObjectShelf(f"{HOME}-{number}")
        shelf.claim("0")
        check_retention(shelf, *settings, seed=number)
        kept = {step_name(step) for step in published_steps(shelf)}
        inside = [path.removeprefix(f"{shelf.root}/").split("/") for path in FragileStore.dump(str(shelf))]
        assert {parts[0] for parts in inside if len(parts) > 1} == kept


def test_a_start_that_was_overtaken_publishes_nothing(store: FragileStore) -> None:
    """[F10] A late rank of an earlier start: its objects are its own, no marker names them, and they go at the next claim."""
    late, now = ObjectShelf(HOME), ObjectShelf(HOME)
    _saved(late, 1, "late")
    now.claim("now")
    with pytest.raises(RunInUseError, match=r"another driver has taken this run over \(now\); this one \(late\)"):
        _saved(late, 2, "late", claim=False)
    _saved(now, 2, "now", claim=False)
    assert now.open(step_name(2)).read_bytes("a") == b"first second"
    assert published_steps(now) == [2, 1] and any("/step-00000002/late/" in path for path in store.dump(HOME))
    now.claim("later")
    assert not any("/step-00000002/late/" in path for path in store.dump(HOME)) and published_steps(now) == [2, 1]


def test_a_store_that_fails_is_not_a_damaged_checkpoint(store: FragileStore) -> None:
    """[F12] Nothing is set aside because it couldn't be read."""
    shelf = ObjectShelf(HOME)
    _saved(shelf, 1, "0")
    FragileStore.revive(kill_at=1)
    FragileStore.num_changes = 1
    with pytest.raises(InfraError, match="can't be read: UserKilledError") as failed:
        latest_valid(shelf)
    assert not isinstance(failed.value, ArtifactCorruptError)
    with pytest.raises(InfraError, match="can't be kept there now: UserKilledError"):
        shelf.claim("1")
    FragileStore.revive()
    assert latest_valid(shelf) == 1


@pytest.mark.usefixtures("store")
def test_what_is_wrong_is_named() -> None:
    """[F12] Without a marker there is no checkpoint; with one, the object that doesn't fit is named."""
    shelf = ObjectShelf(HOME)
    draft = shelf.draft(step_name(1), "0")
    draft.write("a", [memoryview(b"x")])
    assert shelf.names() == [] and latest_valid(shelf) is None
    for path, content, message in (
        ("step-00000001/0/a", None, r"run/step-00000001/0/a: is missing"),
        ("step-00000001/0/a", b"first secon", r"/a: 11 bytes, the manifest says 12"),
        ("step-00000001/0/a", b"first seconD", r"/a: sha256 differs from the manifest's"),
        ("step-00000001/0/b", b"", r"/b: not in the manifest"),
        ("step-00000001/0/manifest.json", None, r"/manifest.json: is missing"),
        ("step-00000001/0/manifest.json", b"{}", r"/manifest.json: sha256 differs from the marker's"),
        ("step-00000001.published.json", b"{}", r"step-00000001.published.json: not a readable marker"),
    ):
        shelf.store.rm(shelf.root, recursive=True)
        _saved(shelf, 1, "0")
        target = f"{shelf.root}/{path}"
        shelf.store.rm_file(target) if content is None else shelf.store.pipe_file(target, content)
        with pytest.raises(ArtifactCorruptError, match=message):
            shelf.verify(step_name(1), KIND)
        assert latest_valid(shelf) is None and shelf.store.exists(f"{shelf.root}/damaged-step-00000001.published.json")
    shelf.store.rm(shelf.root, recursive=True)
    _saved(shelf, 1, "0")
    with pytest.raises(UserError, match="holds a 'train_state', expected a 'export'"):
        shelf.verify(step_name(1), "export")


@pytest.mark.usefixtures("store")
def test_what_is_taken_is_what_was_given(tmp_path: Path) -> None:
    """Of several blocks of reading, and of none; a damaged file isn't believed on the way either."""
    (tmp_path / "big").write_bytes(bytes(range(256)) * (1 << 17))
    (tmp_path / "empty").touch()
    shelf = ObjectShelf(HOME)
    shelf.claim("0")
    draft = shelf.draft("export", "0")
    draft.publish("export", {name: draft.add(name, tmp_path / name) for name in ("big", "empty")}, meta={})
    shelf.take("export", "export", tmp_path / "taken")
    for name in ("big", "empty"):
        assert (tmp_path / "taken" / name).read_bytes() == (tmp_path / name).read_bytes()
    shelf.store.pipe_file(f"{shelf.root}/export/0/big", bytes(32 << 20))
    with pytest.raises(ArtifactCorruptError, match="big: sha256 differs"):
        shelf.take("export", "export", tmp_path / "again")


def test_a_failed_save_is_told_and_the_one_before_stays(store: FragileStore) -> None:
    """[F2] The error names the address and what to do."""
    shelf = ObjectShelf(HOME)
    _saved(shelf, 1, "0")
    rank = CheckpointStore(shelf, keep=Retention(2), rank=0, num_ranks=1)
    FragileStore.revive(kill_at=1)
    rank.save_async(2, victim.state_of(victim.Weights(0, 1)), victim.FACTS)
    with pytest.raises(InfraError, match=rf"{HOME}/step-00000002/0: can't write the .* of step 2.*Look after the store"):
        rank.wait_for_part()
    rank.close()
    FragileStore.revive()
    assert published_steps(shelf) == [1] and not any("step-00000002" in path for path in store.dump(HOME))


def test_addresses() -> None:
    with pytest.raises(ConfigError, match="nonsense://a: not an address that fsspec can open"):
        open_shelf("nonsense://a")
    assert isinstance(open_shelf("file:///tmp/run"), FolderShelf) and isinstance(open_shelf("/tmp/run"), FolderShelf)
    missing = pytest.raises(ConfigError, match=r"s3://no-such-bucket/run: checkpoints can't be kept there: .* check address")
    with s3_server("bucket"), missing:
        open_shelf("s3://no-such-bucket/run").claim("0")


def test_a_marker_names_one_folder_and_its_manifest(store: FragileStore) -> None:
    """What the documentation promises of the objects' names."""
    _saved(ObjectShelf(HOME), 50, "start")
    assert sorted(path.removeprefix("/bucket/run/") for path in store.dump(HOME)) == [
        "claim.json",
        "step-00000050.published.json",
        "step-00000050/start/a",
        "step-00000050/start/manifest.json",
    ]
    marker = json.loads(store.cat_file("/bucket/run/step-00000050.published.json"))
    assert marker.keys() == {"folder", "manifest_sha256"} and marker["folder"] == "step-00000050/start"

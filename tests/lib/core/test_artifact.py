"""Laws of publishing: whole or absent at every fault, and believed only after verification."""

import errno
import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lib.core import artifact
from lib.core.artifact import link_or_copy, publish, read_manifest, remove_stale_staging, stage_artifact, verify, write_hashed
from lib.core.errors import ArtifactCorruptError, UserError
from lib.core.manifest import MANIFEST_NAME
from tests.conftest import REPOSITORY


def write_sample(target: Path) -> None:
    with stage_artifact(target, "sample") as staged:
        (staged.path / "sub").mkdir()
        (staged.path / "a.bin").write_bytes(bytes(range(256)))
        (staged.path / "sub" / "b.txt").write_text("text")
        staged.counts["rows"] = 3


def test_what_is_written_is_what_is_verified(tmp_path: Path) -> None:
    write_sample(tmp_path / "x")
    manifest = verify(tmp_path / "x", "sample")
    assert [entry.path for entry in manifest.files] == ["a.bin", "sub/b.txt"]
    assert manifest.counts == {"rows": 3}
    assert read_manifest(tmp_path / "x") == manifest


def test_equal_content_has_an_equal_digest_wherever_it_is(tmp_path: Path) -> None:
    write_sample(tmp_path / "x")
    write_sample(tmp_path / "deep" / "y")
    assert read_manifest(tmp_path / "x").digest == read_manifest(tmp_path / "deep" / "y").digest


@pytest.mark.parametrize("kind", ["fsync", "rename", "replace_open"])
def test_a_fault_at_any_call_leaves_nothing_or_a_whole_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """[F1] [F2] ENOSPC at the k-th fsync, rename or opening for writing, for every k that a publish has."""
    faults = 0
    for k in range(50):
        calls = 0

        def fail(real: Any, failing: int = k + 1) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                writing = kind != "replace_open" or "w" in str(args[1:]) + str(kwargs)
                calls += writing
                if writing and calls == failing:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(*args, **kwargs)

            return call

        target = tmp_path / kind / str(k)
        with monkeypatch.context() as patch:
            if kind == "replace_open":
                patch.setattr(Path, "open", fail(Path.open))
            else:
                patch.setattr(os, kind, fail(getattr(os, kind)))
            try:
                write_sample(target)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                faults += 1
        if target.exists():
            verify(target, "sample")
        if calls <= k:
            break
        assert not list(target.parent.glob(f"{artifact.STAGING_PREFIX}*"))
    else:
        pytest.fail("a publish makes fewer than 50 calls of a kind")
    assert faults == k >= 1


def test_files_are_synced_before_the_rename_and_the_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power loss can't leave a renamed folder with unwritten files: write -> fsync -> rename -> fsync of the parent."""
    trace: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (trace.append("fsync " + os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (trace.append("rename"), real_rename(a, b)))
    write_sample(tmp_path / "x")
    before, after = trace[: trace.index("rename")], trace[trace.index("rename") + 1 :]
    assert {Path(line).name for line in before} >= {"a.bin", "b.txt", "sub", MANIFEST_NAME}
    assert after == [f"fsync {tmp_path}"]


def test_a_kill_at_any_moment_leaves_only_whole_artifacts(tmp_path: Path) -> None:
    """[F1] SIGKILL before each thing that a save does to the file system, with an artifact there already: that one stays, every
    folder that discovery can see verifies, and the new one is there at the latest when its rename was made.
    """
    command = [sys.executable, "-m", "tests.lib.core.killed_writer", str(tmp_path)]
    ended = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.split()
    assert ended == ["killed"] * (len(ended) - 1) + ["saved"] and len(ended) >= 10
    found = []
    for number in range(1, len(ended) + 1):
        folder = tmp_path / str(number)
        whole = [path for path in folder.iterdir() if not path.name.startswith(artifact.STAGING_PREFIX)]
        for path in whole:
            verify(path, "sample")
        found.append(sorted(path.name for path in whole))
        remove_stale_staging(folder)
        assert sorted(folder.iterdir()) == sorted(whole)
    renamed = found.index(["first", "second"])
    assert renamed < len(found) - 1  # killed after the rename, too
    assert found == [["first"]] * renamed + [["first", "second"]] * (len(found) - renamed)


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    """[F12] One bit at random places over all files, the manifest included."""
    write_sample(tmp_path / "x")
    rng = random.Random(3)
    files = [tmp_path / "x" / name for name in ("a.bin", "sub/b.txt", MANIFEST_NAME)]
    for _ in range(200):
        path = rng.choice(files)
        original = path.read_bytes()
        at = rng.randrange(len(original))
        path.write_bytes(original[:at] + bytes([original[at] ^ 1 << rng.randrange(8)]) + original[at + 1 :])
        with pytest.raises(ArtifactCorruptError):
            verify(tmp_path / "x", "sample")
        path.write_bytes(original)
    verify(tmp_path / "x", "sample")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.bin").unlink(), "a.bin: is missing"),
        (lambda folder: (folder / "a.bin").write_bytes(b"short"), "a.bin: 5 bytes, the manifest says 256"),
        (lambda folder: (folder / "extra").write_text("x"), "extra: not in the manifest"),
        (lambda folder: (folder / MANIFEST_NAME).unlink(), "no manifest.json"),
        (lambda folder: (folder / "link").symlink_to("a.bin"), "a symbolic link"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    """[I7] A reader gets all files as written, or an error that names the file."""
    write_sample(tmp_path / "x")
    damage(tmp_path / "x")
    with pytest.raises(ArtifactCorruptError, match=message):
        verify(tmp_path / "x")


def test_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    write_sample(tmp_path / "x")
    with pytest.raises(UserError, match="holds a 'sample', expected a 'model'"):
        verify(tmp_path / "x", "model")


def test_an_empty_artifact_is_refused_at_the_writer(tmp_path: Path) -> None:
    with pytest.raises(ArtifactCorruptError, match="no files"), stage_artifact(tmp_path / "x", "sample"):
        pass
    assert not (tmp_path / "x").exists()


def test_an_artifact_is_never_overwritten(tmp_path: Path) -> None:
    write_sample(tmp_path / "x")
    before = verify(tmp_path / "x").digest
    with pytest.raises(FileExistsError, match="an artifact is there already"):
        write_sample(tmp_path / "x")
    assert verify(tmp_path / "x").digest == before


def test_known_hashes_are_checked_like_any_other(tmp_path: Path) -> None:
    """A writer that hands over a wrong hash makes an artifact that no reader believes."""
    staged = artifact.Staged(tmp_path / "staging", known_sha256={"a": "0" * 64})
    staged.path.mkdir()
    (staged.path / "a").write_text("a")
    publish(staged, tmp_path / "x", "sample")
    with pytest.raises(ArtifactCorruptError, match="sha256 differs"):
        verify(tmp_path / "x")


def test_a_link_holds_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    link_or_copy(tmp_path / "a", tmp_path / "sub" / "b")
    assert (tmp_path / "sub" / "b").read_bytes() == b"weights"


def test_hashed_bytes_are_on_the_disk_when_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever publishes may be another process, which can't know whether they are: all of them, flushed by the writer."""
    flushed, fsync = list[tuple[int, int]](), os.fsync

    def note(descriptor: int) -> None:
        found = os.fstat(descriptor)
        flushed.append((found.st_ino, found.st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    content = os.urandom(3 << 20)
    sha256 = write_hashed(tmp_path / "file", [memoryview(content), memoryview(b"end")])
    assert sha256 == hashlib.sha256(content + b"end").hexdigest()
    assert flushed[-1] == ((tmp_path / "file").stat().st_ino, len(content) + 3)

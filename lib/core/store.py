"""The content-addressed store of artifacts on this machine: `<kind>/<digest>`, and the workspaces they are made in."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from fsspec.core import url_to_fs

from lib.core.artifact import fsync_path, link_or_copy, read_manifest, verify
from lib.core.errors import ArtifactCorruptError, InfraError
from lib.core.manifest import MANIFEST_NAME, Manifest
from lib.core.paths import artifact_store

WORKSPACES = "incoming"


def new_workspace() -> Path:
    """A new folder on the store's own file system, so that what is made in it can be renamed into the store.

    Folders of processes that no longer live are removed on the way.
    """
    parent = artifact_store() / WORKSPACES
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob("[0-9]*-*"):
        if not Path(f"/proc/{leftover.name.partition('-')[0]}").exists():
            shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))


def keep(folder: Path) -> Path:
    """Bring an artifact into the store and return its place there; nothing to do when it is there and whole.

    A folder made in a workspace is moved; any other folder stays and its files are linked. A damaged artifact in the
    store is replaced.

    Raises:
        ArtifactCorruptError: `folder` itself doesn't prove what it holds.
    """
    manifest = verify(folder)
    target = artifact_store() / manifest.kind / manifest.digest
    if target.exists():
        if folder.samefile(target) or _is_whole(target):
            return target
        target.rename(new_workspace() / "damaged")
    target.parent.mkdir(parents=True, exist_ok=True)
    source = folder if folder.is_relative_to(artifact_store() / WORKSPACES) else _linked(folder)
    try:
        os.rename(source, target)
    except OSError:
        if not _is_whole(target):
            raise
    fsync_path(target.parent)
    return target


def bring(folder: Path, origin: str) -> None:
    """Make sure that an artifact is at its place in this machine's store; one process fetches it, others wait.

    Args:
        origin: address of the artifact, as fsspec knows it.
    Raises:
        ArtifactCorruptError: what is there doesn't prove what it holds.
        InfraError: it can't be fetched, or isn't what belongs at that place.
    """
    if (folder / MANIFEST_NAME).is_file():
        return
    lock = artifact_store() / WORKSPACES / f"{folder.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if (folder / MANIFEST_NAME).is_file():
            return
        copy = new_workspace() / folder.name
        try:
            _fetch(origin, copy)
        except (ArtifactCorruptError, InfraError):
            raise
        except Exception as error:  # stores have exceptions of their own, with no common root
            raise InfraError(f"{origin}: can't be fetched: {type(error).__name__}: {error}; check the address") from error
        if (place := keep(copy)) != folder:
            raise InfraError(f"{origin}: belongs at {place}, expected at {folder}; give all nodes the same POSTFLYTE_HOME")


def _fetch(origin: str, target: Path) -> None:
    store, root = url_to_fs(origin.rstrip("/"), use_listings_cache=False)
    text = bytes(store.cat_file(f"{root}/{MANIFEST_NAME}"))
    names = [entry.path for entry in Manifest.from_json(text.decode(), where=f"{origin}/{MANIFEST_NAME}").files]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
    store.get([f"{root}/{name}" for name in names], [str(target / name) for name in names])
    (target / MANIFEST_NAME).write_bytes(text)


def _linked(folder: Path) -> Path:
    copy = new_workspace() / folder.name
    for entry in read_manifest(folder).files:
        link_or_copy(folder / entry.path, copy / entry.path)
    link_or_copy(folder / MANIFEST_NAME, copy / MANIFEST_NAME)
    return copy


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except ArtifactCorruptError:
        return False
    return True

"""The content-addressed store of artifacts on this machine: `<kind>/<digest>`, and the workspaces they are made in."""

import os
import shutil
import tempfile
from pathlib import Path

from lib.core.artifact import fsync_path, link_or_copy, read_manifest, verify
from lib.core.errors import ArtifactCorruptError
from lib.core.manifest import MANIFEST_NAME
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

"""A shelf in a folder of a local or shared file system: what is published is renamed into its place."""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lib.core.artifact import (
    STAGING_PREFIX,
    Staged,
    link_or_copy,
    publish,
    remove_stale_staging,
    verify,
    write_hashed,
)
from lib.core.errors import ArtifactCorruptError
from lib.core.manifest import Json, Manifest, file_sha256
from lib.train.tensor_file import MappedTensors, TensorFile

_DAMAGED_PREFIX = "damaged-"


@dataclass(frozen=True)
class StoredFolder:
    """A published folder; also any folder that has the same files."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read_bytes(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError as error:
            raise ArtifactCorruptError(f"{self.path / name}: is missing") from error

    def open_tensors(self, name: str) -> TensorFile:
        return MappedTensors(self.path / name)


@dataclass(frozen=True)
class FolderDraft:
    """A staging folder beside the place that it will have. Every file is on the disk when its call returns."""

    staging: Path
    target: Path

    def __str__(self) -> str:
        return str(self.staging)

    def write(self, name: str, blocks: Iterable[memoryview]) -> str:
        path = self.staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_hashed(path, blocks)

    def add(self, name: str, path: Path) -> str:
        link_or_copy(path, self.staging / name)
        return file_sha256(path)

    def read_bytes(self, name: str) -> bytes:
        return (self.staging / name).read_bytes()

    def publish(self, kind: str, sha256: Mapping[str, str], meta: Json) -> None:
        publish(Staged(self.staging, meta=meta, known_sha256=dict(sha256)), self.target, kind)

    def discard(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)


class FolderShelf:
    """Whoever writes to it holds the lock of the run (lib/train/lock.py): that keeps other starts away."""

    remedy = "Free disk space there (or choose another POSTFLYTE_HOME)"

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def claim(self, start: str) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        remove_stale_staging(self.root)

    def names(self) -> list[str]:
        found = (path.name for path in self.root.glob("[!.]*") if path.is_dir())
        return sorted(name for name in found if not name.startswith(_DAMAGED_PREFIX))

    def open(self, name: str) -> StoredFolder:
        return StoredFolder(self.root / name)

    def draft(self, name: str, start: str) -> FolderDraft:
        return FolderDraft(self.root / f"{STAGING_PREFIX}{name}-{start}", self.root / name)

    def verify(self, name: str, kind: str) -> Manifest:
        return verify(self.root / name, kind)

    def take(self, name: str, kind: str, target: Path) -> Manifest:
        manifest = self.verify(name, kind)
        for entry in manifest.files:
            link_or_copy(self.root / name / entry.path, target / entry.path)
        return manifest

    def set_aside(self, name: str) -> None:
        aside = self.root / f"{_DAMAGED_PREFIX}{name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(self.root / name, aside)

    def remove(self, name: str) -> None:
        """Out of sight in one move, then deleted."""
        doomed = self.root / f"{STAGING_PREFIX}removed-{name}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(self.root / name, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

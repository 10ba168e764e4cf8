"""Where a run keeps what must outlive its processes: folders that are there whole or not at all.

On a file system that all ranks share a folder is published by renaming it (folder_shelf.py), in an object store by writing a
small marker last (object_shelf.py). Whoever saves and loads knows the protocols here alone.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from lib.core.manifest import Json, Manifest
from lib.train.tensor_file import TensorFile


class Stored(Protocol):
    """A folder that has been published, to be read. Its text says where it is."""

    def read_bytes(self, name: str) -> bytes:
        """Raises ArtifactCorruptError where there is no such file, InfraError where the store fails."""
        ...

    def open_tensors(self, name: str) -> TensorFile:
        """Raises as `read_bytes`."""
        ...


class Draft(Protocol):
    """A folder that several processes fill and nobody else sees. Its text says where it is."""

    def write(self, name: str, blocks: Iterable[memoryview]) -> str:
        """Write a file; its sha256 (hex). It outlives this process when the call returns. Raises OSError."""
        ...

    def add(self, name: str, path: Path) -> str:
        """The same with the content of a file that doesn't change."""
        ...

    def read_bytes(self, name: str) -> bytes:
        """What any of the processes has written. Raises OSError."""
        ...

    def publish(self, kind: str, sha256: Mapping[str, str], meta: Json) -> None:
        """Make it a published folder of this kind, in place of none; called once all files are written, by one process.

        Args:
            sha256: of each file by its name.
            meta: facts that its manifest keeps.
        Raises:
            OSError: it could not be published, and isn't.
            RunInUseError: another start has claimed the shelf.
        """
        ...

    def discard(self) -> None:
        """Remove what has been written, as far as that works."""
        ...


class Shelf(Protocol):
    """Folders by name, each of a kind that its manifest names. Its text says where it is."""

    @property
    def remedy(self) -> str:
        """What to do when writing fails; the beginning of a sentence."""
        ...

    def claim(self, start: str) -> None:
        """Only this start of the run publishes from now on, and what others left half-written goes. The driver calls it.

        Raises:
            ConfigError: there can't be a shelf here.
            InfraError: the store fails.
        """
        ...

    def names(self) -> list[str]:
        """Of all published folders, sorted; see `verify` for whether they can be believed."""
        ...

    def open(self, name: str) -> Stored: ...

    def draft(self, name: str, start: str) -> Draft:
        """What start `start` of the run makes of a folder; processes that give the same names fill the same."""
        ...

    def verify(self, name: str, kind: str) -> Manifest:
        """Read every byte of a published folder.

        Raises:
            UserError: it is whole, but of another kind.
            ArtifactCorruptError: names the first file that is missing, altered or not in the manifest.
            InfraError: it can't be read now.
        """
        ...

    def take(self, name: str, kind: str, target: Path) -> Manifest:
        """Bring the files of a published folder into a local one, verified. Raises as `verify`."""
        ...

    def set_aside(self, name: str) -> None:
        """Keep a damaged folder where it is not found any more."""
        ...

    def remove(self, name: str) -> None:
        """However it is interrupted: what is left is either published and whole, or not published."""
        ...

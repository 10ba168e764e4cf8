"""Where a run's checkpoints are: in its own folder, or at an address of an object store."""

from pathlib import Path
from urllib.parse import urlsplit

from lib.train.folder_shelf import FolderShelf
from lib.train.object_shelf import ObjectShelf
from lib.train.shelf import Shelf


def open_shelf(home: str) -> Shelf:
    """The shelf at a path or at an address that fsspec knows. Raises ConfigError for what is neither."""
    if home.startswith("file://"):
        return FolderShelf(Path(urlsplit(home).path))
    return ObjectShelf(home) if "://" in home else FolderShelf(Path(home))

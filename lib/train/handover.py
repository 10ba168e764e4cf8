"""What rank 0 has exported, handed to the driver, which may be on another machine."""

from pathlib import Path

from lib.cluster.group import Worker
from lib.core.errors import InfraError
from lib.core.manifest import Json, Manifest
from lib.train.run_home import open_shelf
from lib.train.shelf import Shelf

EXPORT = "export"
"""Of the run's folder on rank 0's machine, and of the shelf."""


def hand_over(worker: Worker, place: Json) -> None:
    """Bring rank 0's export to the run's shelf, in place of one that an earlier start has left.

    Raises:
        InfraError: it can't be written there; the last checkpoint is.
    """
    if worker.info.rank:
        return
    shelf, folder = open_shelf(place["home"]), Path(place["run_dir"]) / EXPORT
    draft = shelf.draft(EXPORT, place["start"])
    try:
        if EXPORT in shelf.names():
            shelf.remove(EXPORT)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        written = {name: draft.add(name, path) for path in paths for name in [path.relative_to(folder).as_posix()]}
        draft.publish(EXPORT, written, meta={})
    except OSError as error:
        draft.discard()
        raise InfraError(f"{draft}: can't write the export: {error}. {shelf.remedy} and run again") from error


def take_over(shelf: Shelf, target: Path) -> Manifest:
    """The export's files, verified, in a local folder. Raises as `Shelf.take`."""
    return shelf.take(EXPORT, EXPORT, target)

"""Laws of a disk that fails to read: a failure that passes costs nothing, one that stays costs the checkpoint that it is of."""

import errno
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lib.core.errors import InfraError
from lib.core.manifest import MANIFEST_NAME
from lib.train import checkpoint, reread
from lib.train.checkpoint import KIND, latest_valid, published_steps, step_name
from lib.train.folder_shelf import FolderShelf
from lib.train.reread import PAUSES_SECONDS


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it was waited, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged of reading, whatever other tests of this process did to logging."""
    for module in (checkpoint, reread):
        logger = logging.getLogger(module.__name__)
        for name, value in {"handlers": [caplog.handler], "propagate": False, "disabled": False}.items():
            monkeypatch.setattr(logger, name, value)
        caplog.set_level(logging.WARNING, logger.name)
    return caplog


@pytest.fixture
def shelf(tmp_path: Path) -> FolderShelf:
    """With checkpoints of steps 1, 2 and 3."""
    shelf = FolderShelf(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        publish(shelf, step)
    return shelf


def publish(shelf: FolderShelf, step: int) -> None:
    draft = shelf.draft(step_name(step), "0")
    draft.publish(KIND, {"a": draft.write("a", [memoryview(b"state")])}, meta={})


def manifest_of(shelf: FolderShelf, step: int) -> Path:
    return shelf.root / step_name(step) / MANIFEST_NAME


def break_disk(shelf: FolderShelf, step: int) -> Path:
    """The manifest of a checkpoint can't be read: the system refuses the first bytes of any process's memory with EIO. Gives
    back where its text is now."""
    kept = manifest_of(shelf, step).rename(shelf.root / f".kept-{step}")
    manifest_of(shelf, step).symlink_to("/proc/self/mem")
    return kept


def test_a_failure_that_passes_costs_no_checkpoint(
    shelf: FolderShelf, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    """[F12] EIO at all tries but the last: the newest checkpoint is gone on from, and each other try is told."""
    kept, waited = break_disk(shelf, 3), list[float]()

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == len(PAUSES_SECONDS):
            kept.replace(manifest_of(shelf, 3))

    monkeypatch.setattr(time, "sleep", wait)
    assert latest_valid(shelf) == 3
    assert published_steps(shelf) == [3, 2, 1] and tuple(waited) == PAUSES_SECONDS
    expected = [f"{shelf}/{step_name(3)} can't be read, trying again in {pause:g} s" for pause in PAUSES_SECONDS]
    assert [record.message.split(": [Errno 5]")[0] for record in told.records] == expected


def test_a_checkpoint_that_stays_unreadable_is_set_aside(
    shelf: FolderShelf, pauses: list[float], told: pytest.LogCaptureFixture
) -> None:
    """[F12] EIO at each try of the newest two, and the one before them can be read: they are set aside, which is said, and
    the run that goes on writes them again."""
    for step in (2, 3):
        break_disk(shelf, step)
    assert latest_valid(shelf) == 1
    assert published_steps(shelf) == [1] and tuple(pauses) == PAUSES_SECONDS * 2
    messages = [record.message for record in told.records if "going back to the one before" in record.message]
    assert [message.split(" can't")[0] for message in messages] == ["checkpoint of step 3", "checkpoint of step 2"]
    assert all("Input/output error" in message for message in messages)
    publish(shelf, 2)
    assert latest_valid(shelf) == 2


@pytest.mark.usefixtures("pauses")
def test_a_disk_that_reads_nothing_costs_nothing(shelf: FolderShelf) -> None:
    """[F12] No checkpoint can be read but one that is damaged: perhaps all of the disk fails, and for now. An error that
    another start may do without, and what can't be read stays."""
    kept = {step: break_disk(shelf, step) for step in (2, 3)}
    (shelf.root / step_name(1) / "a").write_text("other")
    with pytest.raises(InfraError, match=r"can't read step-00000003, step-00000002 \(\[Errno 5\].*run again"):
        latest_valid(shelf)
    assert published_steps(shelf) == [3, 2]
    for step, text in kept.items():
        text.replace(manifest_of(shelf, step))
    assert latest_valid(shelf) == 3


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_what_is_no_failure_of_the_disk_is_told_at_once(
    shelf: FolderShelf, pauses: list[float], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Want of a right, too many open files, a shared file system that went: the checkpoint isn't to blame and stays."""
    open_file = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == manifest_of(shelf, 3):
            raise OSError(code, os.strerror(code))
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError) as failed:
        latest_valid(shelf)
    assert failed.value.errno == code and not pauses and published_steps(shelf) == [3, 2, 1]

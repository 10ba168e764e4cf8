"""One live driver a run folder, and none before the workers of the one before are gone."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.core.errors import RunInUseError

LOCK_NAME = "run.lock"
WORKERS_LOCK_NAME = "workers.lock"
_ORPHANS_SECONDS = 60.0


@contextmanager
def run_lock(run_dir: Path, *, orphans_seconds: float = _ORPHANS_SECONDS) -> Iterator[None]:
    """Hold the run folder for this driver. The system lets go when the process dies, however it dies.

    Waits up to orphans_seconds for workers that a killed driver has left behind and that are still ending.

    Raises:
        RunInUseError: another live process trains here; names its pid and host.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with _held(run_dir / LOCK_NAME, run_dir, fcntl.LOCK_EX, wait_seconds=0.0):
        with _held(run_dir / WORKERS_LOCK_NAME, run_dir, fcntl.LOCK_EX, wait_seconds=orphans_seconds):
            pass
        yield


@contextmanager
def worker_lock(run_dir: Path) -> Iterator[None]:
    """Held by each rank while it may write to the run folder, which is made where it isn't there; shared among the ranks."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with _held(run_dir / WORKERS_LOCK_NAME, run_dir, fcntl.LOCK_SH, wait_seconds=_ORPHANS_SECONDS):
        yield


@contextmanager
def _held(path: Path, run_dir: Path, kind: int, *, wait_seconds: float) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    holder = path.read_text(encoding="utf-8").strip() or "unknown"
                    raise RunInUseError(
                        f"{run_dir}: another process is training in this run folder ({holder}); wait for it, or stop it, "
                        "then run again"
                    ) from error
            time.sleep(0.1)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(descriptor)

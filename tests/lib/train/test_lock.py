"""Laws of the run folder's lock: one driver at a time, and a dead one holds nothing."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lib.core.errors import RunInUseError
from lib.train.lock import run_lock, worker_lock


def _hold(run_dir: str, kind: str, ready: Connection) -> None:
    with run_lock(Path(run_dir)) if kind == "driver" else worker_lock(Path(run_dir)):
        ready.send(os.getpid())
        signal.pause()


def _holder(run_dir: Path, kind: str) -> tuple[multiprocessing.process.BaseProcess, int]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_hold, args=(str(run_dir), kind, sender), daemon=True)
    process.start()
    return process, receiver.recv()


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    process, pid = _holder(tmp_path, "driver")
    with pytest.raises(RunInUseError, match=rf'"pid": {pid}\b'), run_lock(tmp_path):
        pass
    process.kill()
    process.join()
    with run_lock(tmp_path):
        pass


def test_workers_left_behind_keep_a_new_driver_out(tmp_path: Path) -> None:
    process, _ = _holder(tmp_path, "worker")
    with pytest.raises(RunInUseError, match="another process is training"), run_lock(tmp_path, orphans_seconds=0.3):
        pass
    process.kill()
    process.join()
    with run_lock(tmp_path, orphans_seconds=0.3), worker_lock(tmp_path), worker_lock(tmp_path):
        pass

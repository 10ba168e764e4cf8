"""The worker's side of a group: builds the worker, joins the process group, runs methods, answers pulses.

A backend gives each rank one `Host` and two threads: one for `request`, one for `pulse`, so that a rank answers while it
computes.
"""

import importlib
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lib.cluster.group import RankInfo, Worker, check_plain
from lib.cluster.stop import Stop
from lib.core.errors import PostflyteError
from lib.core.transient import class_elsewhere

PEERS_LOST = "peers lost"
BUG = "bug"

_PEER_TEXTS = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL error")


class Host:
    """One rank's worker and its answers to the driver."""

    def __init__(self, worker_path: str, info: dict[str, Any]) -> None:
        self._worker_path = worker_path
        self._info = RankInfo(**info)
        self._worker: Worker | None = None
        self.stop = Stop()
        self._store: TCPStore | None = None

    def request(self, kind: str, args: list[Any]) -> dict[str, Any]:
        """{"value": result} or {"error": class name, PEERS_LOST or BUG, "message": text}; never raises."""
        steps: dict[str, Callable[..., Any]] = {
            "build": self._build,
            "open_store": self._open_store,
            "join": self._join,
            "call": self._call,
        }
        try:
            value = steps[kind](*args)
            check_plain(value, f"result of {args[0] if args else kind}")
            return {"value": value}
        except BaseException as error:  # noqa: BLE001 - it goes on as a message and is raised by the driver
            kind_of_failure = PEERS_LOST if _lost_its_peers(error) else class_elsewhere(error) or BUG
            message = str(error) if isinstance(error, PostflyteError) else traceback.format_exc()
            return {"error": kind_of_failure, "message": message}

    def pulse(self, stop: bool) -> dict[str, Any]:
        """Sign of life: who this process is, and the events since the last pulse; passes on that the driver wants a stop."""
        if stop:
            self.stop.request()
        worker = self._worker
        return {
            "pid": os.getpid(),
            "created": psutil.Process().create_time(),
            "hostname": socket.gethostname(),
            "events": worker.drain_events() if worker is not None else [],
        }

    def leave(self) -> None:
        """Leave the process group (needed only where the process lives on)."""
        if self._store is not None and dist.is_initialized():
            dist.destroy_process_group()
        self._worker, self._store = None, None

    def _build(self) -> None:
        module, _, name = self._worker_path.partition(":")
        worker_class = getattr(importlib.import_module(module), name)
        self._worker = worker_class(self._info)
        self._worker.stop = self.stop

    def _open_store(self, address: str, timeout_seconds: float) -> int:
        """Rank 0 keeps the rendezvous store on a port that the system picks and this process holds from then on."""
        timeout = timedelta(seconds=timeout_seconds)
        num_ranks = self._info.num_ranks
        self._store = TCPStore(address, 0, num_ranks, is_master=True, timeout=timeout, wait_for_workers=False)
        return int(self._store.port)

    def _join(self, address: str, port: int, start_seconds: float, collective_seconds: float) -> None:
        assert self._worker is not None
        info = self._info
        if self._store is None:
            timeout = timedelta(seconds=start_seconds)
            self._store = TCPStore(address, port, info.num_ranks, is_master=False, timeout=timeout)
        on_gpu = info.device.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(info.device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=self._store,
            rank=info.rank,
            world_size=info.num_ranks,
            timeout=timedelta(seconds=collective_seconds),
        )
        dist.barrier()
        self._info = RankInfo(**{**vars(info), "master_addr": address, "master_port": port})
        self._worker.info = self._info

    def _call(self, method: str, args: list[Any]) -> Any:
        assert self._worker is not None
        return getattr(self._worker, method)(*args)


def worker_path(worker_class: type[Worker]) -> str:
    """`module:Class`, by which another process imports it."""
    path = f"{worker_class.__module__}:{worker_class.__qualname__}"
    if worker_class.__module__ == "__main__" or "." in worker_class.__qualname__:
        raise TypeError(f"{path}: a worker class must stand at the top of an importable module")
    return path


def _lost_its_peers(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _PEER_TEXTS)

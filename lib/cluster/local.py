"""A worker group in processes (or, for one rank, threads) of this machine, without Ray: for unit tests and one-rank jobs."""

import multiprocessing
import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import psutil

from lib.cluster.group import Deadlines, OnEvents, Worker, rank_infos
from lib.cluster.host import Host, worker_path
from lib.cluster.processes import end_trees, exit_cause, oom_kills
from lib.cluster.stop import Stop
from lib.cluster.watch import Message, Transport, Watch
from lib.config.parallel import ClusterShape

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}
"""On one machine the loopback device always connects, whatever the host name resolves to."""

_ENV_LOCK = threading.Lock()


class LocalGroup:
    """A `WorkerGroup` of this machine (see there)."""

    def __init__(
        self,
        worker_class: type[Worker],
        shape: ClusterShape,
        *,
        env: Mapping[str, str],
        deadlines: Deadlines,
        process_group: bool = True,
        in_process: bool = False,
    ) -> None:
        """in_process: run the only rank in a thread of this process; `env` then has no effect on libraries in use.

        Raises:
            WorkerDiedError: a rank died or didn't start in time.
            ValueError: the shape has several nodes, or several ranks in process.
        """
        if shape.nodes != 1 or (in_process and shape.num_ranks != 1):
            raise ValueError(f"{shape}: LocalGroup takes one node, and in_process one rank; use RayGroup")
        path = worker_path(worker_class)
        infos = [asdict(info) for info in rank_infos(shape, one_device_visible=False)]
        transport: Transport = _Threads(Host(path, infos[0])) if in_process else _Processes(path, infos, {**LOOPBACK, **env})
        self._watch = Watch(transport, worker_class, shape.num_ranks, deadlines)
        self._watch.start("127.0.0.1" if process_group else None)

    @property
    def num_ranks(self) -> int:
        return self._watch.num_ranks

    def call(
        self,
        method: str,
        *args: Any,
        deadline_seconds: float,
        on_events: OnEvents | None = None,
        stop: Stop | None = None,
    ) -> Any:
        return self._watch.call(method, args, deadline_seconds, on_events, stop or Stop())

    def close(self) -> None:
        self._watch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Processes:
    """One spawned process a rank, with a pipe to each."""

    def __init__(self, path: str, infos: list[dict[str, Any]], env: Mapping[str, str]) -> None:
        self._oom_kills = oom_kills()
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._created: list[float] = []
        self._reported: set[int] = set()
        context = multiprocessing.get_context("spawn")
        for info in infos:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, path, info), daemon=True)
            with _ENV_LOCK, _environment(env):
                process.start()
            theirs.close()
            assert process.pid is not None
            self._pipes.append(ours)
            self._processes.append(process)
            self._created.append(psutil.Process(process.pid).create_time())

    def request(self, rank: int, kind: str, args: list[Any]) -> None:
        self._send(rank, (kind, args))

    def pulse(self, rank: int, *, stop: bool) -> None:
        self._send(rank, ("pulse", [stop]))

    def poll(self, timeout_seconds: float) -> list[Message]:
        alive = [rank for rank in range(len(self._pipes)) if rank not in self._reported]
        wait([self._pipes[rank] for rank in alive], timeout_seconds)
        messages: list[Message] = []
        for rank in alive:
            try:
                while self._pipes[rank].poll():
                    kind, body = self._pipes[rank].recv()
                    messages.append(Message(rank, kind, body))
            except (EOFError, OSError):
                messages.append(self._death(rank))
        return messages

    def close(self) -> None:
        pids = [process.pid or 0 for process in self._processes]
        end_trees(zip(pids, self._created))
        for process, pipe in zip(self._processes, self._pipes):
            process.join(10.0)
            pipe.close()

    def _send(self, rank: int, message: tuple[str, list[Any]]) -> None:
        try:
            self._pipes[rank].send(message)
        except OSError:  # it is dead; the next poll tells why
            return

    def _death(self, rank: int) -> Message:
        self._reported.add(rank)
        self._processes[rank].join(5.0)
        return Message(rank, "died", {"message": exit_cause(self._processes[rank].exitcode, oom_kills() - self._oom_kills)})


class _Threads:
    """The only rank, in this process."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._requests: queue.SimpleQueue[tuple[str, list[Any]] | None] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="postflyte-rank-0", daemon=True)
        self._thread.start()

    def request(self, rank: int, kind: str, args: list[Any]) -> None:
        self._requests.put((kind, args))

    def pulse(self, rank: int, *, stop: bool) -> None:
        self._messages.put(Message(0, "pulse", self._host.pulse(stop)))

    def poll(self, timeout_seconds: float) -> list[Message]:
        try:
            return [self._messages.get(timeout=timeout_seconds)]
        except queue.Empty:
            return []

    def close(self) -> None:
        self._requests.put(None)
        self._thread.join(10.0)

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            self._messages.put(Message(0, "outcome", self._host.request(*request)))
        self._host.leave()


class _environment:
    """Set variables for the duration of a block: a spawned process takes the environment of its start."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._env}
        os.environ.update(self._env)

    def __exit__(self, *exc: object) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, path: str, info: dict[str, Any]) -> None:
    """Main function of a rank's process: requests in this thread, pulses in another."""
    host = Host(path, info)
    host.stop.listen()
    requests: queue.SimpleQueue[tuple[str, list[Any]]] = queue.SimpleQueue()
    sending = threading.Lock()

    def send(kind: str, body: dict[str, Any]) -> None:
        with sending:
            pipe.send((kind, body))

    def listen() -> None:
        try:
            while True:
                kind, args = pipe.recv()
                if kind == "pulse":
                    send("pulse", host.pulse(*args))
                else:
                    requests.put((kind, args))
        except (EOFError, OSError):
            os._exit(1)  # the driver is gone, and with it the reason to be

    threading.Thread(target=listen, name="postflyte-pulse", daemon=True).start()
    while True:
        send("outcome", host.request(*requests.get()))

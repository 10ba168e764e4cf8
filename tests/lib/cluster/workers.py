"""Workers that the cluster tests run in other processes."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lib.cluster.group import RankInfo, Worker, dispatch
from lib.core.errors import DataError, GenerationError, PreemptedError
from lib.data.prefetch import Prefetcher
from lib.data.produce import ProcessProducer
from lib.data.stream import Share
from tests.lib.data.test_produce import ARGUMENTS, opened


class RowError(DataError):
    """A subclass that lib.core.errors doesn't know."""


class Probe(Worker):
    """Does what the tests ask."""

    def __init__(self, info: RankInfo) -> None:
        super().__init__(info)
        self.started = time.monotonic()

    @dispatch(merge="all")
    def identity(self) -> dict[str, Any]:
        return {**vars(self.info), "pid": os.getpid()}

    @dispatch(merge="all")
    def env(self, names: list[str]) -> list[str | None]:
        return [os.environ.get(name) for name in names]

    @dispatch(split="by_rank", merge="all")
    def echo(self, value: Any) -> Any:
        return value

    @dispatch(merge="sum")
    def count(self) -> dict[str, int]:
        return {"ranks": 1, "rank": self.info.rank, f"only {self.info.rank}": 1}

    @dispatch()
    def whoami(self) -> int:
        return self.info.rank

    @dispatch(merge="all")
    def all_reduce(self) -> float:
        value = torch.tensor([float(self.info.rank + 1)])
        dist.all_reduce(value)
        return float(value.item())

    @dispatch()
    def stream_in_processes(self, times: int) -> list[int]:
        """Documents of the first step of a stream in two data processes, started anew so many times."""
        found = []
        for _ in range(times):
            producers = [ProcessProducer(opened, ARGUMENTS, Share(0, 1, worker, 2)) for worker in (0, 1)]
            with Prefetcher(producers, lambda step: sum(len(row.documents) for row in step.rows), 1) as feed:
                found.append(feed.next_step())
        return found

    @dispatch()
    def emit_steps(self, steps: int) -> str:
        for step in range(steps):
            self.emit({"step": step})
            time.sleep(0.01)
        return "done"

    @dispatch(events="all")
    def emit_everywhere(self) -> None:
        self.emit({"hello": self.info.rank})

    @dispatch()
    def fail(self, rank: int, kind: str) -> None:
        if self.info.rank == rank:
            if kind == "data":
                raise RowError("rows.jsonl:7: no role")
            if kind == "infra":
                raise GenerationError("engine gave up")
            if kind == "disk":
                raise OSError(errno.EIO, "the disk failed")
            raise ZeroDivisionError("a bug")
        if dist.is_initialized():
            dist.barrier()

    @dispatch()
    def train(self, seconds: float) -> None:
        """A loop of collectives, like training; says when it is under way."""
        end = time.monotonic() + seconds
        value = torch.ones(1)
        while time.monotonic() < end:
            dist.all_reduce(value)
            value.fill_(1.0)
            self.emit({"alive": True})
            time.sleep(0.05)

    @dispatch()
    def be_silent(self, seconds: float) -> None:
        time.sleep(seconds)

    @dispatch()
    def be_silent_after_a_word(self, seconds: float) -> None:
        self.emit({"alive": True})
        time.sleep(seconds)

    @dispatch()
    def work_until_stopped(self, seconds: float) -> None:
        """Looks at the wish to stop again and again, as training does at each step."""
        end = time.monotonic() + seconds
        with self.stop.heeded():
            while time.monotonic() < end:
                self.emit({"alive": True})
                time.sleep(0.05)
                if self.stop.requested:
                    raise PreemptedError("saved")

    @dispatch()
    def compute(self, seconds: float) -> int:
        """Hold the interpreter as much as Python code can."""
        end, rounds = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            sum(range(100_000))
            rounds += 1
        return rounds

    @dispatch()
    def give_back(self, path: Path) -> Any:
        return {"path": path, "list": [1, 2.5, None, True]}

    @dispatch()
    def give_object(self) -> Any:
        return object()

    def undeclared(self) -> None:
        return None


class BrokenAtBirth(Worker):
    """Can't be built."""

    def __init__(self, info: RankInfo) -> None:
        super().__init__(info)
        raise DataError("model folder is empty")
